"""When the connector is measured, and that measuring leaves the model as it was."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw
from torch import nn

from alignvlm_pl.models.pixels import normalise_tensor
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.training.module import AlignVLMModule
from callbacks.connector_health import ConnectorHealth, show_batch_page, undisturbed


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


def shown_pages(folder):
    """Return the steps of TensorBoard's pages, and their encoded bytes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["images"]
    found = events.Images(tags[0]) if tags == ["connector/page"] else []
    return [event.step for event in found], [event.encoded_image_string for event in found]


def test_the_page_is_the_first_image_whose_tiles_are_known(trainer, module, tmp_path):
    pages = [Image.new("RGB", size, "white") for size in ((50, 56), (112, 60), (56, 112))]
    for page in pages:
        ImageDraw.Draw(page).text((4, 4), "Total 12", fill="black")

    def sample(*images):
        content = [
            *({"type": "image", "index": index} for index, _ in enumerate(images)),
            {"type": "text", "text": "?"},
        ]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "."}]},
        ]
        return module.processor.encode(messages, images), [image.size for image in images]

    # A conversation without an image, one that may show its images in another order, and the one that is shown.
    samples = [sample(), sample(pages[0], pages[2]), sample(pages[1])]
    batch = {
        **module.processor.collate([encoded for encoded, _ in samples]),
        "sizes": [sizes for _, sizes in samples],
        "tiles": [encoded.num_tiles for encoded, _ in samples],
    }
    alone, sizes = sample(pages[1])
    single = {
        **module.processor.collate([alone]),
        "sizes": [[list(size) for size in sizes]],
        "tiles": [alone.num_tiles],
    }
    floating = {**single, "pixel_values": normalise_tensor(single["pixel_values"], single["tile_boxes"])}
    text = {"pixel_values": torch.zeros(0, 3, 56, 56), "sizes": [[]], "tiles": [0]}
    trainer.loggers.append(TensorBoardLogger(tmp_path, name="", version=""))
    for step, given in enumerate([batch, single, text, floating]):
        trainer.global_step = step
        show_batch_page(trainer, module, given)
    trainer.loggers[1].experiment.close()
    steps, images = shown_pages(tmp_path)
    assert steps == [0, 1, 3]
    assert images[0] == images[1] == images[2]


def test_pages_are_shown_at_the_start_and_every_n_steps(trainer, module, monkeypatch):
    shown = []
    monkeypatch.setattr("callbacks.connector_health.show_batch_page", lambda *_: shown.append(trainer.global_step))
    image = {"pixel_values": torch.rand(1, 3, 56, 56)}
    for every in (2, None):
        callback = ConnectorHealth(every_n_steps=None, page_every_n_steps=every)
        for step in range(5):
            trainer.global_step = step
            callback.on_train_batch_start(trainer, module, image, step)
            trainer.global_step = step + 1
            callback.on_train_batch_end(trainer, module, None, image, step)
    assert shown == [0, 2, 4]


def test_running_statistics_do_not_move(trainer, module):
    norm = nn.BatchNorm1d(4).train()
    module.net.add_module("probe", norm)
    try:
        with undisturbed(trainer, module):
            norm(torch.randn(8, 4))
        assert torch.equal(norm.running_mean, torch.zeros(4))
    finally:
        del module.net.probe
