"""When the connector is measured, and that measuring leaves the model as it was."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.training.module import AlignVLMModule
from callbacks.connector_health import ConnectorHealth, undisturbed


class Logger:
    def __init__(self):
        self.metrics = []

    def log_metrics(self, metrics, step):
        self.metrics.append((step, metrics))


@pytest.fixture
def trainer():
    return SimpleNamespace(
        strategy=SimpleNamespace(model=None, reduce=lambda value, reduce_op: value),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        accumulate_grad_batches=1,
        is_last_batch=False,
        num_training_batches=10,
        is_global_zero=True,
        global_step=0,
        loggers=[Logger()],
        lightning_module=SimpleNamespace(log_dict=lambda metrics, **options: None),
    )


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    module = AlignVLMModule(spec=tiny_spec(tmp_path_factory.mktemp("tokenizer")))
    module.configure_model()
    return module


def test_parts_go_back_to_the_modes_they_had_even_after_an_error(trainer, module):
    module.net.train()
    module.net.vision_tower.eval()
    before = [part.training for part in module.net.modules()]

    def fail():
        with undisturbed(trainer, module):
            assert not any(part.training for part in module.net.modules())
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail()
    assert [part.training for part in module.net.modules()] == before
    assert len(set(before)) == 2


def test_it_measures_the_first_batch_with_an_image_and_every_n_steps(trainer, module):
    callback = ConnectorHealth(every_n_steps=2, tokens=20)
    text, image = ({"pixel_values": torch.rand(count, 3, 56, 56)} for count in (0, 3))
    states = [torch.get_rng_state(), {n: v.clone() for n, v in module.net.state_dict().items()}]
    for step, batch in enumerate([text, image, image, image, text]):
        callback.on_train_batch_start(trainer, module, batch, step)
        trainer.global_step = step + 1
        callback.on_train_batch_end(trainer, module, None, batch, step)
    # Before the second step, as the first batch had none; after steps 2 and 4. The fifth is not due.
    assert [step for step, _ in trainer.loggers[0].metrics] == [1, 2, 4]
    assert {name for _, metrics in trainer.loggers[0].metrics for name in metrics} == {
        "connector/entropy",
        "connector/effective_vocabulary",
        "connector/max_weight",
        "connector/token_cosine",
    }
    assert torch.equal(torch.get_rng_state(), states[0]), "training continues with the random numbers it would have had"
    assert all(torch.equal(value, states[1][name]) for name, value in module.net.state_dict().items())
    assert all(p.grad is None for p in module.net.parameters())


def test_accumulated_micro_batches_are_measured_once_a_step(trainer, module):
    callback = ConnectorHealth(every_n_steps=1)
    trainer.global_step, trainer.accumulate_grad_batches = 3, 2
    callback.on_train_batch_end(trainer, module, None, {"pixel_values": torch.rand(1, 3, 56, 56)}, 0)
    assert trainer.loggers[0].metrics == []


def test_running_statistics_do_not_move(trainer, module):
    norm = nn.BatchNorm1d(4).train()
    module.net.add_module("probe", norm)
    try:
        with undisturbed(trainer, module):
            norm(torch.randn(8, 4))
        assert torch.equal(norm.running_mean, torch.zeros(4))
    finally:
        del module.net.probe
