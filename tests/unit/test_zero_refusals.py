"""What does not go with DeepSpeed's ZeRO is refused before training."""

from types import SimpleNamespace

import pytest

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.strategies import zero
from alignvlm_pl.strategies.zero import ZeroStrategy
from alignvlm_pl.training.checkpoint_metadata import CONTENTS
from alignvlm_pl.training.module import AlignVLMModule
from callbacks.gain_calibration import GainCalibration


def test_a_precision_with_a_loss_scale_is_refused():
    strategy = object.__new__(ZeroStrategy)
    strategy._precision_plugin = SimpleNamespace(precision="16-mixed")
    message = r"trainer\.precision=16-mixed does not go with ZeRO; use bf16-mixed"
    with pytest.raises(ConfigError, match=message), strategy.model_sharded_context():
        pass


def test_a_stage_that_there_is_not(monkeypatch):
    monkeypatch.setattr(zero, "require_deepspeed", lambda: None)
    with pytest.raises(ConfigError, match=r"trainer\.strategy: ZeRO stage 1: expected one of \(2, 3\)"):
        ZeroStrategy(stage=1)


def test_a_sharded_model_takes_no_checkpoint_with_adapters(tmp_path):
    module = AlignVLMModule(spec=tiny_spec(tmp_path))
    module.configure_model()
    contents = {"processor": module.contract, "stage": {"lora": {"llm": {"r": 2}}}}
    next(module.net.parameters()).ds_id = 0  # as ZeRO-3 marks it
    with pytest.raises(ConfigError, match="ckpt_path has adapters on llm, which a sharded model cannot take"):
        module.on_load_checkpoint({CONTENTS: contents})


def test_a_gain_that_zero_would_take_back_is_not_set(tmp_path):
    strategy = object.__new__(ZeroStrategy)  # its constructor needs the package deepspeed
    trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(ConfigError, match=r"stage\.calibrate: ZeRO trains copies of the weights"):
        GainCalibration(3.0).on_fit_start(trainer, AlignVLMModule(spec=tiny_spec(tmp_path)))
