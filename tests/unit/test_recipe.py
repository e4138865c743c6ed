"""A recipe with several stages becomes one fit for each."""

from pathlib import Path

import pytest
import yaml

from alignvlm_pl.cli.recipe import plan_runs, read_stages
from alignvlm_pl.errors import ConfigError

STAGES = [
    {"stage": "stage/one.yaml", "data": "data/a.yaml"},
    {"stage": "stage/two.yaml", "data": "data/b.yaml", "benchmark": "quick.yaml"},
]


def recipe(folder: Path, stages: object = STAGES) -> Path:
    path = folder / "paper.yaml"
    path.write_text(yaml.safe_dump({"model": "model.yaml", "stages": stages}))
    return path


def value(options: list[str], name: str) -> str:
    """The last value given to an option."""
    return options[len(options) - 1 - options[::-1].index(name) + 1]


def test_options_without_a_recipe_are_one_run_as_they_are(tmp_path):
    (tmp_path / "base.yaml").write_text("seed_everything: 1\n")
    options = ["--config", str(tmp_path / "base.yaml"), "--run_dir", "x"]
    (run,) = plan_runs(options)
    assert run.options == options
    assert run.folder is None


@pytest.mark.parametrize("form", ["--config {}", "-c {}", "--config={}"])
def test_each_stage_is_a_run_that_starts_from_its_parent(tmp_path, form):
    options = form.format(recipe(tmp_path)).split(" ")
    first, second = plan_runs([*options, "--run_dir", str(tmp_path / "run")])
    assert first.folder == tmp_path / "run" / "1-one"
    assert second.folder == tmp_path / "run" / "2-two"
    assert value(first.options, "--stage") == str(tmp_path / "stage/one.yaml")
    assert value(second.options, "--data") == str(tmp_path / "data/b.yaml")
    assert value(second.options, "--benchmark") == str(tmp_path / "quick.yaml")
    assert "--stage.init_from" not in first.options
    assert value(second.options, "--stage.init_from") == str(first.folder / "hf")
    for run in (first, second):
        assert value(run.options, "--run_dir") == str(run.folder)
        # Else the saved config of a stage would be a recipe itself.
        assert run.options[-1] == "--stages=null"


@pytest.mark.parametrize("before", [[], ["--run_dir", "elsewhere"], ["--run_dir=elsewhere"]])
def test_options_behind_the_recipe_win_and_those_before_it_do_not(tmp_path, before):
    path = recipe(tmp_path)
    options = ["--stage.epochs=1", *before, "--config", str(path), "--stage.max_steps", "20"]
    for run in plan_runs(options):
        words = run.options
        assert words.index("--stage.epochs=1") < words.index("--config") < words.index("--stage")
        assert words.index("--stage") < words.index("--stage.max_steps")
        assert run.folder.parent == Path("elsewhere" if before else "runs/paper")
        assert sum(word.startswith("--run_dir") for word in words) == 1


@pytest.mark.parametrize("form", [["--stage.init_from", "elsewhere/hf"], ["--stage.init_from=elsewhere/hf"]])
def test_a_start_given_by_the_user_is_the_first_stages_alone(tmp_path, form):
    first, second = plan_runs(["--config", str(recipe(tmp_path)), *form, "--run_dir", str(tmp_path / "run")])
    starts = [
        [f"{word}={following}" for word, following in zip(run.options, [*run.options[1:], ""], strict=True)]
        for run in (first, second)
    ]
    last = [[w.split("=")[1] for w in words if w.startswith("--stage.init_from")][-1] for words in starts]
    assert last == ["elsewhere/hf", str(first.folder / "hf")]


def test_read_stages_gives_absolute_paths(tmp_path):
    assert read_stages(recipe(tmp_path))[0].files["stage"] == tmp_path / "stage/one.yaml"
    assert read_stages(recipe(tmp_path, None)) == []


def test_overrides_win_over_the_files_and_lose_to_later_options(tmp_path):
    (tmp_path / "one.yaml").write_text("{name: one, max_steps: 3, lr_llm: 1.0}")
    override = {"stage.max_steps": 4, "stage.lr_llm": None, "stage.schedule": "linear", "trainer.devices": 2}
    path = recipe(tmp_path, [{"stage": "one.yaml", "override": override}])
    (run,) = plan_runs(["--config", str(path), "--stage.max_steps=5"])
    given = ["--stage.max_steps=4", "--stage.lr_llm=null", "--stage.schedule=linear", "--trainer.devices=2"]
    start = run.options.index("--stage")
    assert sorted(run.options[start + 2 : start + 6]) == sorted(given)
    assert run.options[start + 6] == "--stage.max_steps=5"
    (entry,) = read_stages(path)
    assert entry.settings("stage") == {"name": "one", "max_steps": 4, "lr_llm": None, "schedule": "linear"}


def test_stage_files_named_by_numbers_name_the_folders(tmp_path):
    stages = [{"stage": f"stage/{number}.yaml"} for number in (1, 2)]
    for chosen, names in ((stages, ["1", "2"]), (stages[1:], ["2"]), (stages[:1] * 2, ["1-1", "2-1"])):
        runs = plan_runs(["--config", str(recipe(tmp_path, chosen))])
        assert [run.folder.name for run in runs] == names


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["stage/one.yaml"], "each entry of `stages` needs a `stage:` file, found 'stage/one.yaml'"),
        ([{"data": "a.yaml"}], "needs a `stage:` file"),
        (
            [{"stage": "a.yaml", "benchmrk": "b.yaml"}],
            "unknown key 'benchmrk' in `stages`; did you mean 'benchmark'",
        ),
        ("stage/one.yaml", "`stages` must be a list"),
        ([{"stage": {"name": "x"}}], "stage must be the path of a file"),
        ([{"stage": "a.yaml", "override": {"max_steps": 3}}], "override must map dotted keys to values"),
        ([{"stage": "a.yaml", "override": ["stage.max_steps=3"]}], "override must map dotted keys to values"),
    ],
)
def test_another_form_of_stages_is_refused(tmp_path, stages, message):
    path = recipe(tmp_path, stages)
    for read in (lambda: plan_runs(["--config", str(path)]), lambda: read_stages(path)):
        with pytest.raises(ConfigError, match=message):
            read()


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--config none.yaml: there is no such file"):
        plan_runs(["--config", "none.yaml"])
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ConfigError, match=r"broken.yaml is no valid YAML: .*line 2"):
        plan_runs([f"--config={tmp_path / 'broken.yaml'}"])


def test_print_config_of_a_recipe_shows_all_its_stages(capsys):
    from alignvlm_pl.cli import main

    path = Path(__file__).parents[2] / "configs/recipe/demo.yaml"
    assert main(["fit", "--config", str(path), "--stage.max_steps", "7", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert [doc["stage"]["name"] for doc in yaml.safe_load_all(printed)] == ["read", "documents", "instruct"]
    assert {doc["stage"]["max_steps"] for doc in yaml.safe_load_all(printed)} == {7}
    assert "--- # stage 3 of 3, in runs/demo/3-instruct" in printed
