"""config.yaml is in the run folder under every logger (pytorch-lightning#5562, #14739)."""

import json

import pytest
import yaml

LOGGERS = "lightning.pytorch.loggers."


@pytest.mark.parametrize("name", ["CSVLogger", "TensorBoardLogger", None])
def test_the_configuration_is_in_the_run_folder_whatever_the_logger(world, tmp_path, name):
    logger = {"class_path": LOGGERS + name, "init_args": {"save_dir": str(tmp_path / "logs")}} if name else False
    world.fit(tmp_path / "run", f"--trainer.logger={json.dumps(logger)}", "--stage.max_steps=1")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["stage"]["max_steps"] == 1
