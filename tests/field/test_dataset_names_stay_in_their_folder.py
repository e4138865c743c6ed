"""The name of a dataset never leaves the run folder, in no file that is named after it. No public report."""

import json

import pytest

from alignvlm_pl.scoring.records import file_name, page_path

NAMES = ["../../esc", "..", "/abs", "my set/α", "."]


def settings(world, names: list[str]) -> list[str]:
    return [f"--data.init_args.benchmarks={json.dumps({name: str(world.root / 'held') for name in names})}"]


def test_predictions_pages_and_results_stay_below_the_run(world, tmp_path):
    run = tmp_path / "deep/run"
    assert world.run("test", "--run_dir", run, *settings(world, NAMES), "--data.init_args.val=null") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run"]
    found = sorted(path.name for path in (run / "predictions").iterdir())
    assert found == sorted([*(f"{file_name(name)}.jsonl" for name in NAMES), "images"])
    assert {path.parent.parent for path in run.rglob("*.png")} == {run / "predictions/images"}
    assert all(json.dumps(name) in (run / "results.json").read_text() for name in NAMES)


def test_looks_of_fit_and_predictions_stay_there_too(world, tmp_path):
    for command in ("fit", "predict"):
        run = tmp_path / command / "run"
        options = ["--stage.max_steps=1", "--benchmark.subset=2", "--data.init_args.val=null"]
        assert world.run(command, "--run_dir", run, *settings(world, ["../../esc"]), *options) == 0
        assert [path.name for path in run.parent.iterdir()] == ["run"]
        assert list((run / "predictions").glob("..%2F..%2Fesc*.jsonl"))


def test_plain_names_keep_theirs():
    assert [file_name(name) for name in ("docvqa", "table-vqa_2.b")] == ["docvqa", "table-vqa_2.b"]


@pytest.mark.parametrize("name", [*NAMES, "", "a" * 500])
def test_a_page_is_two_levels_below_its_folder(tmp_path, name):
    path = page_path(tmp_path, name, name)
    assert path.resolve().parent.parent == tmp_path.resolve()
    path.parent.mkdir()
    path.touch()
