"""A resume under other settings is refused or told, and Lightning's own ways to load and fit work or say how."""

import lightning.pytorch as pl
import pytest
import yaml

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.build import ModelSpec
from alignvlm_pl.training.module import AlignVLMModule
from datamodules import DocDownstreamDataModule
from tests.integration.checkpoint_files import LAST, error_of, unfinished_run


def test_a_stage_that_ends_before_its_checkpoint_is_refused(world, trained, tmp_path, capsys):
    run = unfinished_run(trained, tmp_path / "run")
    error = error_of(capsys, world.run("fit", "--run_dir", run, "--stage.max_steps=1"))
    assert "the checkpoint has 2 steps, the stage ends after 1: nothing is left to train" in error
    assert not (run / "hf").exists()


def test_another_precision_is_logged(world, trained, tmp_path, caplog):
    run = unfinished_run(trained, tmp_path / "run")
    world.fit(run, "--stage.max_steps=3", "--trainer.precision=bf16-mixed")
    assert "the stage was trained with trainer.precision=32-true and resumes with bf16-mixed" in caplog.text


def test_a_module_is_loaded_from_a_checkpoint_alone(trained):
    """Lightning-AI/pytorch-lightning#15427."""
    module = AlignVLMModule.load_from_checkpoint(trained / LAST)
    assert isinstance(module, AlignVLMModule)


def test_a_plain_trainer_says_that_a_stage_is_missing(world, tmp_path):
    """Lightning-AI/pytorch-lightning#16014."""
    spec = ModelSpec(**yaml.safe_load((world.root / "model.yaml").read_text())["spec"])
    data = DocDownstreamDataModule(train=[str(world.root / "train")], batch_size=2, num_workers=0)
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"fit needs a stage.*module\.begin_stage\(Stage\("):
        trainer.fit(AlignVLMModule(spec), data)
