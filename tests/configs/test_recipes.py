"""Every recipe runs on the tiny model as far as it can without data; its stages are what the paper says."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignvlm_pl.cli.recipe import plan_runs, read_stages
from alignvlm_pl.errors import ConfigError
from alignvlm_pl.training.stage import PARTS, Stage
from datamodules.loading.train_data import MixtureSource

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted((CONFIGS / "recipe").glob("*.yaml"))

# The stages of the paper with every setting that is not Stage's default. PAPER: table 6 and the low-data study give
# what trains, rates, batch, epochs and (table 6) text length. OURS: the paper gives none.
OURS = {
    "warmup_share": 0.03,
    "schedule": "cosine",
    "weight_decay": 0.0,
    "gradient_clip_norm": 1.0,
    "min_lr_share": 0.0,
}
ALL, NO_VISION = ("vision", "connector", "llm"), ("connector", "llm")


def _rates(rate: float, parts: tuple[str, ...]) -> dict[str, float]:
    return {f"lr_{part}": rate for part in parts}


PAPER: dict[tuple[str, int], dict[str, Any]] = {
    ("llama3.2-1b", 1): {**_rates(1e-5, ALL), "global_batch_size": 512, "max_text_length": 1024},
    ("llama3.2-1b", 2): {**_rates(5e-5, ALL), "global_batch_size": 512},
    ("llama3.2-1b", 3): {**_rates(5e-5, NO_VISION), "global_batch_size": 512, "epochs": 5},
    ("llama3.2-3b", 1): {**_rates(1e-5, ALL), "global_batch_size": 512, "max_text_length": 1024},
    ("llama3.2-3b", 2): {**_rates(5e-5, ALL), "global_batch_size": 256},
    ("llama3.2-3b", 3): {**_rates(5e-5, NO_VISION), "global_batch_size": 256, "epochs": 5},
    ("llama3.1-8b", 1): {**_rates(1e-5, ALL), "global_batch_size": 512, "max_text_length": 1024},
    ("llama3.1-8b", 2): {**_rates(1e-5, ALL), "global_batch_size": 256},
    ("llama3.1-8b", 3): {**_rates(1e-5, NO_VISION), "global_batch_size": 256, "epochs": 5},
    ("vcr-3b", 3): {**_rates(5e-5, NO_VISION), "global_batch_size": 256, "epochs": 5, "max_steps": 13360},
    ("low-data-3b", 1): {"lr_connector": 1e-3, "global_batch_size": 32, "max_text_length": 1024},
    ("low-data-3b", 2): {**_rates(1e-5, NO_VISION), "lr_vision": 2e-6, "global_batch_size": 8},
}
PARENTS = {1: None, 2: "1", 3: "2"}


def _load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return content


@pytest.mark.parametrize(("recipe", "number"), PAPER)
def test_paper_stage_as_resolved(recipe: str, number: int) -> None:
    stages = read_stages(CONFIGS / "recipe" / f"{recipe}.yaml")
    (entry,) = (entry for entry in stages if entry.files["stage"].stem == str(number))
    resolved = dataclasses.asdict(Stage(**entry.settings("stage")))
    expected = dataclasses.asdict(Stage(name=str(number), max_text_length=2048, lr_llm=1.0))
    expected |= {"lr_llm": None, "parent": PARENTS[number], **OURS, **PAPER[recipe, number]}
    assert resolved == expected
    # A default is no statement: what decides how a stage trains stands in its file.
    said = {*OURS, "global_batch_size", "max_text_length", "epochs", *(f"lr_{part}" for part in PARTS)}
    assert said <= set(_load(entry.files["stage"]))


def test_every_paper_size_and_study_is_there() -> None:
    ours = ("demo", "receipts", "study-", "llama3.2-1b-gpu1")
    paper = [path for path in RECIPES if not path.stem.startswith(ours)]
    stages = {(path.stem, int(entry.files["stage"].stem)) for path in paper for entry in read_stages(path)}
    assert stages == set(PAPER)


def test_vcr_is_a_sixth_of_its_stage() -> None:
    data = _load(CONFIGS / "data/docdownstream-vcr.yaml")["init_args"]
    mixture = {name: MixtureSource(**source) for name, source in data["mixture"].items()}
    assert {name: source.weight for name, source in mixture.items()} == {"docdownstream": 5, "vcr": 1}
    assert all(not Path(folder).is_absolute() for source in mixture.values() for folder in source.sets)
    # Five epochs of DocDownstream's 570,000 samples, as in stage 3, and a VCR sample for every five.
    stage = Stage(**read_stages(CONFIGS / "recipe/vcr-3b.yaml")[0].settings("stage"))
    assert (stage.max_steps or 0) * stage.global_batch_size * 5 / 6 == pytest.approx(5 * 570_000, rel=1e-3)


def test_the_internvl_model_is_the_1b_model_with_other_grids() -> None:
    plain, other = (_load(CONFIGS / "model" / f"llama3.2-1b{end}.yaml")["spec"] for end in ("", "-internvl"))
    assert other.pop("tiling") == {**plain.pop("tiling"), "rule": "internvl", "thumbnail": "last"}
    assert other == plain


def test_low_data_model_is_the_3b_model_with_grids_to_six_by_six() -> None:
    plain, low = (_load(CONFIGS / "model" / f"llama3.2-3b{end}.yaml")["spec"] for end in ("", "-low-data"))
    assert low.pop("tiling") == {**plain.pop("tiling"), "max_side": 6, "thumbnail": "first"}
    assert low == plain


# --- on the tiny model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that put the tiny model and one CPU in the place of a recipe's."""
    from alignvlm_pl.models.tiny import tiny_spec

    root = tmp_path_factory.mktemp("tiny")
    (root / "model.yaml").write_text(
        yaml.safe_dump({"spec": dataclasses.asdict(tiny_spec(root / "tokenizer")), "attention": None})
    )
    cpu = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
    (root / "cpu.yaml").write_text(yaml.safe_dump(cpu))
    return [
        "--model",
        str(root / "model.yaml"),
        "--trainer",
        str(root / "cpu.yaml"),
        "--run_dir",
        str(root / "run"),
    ]


def _instantiate(options: list[str]) -> Any:
    """All objects of a `fit`, which is not run."""
    from alignvlm_pl.cli import _configure_output
    from alignvlm_pl.cli.lightning_cli import AlignCLI

    _configure_output()  # as the command does: other people's advice is no error here

    class Still(AlignCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    return Still.run_command(["fit", *options])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # of torch's compiler, in its own code
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_stage_of_a_recipe_instantiates_on_the_tiny_model(
    recipe: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["alignvlm"])
    given = ["--config", str(CONFIGS / "base.yaml"), "--config", str(recipe), *tiny]
    entries = read_stages(recipe)
    first = Stage(**entries[0].settings("stage"))
    if first.parent is not None:
        with pytest.raises(ConfigError, match=f"starts from the end of stage '{first.parent}'"):
            _instantiate(plan_runs(given)[0].options)
        given += ["--stage.init_from", "runs/elsewhere/hf"]
    for run, entry in zip(plan_runs(given), entries, strict=True):
        stage = Stage(**entry.settings("stage"))
        options = list(run.options)
        if stage.last_blocks:  # the tiny model has two
            stage = dataclasses.replace(stage, last_blocks=dict.fromkeys(stage.last_blocks, 1))
            options.append(f"--stage.last_blocks={json.dumps(stage.last_blocks)}")
        cli = _instantiate(options)
        resolved = cli.trainer.callbacks
        transition = next(item for item in resolved if type(item).__name__ == "StageTransition")
        assert dataclasses.replace(transition.stage, init_from=None) == stage
        data = _load(entry.files["data"])
        assert type(cli.datamodule).__name__ == data["class_path"]
        assert cli.trainer.accumulate_grad_batches * cli.datamodule.batch_size == stage.global_batch_size
        assert (cli.trainer.max_steps, cli.trainer.max_epochs) == (
            (stage.max_steps, -1) if stage.max_steps else (-1, stage.epochs)
        )
        _check_groups(cli.model, stage)


def _check_groups(module: Any, stage: Stage) -> None:
    """The built model trains what the stage says, at its learning rates, and decays matrices alone."""
    from torch import nn

    from alignvlm_pl.training.optim import parameter_groups
    from alignvlm_pl.training.part_table import part_rows

    module.begin_stage(stage)
    module.configure_model()
    rows = {row[0].partition(" ")[0]: row for row in part_rows(module.net, stage)}
    for part, rate in stage.learning_rates.items():
        _, total, trainable, shown, _ = rows[part]
        if part in {**stage.adapters, **(stage.last_blocks or {})}:
            assert 0 < int(trainable.replace(",", "")) < int(total.replace(",", ""))
        else:
            assert trainable == (total if rate else "0")
        assert shown == (f"{rate:g}" if rate else "frozen")
    groups = parameter_groups(module.net, dataclasses.replace(stage, weight_decay=0.25))
    assert {group["name"].split("/")[0] for group in groups} == {p for p, r in stage.learning_rates.items() if r}
    decayed, spared = (
        [p for group in groups if bool(group["weight_decay"]) is wanted for p in group["params"]]
        for wanted in (True, False)
    )
    tables = [m.weight for m in module.net.modules() if isinstance(m, nn.Embedding)]
    assert all(p.ndim > 1 and not any(p is table for table in tables) for p in decayed)
    assert all(p.ndim < 2 or any(p is table for table in tables) for p in spared)
