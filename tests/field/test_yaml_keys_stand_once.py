"""A key that stands twice in a YAML file is refused, by every reader; PyYAML takes the last silently."""

import pytest

from alignvlm_pl.cli import main
from alignvlm_pl.utils.yaml_files import refuse_repeated_keys
from tests.integration.checkpoint_files import error_of


@pytest.mark.parametrize("option", ["stage", "data", "model", "trainer", "config"])
def test_a_file_of_an_option(world, tmp_path, capsys, option):
    path = tmp_path / "twice.yaml"
    path.write_text("a:\n  lr_llm: 1.0e-3\n  name: x\n  lr_llm: 5.0e-3\n")
    error = error_of(capsys, world.run("fit", "--run_dir", tmp_path / "run", f"--{option}", path))
    assert f"{path}: key 'lr_llm' is there twice, in lines 2 and 4; keep one" in error


def test_a_value_on_the_command_line(world, tmp_path, capsys):
    value = '--data.init_args.benchmarks={"a": "x", "a": "y"}'
    assert "key 'a' is there twice" in error_of(capsys, world.run("fit", "--run_dir", tmp_path / "run", value))


@pytest.mark.parametrize("command", [["params", "--config"], ["fit", "--config"]])
def test_a_recipe(tmp_path, capsys, command):
    (tmp_path / "recipe.yaml").write_text("stages: []\nmodel: a\nmodel: b\n")
    error = error_of(capsys, main([*command, str(tmp_path / "recipe.yaml")]))
    assert "key 'model' is there twice" in error


def test_the_saved_config_of_a_run(trained, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text() + "seed_everything: 1\n")
    error = error_of(capsys, main(["replay", "--run", str(tmp_path), "--step", "1"]))
    assert "config.yaml: key 'seed_everything' is there twice" in error


def test_aliases_are_looked_at_once():
    refuse_repeated_keys("a: &a {b: 1}\nc: *a\nd: &d [*d]\n")
