"""Configs of earlier versions: old class paths are understood, or answered with what to use instead."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningDataModule

from alignvlm_pl.cli import main
from alignvlm_pl.cli.old_names import FILES, MODULES, OPTIONS, load
from alignvlm_pl.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
SAVED = """
model: {spec: {vision: {pretrained: none}, llm: {pretrained: none}}}
data: {class_path: datamodules.instructions.DocDownstreamDataModule, init_args: {train: [none]}}
stage: {name: old, lr_llm: 0.1}
trainer:
  accelerator: cpu
  devices: 1
  strategy: {class_path: alignvlm_pl.parallel.ShardedStrategy, init_args: {reshard_llm: false}}
"""


def test_a_saved_config_with_old_class_paths_is_read_by_the_new_ones(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(SAVED)
    with pytest.raises(SystemExit) as ended:
        main(["fit", f"--config={path}", "--print_config"])
    assert ended.value.code == 0
    read = yaml.safe_load(capsys.readouterr().out)
    assert read["trainer"]["strategy"]["class_path"] == "alignvlm_pl.strategies.fsdp.ShardedStrategy"
    assert read["trainer"]["strategy"]["init_args"]["reshard_llm"] is False
    assert read["data"]["class_path"] == "datamodules.docdownstream.DocDownstreamDataModule"


@pytest.mark.parametrize("module", ["zero", "strategies.zero"])
def test_a_saved_config_with_zero_is_answered_with_what_to_use(tmp_path, capsys, module):
    path = tmp_path / "config.yaml"
    path.write_text(SAVED.replace("parallel.ShardedStrategy", f"{module}.ZeroStrategy"))
    assert main(["fit", f"--config={path}", f"--run_dir={tmp_path / 'run'}"]) == 1
    assert f"alignvlm_pl.{module}.ZeroStrategy was removed; configs/cluster/fsdp.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        "--trainer.callbacks=[{class_path: callbacks.resumed_epoch.ResumedEpoch}]",
        "--trainer.callbacks+=callbacks.resumed_epoch.ResumedEpoch",
        "--trainer.callbacks+={class_path: callbacks.frozen_weights.FrozenWeights}",
    ],
)
def test_a_callback_that_is_gone_is_answered_with_what_to_do(tmp_path, capsys, option):
    path = tmp_path / "config.yaml"
    path.write_text(SAVED)
    assert main(["fit", f"--config={path}", f"--run_dir={tmp_path / 'run'}", option]) == 1
    assert re.search(r"callbacks\.\w+\.\w+ was removed; leave it out, ", capsys.readouterr().err)


@pytest.mark.parametrize("option", ["max_cache_bytes: 1000", "allow_pipe: true"])
def test_an_option_that_is_gone_is_answered_with_what_to_do(option):
    name = option.partition(":")[0]
    with pytest.raises(ConfigError, match=f"^{name} was removed: {OPTIONS[name][:20]}"):
        load(f"{{data: {{init_args: {{{option}}}}}}}")


def test_the_defaults_of_options_that_are_gone_are_dropped():
    text = "{data: {init_args: {train: [a], max_cache_bytes: null, allow_pipe: false}}}"
    assert load(text) == {"data": {"init_args": {"train": ["a"]}}}


def test_parts_of_a_saved_config_are_read_with_what_is_gone(tmp_path):
    """As `replay` and `export` build them."""
    from alignvlm_pl.cli.lightning_cli import build_parts

    settings = {"train": [str(tmp_path)], "max_cache_bytes": None, "allow_pipe": False}
    saved = {"data": {"class_path": "datamodules.documents.BigDocsDataModule", "init_args": settings}}
    assert build_parts(saved, source="config.yaml", data=LightningDataModule).data.train == [str(tmp_path)]


def test_an_option_of_the_command_line_that_is_gone_is_answered(capsys):
    words = ["fit", f"--config={CONFIGS / 'recipe/demo.yaml'}", "--data.init_args.allow_pipe=true"]
    assert main(words) == 1
    assert f": allow_pipe was removed: {OPTIONS['allow_pipe']}" in capsys.readouterr().err


def test_the_new_modules_exist_and_the_old_ones_do_not():
    for old, new in MODULES.items():
        assert import_module(new)
        with pytest.raises(ModuleNotFoundError):
            import_module(old)


def test_other_values_stay_as_they_are():
    text = Path(__file__).parents[2].joinpath("configs/recipe/demo.yaml").read_text()
    assert load(text) == yaml.safe_load(text)
    assert load("{class_path: mine.ZeroStrategy}") == {"class_path": "mine.ZeroStrategy"}
    with pytest.raises(ConfigError, match="was removed"):
        load("[{class_path: alignvlm_pl.zero.ZeroStrategy}]")


def test_a_stage_file_that_is_gone_is_answered_with_the_new_one(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("{stages: [{stage: ../stage/2-3b.yaml}]}")
    assert main(["fit", f"--config={path}"]) == 1
    said = capsys.readouterr().err
    assert "2-3b.yaml is now configs/stage/2.yaml, with the override of configs/recipe/llama3.2-3b.yaml" in said
    for name, answer in FILES.items():
        assert not list(CONFIGS.rglob(name))
        for word in answer.replace(",", "").split():
            assert "/" not in word or (CONFIGS.parent / word).is_file()
