"""Every file in configs/study/: it is a study, and the model of each of its arms can be built, on the meta device."""

from pathlib import Path

import pytest

from alignvlm_pl.cli.recipe import plan_runs
from alignvlm_pl.cli.study_run import MEASURES
from alignvlm_pl.study.cost import count_arm
from alignvlm_pl.study.plan import BUDGETS, Cell, read_study
from alignvlm_pl.study.plan import MEASURES as NAMES
from alignvlm_pl.study.schedule import places

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted((CONFIGS / "study").glob("*.yaml"))
ARMS = [(path, arm) for path in FILES for arm in read_study(path).arms]


def test_every_measure_that_a_file_may_name_can_be_taken():
    assert set(NAMES) == set(MEASURES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_has_three_seeds_and_all_its_cells(path):
    study = read_study(path)
    assert len(study.seeds) >= 3
    assert len(places(study)) >= len(study.arms) * len(study.seeds) * len(study.budgets)
    assert set(study.budgets) <= set(BUDGETS)


@pytest.mark.parametrize(("path", "arm"), ARMS, ids=lambda value: getattr(value, "stem", value))
def test_the_model_of_an_arm_can_be_built(path, arm):
    study = read_study(path)
    found = count_arm(study, arm, tiles=2)
    assert found["parameters"] > 0 and found["tflops"] > 0 and found["tokens_per_tile"] > 0
    cell = Cell(study=study, arm=arm, seed=0, budget="samples")
    assert plan_runs(cell.words(cell.recipe)), "its options are options of the recipe"
    assert cell.id != Cell(study=study, arm=arm, seed=1, budget="samples").id
    assert cell.id == Cell(study=study, arm=arm, seed=0, budget="seconds").id, "one run serves both"


def test_arms_of_a_study_are_other_cells():
    for path in FILES:
        study = read_study(path)
        assert len({Cell(study=study, arm=arm, seed=0, budget="samples").id for arm in study.arms}) == len(study.arms)
