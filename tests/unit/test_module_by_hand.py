"""The module without the command line: mappings as in YAML, a missing stage, a Trainer that differs from the stage."""

from dataclasses import asdict

import lightning.pytorch as pl
import pytest
import torch

from alignvlm_pl.errors import CheckpointError, ConfigError
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.training.module import AlignVLMModule, differences_from_stage
from alignvlm_pl.training.stage import Stage


def test_the_spec_may_be_a_mapping(tmp_path):
    spec = tiny_spec(tmp_path)
    module = AlignVLMModule(asdict(spec))
    assert module.spec == spec
    assert module.processor.tokens_per_tile == 16


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_what_is_not_there_yet_is_named(tmp_path):
    module = AlignVLMModule(tiny_spec(tmp_path))
    with pytest.raises(ConfigError, match=r"not built yet: call configure_model\(\)"):
        module.net  # noqa: B018
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"fit needs a stage.*begin_stage\(Stage"):
        trainer.fit(module, train_dataloaders=[{}])


def test_values_of_the_stage_that_the_trainer_overrules_are_named():
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False)
    stage = Stage(name="hand", lr_connector=1e-3, max_steps=5, gradient_clip_norm=0.5)
    assert differences_from_stage(trainer, stage) == [
        "stage.gradient_clip_norm=0.5 has no effect: the Trainer has gradient_clip_val=None, which counts",
        "stage.max_steps=5 has no effect: the Trainer has max_steps=3, which counts",
    ]


def test_a_checkpoint_without_its_spec_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"old\.ckpt holds no spec of its model; give spec="):
        AlignVLMModule.load_from_checkpoint(tmp_path / "old.ckpt")
