"""`preemption_every_n_steps`: signals are looked at after each n-th optimizer step only."""

from types import SimpleNamespace

import pytest
import torch

from alignvlm_pl.errors import ConfigError
from callbacks import preemption
from callbacks.preemption import Preemption


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4])])
def test_signals_are_looked_at_after_each_nth_step(monkeypatch, every, expected):
    monkeypatch.setattr(preemption, "received", lambda: None)
    callback, looked = Preemption(every), []
    trainer = SimpleNamespace(
        global_step=0, is_global_zero=True, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    callback.is_time_to_save = lambda: bool(looked.append(trainer.global_step))
    for step in (0, 1, 1, 2, 3, 4, 5):  # two micro batches of the first and of the second step
        trainer.global_step = step
        callback.on_train_batch_end(trainer)
    assert looked == expected


def test_an_interval_below_one_is_refused():
    with pytest.raises(ConfigError, match="preemption_every_n_steps=0: expected at least 1"):
        Preemption(0)
