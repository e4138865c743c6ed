"""What does not go with DeepSpeed's ZeRO is refused before training."""

from types import SimpleNamespace

import pytest

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.module import AlignVLMModule
from alignvlm_pl.zero import ZeroStrategy
from callbacks.gain_calibration import GainCalibration


def test_a_gain_that_zero_would_take_back_is_not_set(tmp_path):
    strategy = object.__new__(ZeroStrategy)  # its constructor needs the package deepspeed
    trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(ConfigError, match=r"stage\.calibrate: ZeRO trains copies of the weights"):
        GainCalibration(3.0).on_fit_start(trainer, AlignVLMModule(spec=tiny_spec(tmp_path)))
