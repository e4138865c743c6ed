"""`study` on a tiny world: cells that run once, budgets, a kill in the middle, and a report from result files alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from alignvlm_pl.cli import main
from alignvlm_pl.cli.study_run import OWNER
from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.study.plan import read_study
from alignvlm_pl.study.results import Results
from alignvlm_pl.study.schedule import Place, cell_at, places

from .conftest import World, write_set, write_yaml

STUDY = {
    "arms": {"align": {}, "mlp": {"connector.type": "mlp"}},
    "base": "align",
    "seeds": [0, 1],
    "budgets": ["samples", "flops"],
    "options": {"stage.max_steps": 12},
    "rates": {"option": "stage.lr_connector", "values": [1e-3, 1e-4], "steps": 2},
}


@pytest.fixture(scope="module")
def config(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two arms and two seeds on 12 questions; a cell takes seconds."""
    root = tmp_path_factory.mktemp("study")
    write_set(root / "questions", 12, samples_per_shard=6)
    shutil.copy(world.root / "stage.yaml", root)
    data = yaml.safe_load((world.root / "data.yaml").read_text())
    data["init_args"]["benchmarks"] = {"questions": str(root / "questions")}
    write_yaml(root / "data.yaml", data)
    files = {axis: str(world.root / name) for axis, name in (("model", "model.yaml"), ("trainer", "cpu.yaml"))}
    write_yaml(root / "benchmark.yaml", {"max_new_tokens": 4, "at_stage_end": False, "page_images": 0})
    stages = [{"stage": "stage.yaml", "data": "data.yaml"}]
    write_yaml(root / "recipe.yaml", {**files, "benchmark": "benchmark.yaml", "stages": stages})
    return write_yaml(root / "tiny.yaml", {"recipe": "recipe.yaml", **STUDY})


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the study, finished."""
    root = tmp_path_factory.mktemp("finished")
    assert main(["study", "connectors", "--config", str(config), "--run-dir", str(root)]) == 0
    return root


def test_every_cell_has_a_small_result(config, finished):
    study, results = read_study(config), Results(finished / "results")
    grid = places(study)
    assert len(grid) == 2 * 2 + 2 * 2 * 2
    found = [results.read(cell_at(study, place, results)) for place in grid]
    assert all(found)
    tuning = found[:4]
    assert [one["steps"] for one in tuning] == [[2]] * 4
    assert all(one["questions"] == {} and one["loss"]["held"] > 0 for one in tuning)
    trained = found[4:]
    assert {one["seed"] for one in trained} == {0, 1}
    assert all(len(one["questions"]["questions"]["anls"]) == 12 for one in trained)
    assert all(path.stat().st_size < 4000 for path in (finished / "results").iterdir())
    work = {one["arm"]: one["flops"] / one["steps"][0] for one in trained}
    assert work["align"] > work["mlp"] > 0
    by_samples, by_flops = ({one["arm"]: one for one in trained if one["budget"] == name} for name in study.budgets)
    assert by_samples["align"]["steps"] == by_samples["mlp"]["steps"] == [12]
    assert by_flops["mlp"]["steps"] == [14]
    assert by_flops["mlp"]["flops"] == pytest.approx(by_samples["align"]["flops"], rel=0.05), "to whole steps"


def test_the_report_is_a_function_of_the_results(config, finished, tmp_path):
    report = finished / "report" / "report.md"
    text = report.read_text("utf-8")
    assert "12 of 12 cells are finished" in text
    assert "| ALIGN scores above the MLP |" in text
    shutil.copytree(finished / "results", tmp_path / "results")
    options = ["--results", str(tmp_path / "results"), "--report", str(tmp_path / "report"), "--report-only"]
    assert main(["study", "connectors", "--config", str(config), "--run-dir", str(tmp_path / "none"), *options]) == 0
    assert not (tmp_path / "none").exists()
    for path in sorted((finished / "report").iterdir()):
        assert path.read_bytes() == (tmp_path / "report" / path.name).read_bytes(), path.name
    study, results = read_study(config), Results(tmp_path / "results")
    gone = cell_at(study, Place(budget="samples", arm="mlp", seed=1), results)
    results.path(gone).unlink()
    assert main(["study", "connectors", "--config", str(config), "--run-dir", str(tmp_path / "none"), *options]) == 0
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "**Missing**: 7 (samples, arm mlp, seed 1)" in text
    assert "wait for them" in text


def start(config: Path, root: Path) -> "subprocess.Popen[bytes]":
    command = [
        sys.executable,
        "-m",
        "alignvlm_pl",
        "study",
        "connectors",
        "--config",
        str(config),
        "--run-dir",
        str(root),
    ]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_that_is_killed_gives_the_same_report(config, finished, tmp_path):
    """Byte for byte, but for the seconds that were measured; the first six cells are taken over."""
    study, results = read_study(config), Results(tmp_path / "results")
    results.folder.mkdir()
    for place in places(study)[:6]:
        path = results.path(cell_at(study, place, results))
        shutil.copy(finished / "results" / path.name, path)
    for marker in (7, 8):  # finished cells at which it is killed, in the middle of the next one
        process = start(config, tmp_path)
        ends = time.monotonic() + 240
        while len(list((tmp_path / "results").glob("*.json"))) < marker and time.monotonic() < ends:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert main(["study", "connectors", "--config", str(config), "--run-dir", str(tmp_path)]) == 0
    for path in sorted((finished / "results").glob("*.json")):
        whole, own = (json.loads((folder / path.name).read_text()) for folder in (path.parent, tmp_path / "results"))
        seconds = whole["seconds"]
        assert own | {"seconds": seconds} == whole
        text = (tmp_path / "results" / path.name).read_text("utf-8")
        (tmp_path / "results" / path.name).write_text(
            text.replace(f'"seconds": {own["seconds"]}', f'"seconds": {seconds}')
        )
    assert main(["study", "connectors", "--config", str(config), "--run-dir", str(tmp_path), "--report-only"]) == 0
    for path in sorted((finished / "report").iterdir()):
        assert path.read_bytes() == (tmp_path / "report" / path.name).read_bytes(), path.name


def test_a_cell_of_an_array_names_what_it_waits_for(config, tmp_path, capsys):
    words = ["study", "connectors", "--config", str(config), "--run-dir", str(tmp_path)]
    assert main([*words, "--cell", "4"]) == 1
    assert "cell 0 (tuning, arm align, rate 0.001) must be finished first" in capsys.readouterr().err
    assert main([*words, "--cell", "12"]) == 1
    assert "--cell 12: study tiny has cells 0 to 11; --list shows them" in capsys.readouterr().err
    assert main([*words, "--list"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 12
    assert rows[0].endswith("missing")
    assert "waits" in rows[4]


@pytest.mark.slow
def test_a_task_of_an_array_runs_its_cell_alone_and_writes_no_report(config, finished, tmp_path):
    words = ["study", "connectors", "--config", str(config), "--run-dir", str(tmp_path), "--cell", "1"]
    assert main(words) == 0
    (path,) = (tmp_path / "results").iterdir()
    own, whole = (json.loads((root / "results" / path.name).read_text("utf-8")) for root in (tmp_path, finished))
    assert own | {"seconds": 0} == whole | {"seconds": 0}, "as in a run of all cells"
    assert not (tmp_path / "report").exists()


def test_a_folder_of_another_cell(config, tmp_path, capsys):
    study, results = read_study(config), Results(tmp_path / "results")
    cell = cell_at(study, places(study)[0], results)
    (tmp_path / cell.id).mkdir()
    (tmp_path / cell.id / OWNER).write_text('{"cell": "abc", "study": "other"}')
    words = ["study", "connectors", "--config", str(config), "--run-dir", str(tmp_path), "--cell", "0"]
    assert main(words) == 1
    assert f"{cell.id} holds cell abc of study other; remove it, or set --run-dir" in capsys.readouterr().err
    (tmp_path / cell.id / OWNER).unlink()
    (tmp_path / cell.id / "notes.txt").write_text("mine")
    assert main(words) == 1
    assert "is not empty and holds no cell of a study" in capsys.readouterr().err


def test_arms_that_saw_other_samples_or_questions_are_not_compared(config, finished, tmp_path):
    from alignvlm_pl.study.compare import compare

    study = read_study(config)
    shutil.copytree(finished / "results", tmp_path / "results")
    results = Results(tmp_path / "results")
    path = results.path(cell_at(study, Place(budget="samples", arm="mlp", seed=0), results))
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, "order": {"all/1": "another"}}))
    with pytest.raises(DataError, match="arms align and mlp, seed 0: up to all/1 they had other samples"):
        compare(study, "samples", results)
    content["questions"]["questions"]["keys"][0] = "other"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="they answered other questions of 'questions'"):
        compare(study, "samples", results)
    path.write_text("{")
    with pytest.raises(DataError, match="is no result of a study"):
        compare(study, "samples", results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": {}}, "key 'arm' is unknown; did you mean 'arms'"),
        ({"base": "alin"}, "base='alin' is no arm; did you mean 'align'"),
        ({"arms": []}, r"`arms` must map names to options of `fit`, found \[\]"),
        ({"seeds": [0, 0]}, r"`seeds` must be a list of different whole numbers, found \[0, 0\]"),
        ({"budgets": ["flop"]}, "budget 'flop' is unknown; did you mean 'flops'"),
        ({"budgets": ["flops"]}, "add `samples`, from whose cells"),
        ({"rates": {"option": "stage.lr_llm", "values": [1.0]}}, "`steps` is missing"),
        (
            {"rates": {"option": "stage.lr_llm", "values": ["a"], "steps": 1}},
            r"must be learning rates such as \[1.0e-3\]",
        ),
        ({"arms": {"align": {}, "same": {}}}, "arms align and same are the same run; leave one of them out"),
        ({"measures": ["noise"]}, r"`measures` must be a mapping, found \['noise'\]"),
        ({"cost": 3}, "`cost` must be a mapping, found 3"),
        ({"seeds": []}, r"`seeds` must be a list of different whole numbers, found \[\]"),
        ({"recipe": "gone.yaml"}, "there is no file .*gone.yaml"),
        ({"measures": {"noises": {}}}, "measure 'noises' is unknown; did you mean 'noise'"),
    ],
)
def test_a_file_that_is_no_study(config, change, message, tmp_path):
    path = config.parent / "bad.yaml"
    write_yaml(path, {"recipe": "recipe.yaml", **STUDY, **change})
    with pytest.raises(ConfigError, match=message):
        read_study(path)


def test_an_unknown_study(config, capsys):
    assert main(["study", "connector", "--config", str(config)]) == 1
    assert "study 'connector' is unknown; did you mean 'connectors'" in capsys.readouterr().err
    assert main(["study", "noise", "--config", str(config)]) == 1
    assert "study tiny measures no noise: add `measures: {noise: …}` to" in capsys.readouterr().err


@pytest.mark.slow
def test_every_measure_is_taken_of_every_arm(config, tmp_path, capsys):
    noise = {"absolute": [3.0], "relative": [1.0]}
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    forgetting = {"text": str(tmp_path / "text.txt"), "windows": 2}
    prune = {"counts": [100], "masses": [0.5], "steps": [0, 2], "pages": 3}
    collapse = {"masses": [0.005, 1.01], "tokens": [10, 32], "min_run": 1, "steps": [0], "pages": 3}
    measures = {"noise": noise, "tokens": {"pages": 3}, "prune": prune, "collapse": collapse, "forgetting": forgetting}
    measures["examples"] = {"count": 2}
    few = {"recipe": "recipe.yaml", **STUDY, "seeds": [0], "budgets": ["samples"], "rates": None}
    path = write_yaml(config.parent / "measured.yaml", {**few, "measures": measures})
    assert main(["study", *measures, "--config", str(path), "--run-dir", str(tmp_path)]) == 0
    study, results = read_study(path), Results(tmp_path / "results")
    for arm in study.arms:
        result = results.read(cell_at(study, Place(budget="samples", arm=arm, seed=0), results))
        points = result["measures"]["noise"]["found"]
        assert [(one["sigma"], one["relative"]) for one in points] == [(3.0, False), (1.0, True)]
        assert all(0 < one["cosine_distance"] < 1 for one in points)
        assert all(len(one["questions"]["questions"]["anls"]) == 12 for one in points)
        ((stage, perplexity),) = result["measures"]["forgetting"]["found"]  # the tiny LLM has no weights before
        assert stage == "all"
        assert 200 < perplexity < 320, "of 259 tokens, hardly trained"
        shown = result["measures"]["examples"]["found"]
        assert [(one["dataset"], one["question"]) for one in shown] == [("questions", "what?")] * 2
        read = result["measures"]["tokens"]["found"]
        assert read["pages"] == 3
        assert set(read["lenses"]) == {"embedding", "logit", *(["p_vocab"] if arm == "align" else [])}
        assert all(0 <= right <= over for right, over in read["lenses"].values())
        assert ("top" in read) is (arm == "align")
        assert 20 <= len(read["components"]["visual"]) <= 100
    vocabulary = results.read(cell_at(study, Place(budget="samples", arm="align", seed=0), results))["measures"][
        "tokens"
    ]
    assert 1 <= vocabulary["found"]["rows_of_mass"] <= vocabulary["found"]["rows"] == 259
    assert vocabulary["found"]["entropy"][0][0] == 0
    assert (tmp_path / "report" / "tokens-mlp-logit.png").is_file()
    with Image.open(tmp_path / "report" / "example-1.png") as page:
        assert page.size == (56, 56)
    trained = results.read(cell_at(study, Place(budget="samples", arm="align", seed=0), results))
    points = trained["measures"]["prune"]["found"]
    assert len(points) == 3 * 2
    assert [one["rows"] for one in points[:4]] == [259, 259, 100, 100]
    whole = points[0]
    assert (whole["rows"], whole["mass"], whole["steps"]) == (259, pytest.approx(1), 0)
    assert whole["questions"]["questions"]["anls"] == trained["questions"]["questions"]["anls"], "as tested before"
    assert points[2]["megabytes"] < whole["megabytes"] and 0.3 < points[2]["mass"] < 1
    assert points[4]["mass"] >= 0.5
    fewer, plain = trained["measures"]["collapse"]["found"]
    assert 0 < fewer["kept"] < 0.9
    assert plain["kept"] == 1 and plain["questions"]["questions"]["anls"] == whole["questions"]["questions"]["anls"]
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "### σ in standard deviations of the features" in text
    assert "one seed: intervals hold for it alone" in text
    assert "**Missing** (arm" not in text
    for name in ("## Rows of the vocabulary", "## Blanks left out", "## Forgetting of text"):
        assert name in text
    bad = write_yaml(config.parent / "noisier.yaml", {**few, "measures": {"noise": {"sigma": [1.0]}}})
    assert main(["study", "noise", "--config", str(bad), "--run-dir", str(tmp_path)]) == 1
    assert "measures.noise={'sigma': [1.0]}: expected lists of numbers" in capsys.readouterr().err


@pytest.mark.slow
def test_the_cost_of_every_arm(config, tmp_path, capsys):
    path = write_yaml(config.parent / "cost.yaml", {"recipe": "recipe.yaml", **STUDY, "cost": {"rounds": 1}})
    assert main(["study", "cost", "--config", str(path), "--run-dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results" / "cost.json").read_text("utf-8"))
    assert found["settings"] == {"tiles": 2, "new_tokens": 19, "rounds": 1}
    for arm, parameters in (("align", 19_334), ("mlp", 6_272)):
        one = found["arms"][arm]
        assert (one["parameters"], one["tokens_per_tile"]) == (parameters, 16)
        assert one["tokens_per_s"] == pytest.approx(19 / one["answer_s"], rel=1e-5)
        assert 0 < one["connector_s"] < one["answer_s"] and one["memory_gib"] > 0.1
    assert found["arms"]["align"]["tflops"] > found["arms"]["mlp"]["tflops"] > 0
    assert [path.name for path in tmp_path.iterdir()] != [], "no cell was trained"
    assert not list(tmp_path.glob("*/cell.json"))
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "0.161 s, 118.3, 10.9" in text


def test_a_measure_of_p_vocab_needs_an_arm_that_has_it(config, tmp_path, capsys):
    arms = {"mlp": {"connector.type": "mlp"}, "wide": {"connector.type": "mlp", "connector.layers": 1}}
    prune = {"counts": [3], "masses": [], "steps": [0], "pages": 1}
    study = {"recipe": "recipe.yaml", **STUDY, "arms": arms, "base": "mlp", "measures": {"prune": prune}}
    path = write_yaml(config.parent / "none.yaml", study)
    assert main(["study", "prune", "--config", str(path), "--run-dir", str(tmp_path)]) == 1
    assert (
        "measures.prune needs P_vocab, which no arm has: mlp (mlp), wide (mlp); add an arm" in capsys.readouterr().err
    )


def test_all_stages_of_a_recipe_get_their_own_length(config):
    from alignvlm_pl.cli.recipe import plan_runs
    from alignvlm_pl.study.plan import recipe_of_lengths

    content = yaml.safe_load((config.parent / "recipe.yaml").read_text("utf-8"))
    (entry,) = content["stages"]
    two = {**content, "stages": [entry, {**entry, "override": {"stage.lr_llm": 0.1}}]}
    recipe = write_yaml(config.parent / "two.yaml", two)
    elsewhere = write_yaml(config.parent.parent / "made.yaml", recipe_of_lengths(recipe, (7, 9)))
    first, second = (run.options for run in plan_runs(["--config", str(elsewhere)]))
    assert "--stage.max_steps=7" in first
    assert {"--stage.max_steps=9", "--stage.lr_llm=0.1"} <= set(second)
    assert str(config.parent / "stage.yaml") in first
