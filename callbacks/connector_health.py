"""Health of the connector while it trains: how sharp its weights are, how alike its outputs, and what it reads."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from alignvlm_pl.errors import require_at_least
from alignvlm_pl.models.token_readout import has_places, place_tokens, read_tokens
from alignvlm_pl.models.token_spread import TokenSpread, token_spread, visual_features
from alignvlm_pl.preprocessing.imaging import join_tiles
from alignvlm_pl.preprocessing.tiling import Tiling, count_tiles
from alignvlm_pl.scoring.readout_page import paint_readout
from alignvlm_pl.strategies.sharding import gathered_parts
from alignvlm_pl.training.module import AlignVLMModule

from .outputs import PAGE_PX, log_metrics
from .step import ends_step

log = logging.getLogger(__name__)


class ConnectorHealth(Callback):
    """Measure the connector on the current batch, when training starts and every n optimizer steps.

    `connector/entropy`: mean entropy of P_vocab in nats. `connector/effective_vocabulary`: e to the power of it.
    `connector/max_weight`: mean of each token's largest weight. `connector/token_cosine`: mean cosine between the
    outputs of two different visual tokens. Each rank measures its own batch and the means are over all their tokens;
    the cosine is between tokens of one rank. Connectors without P_vocab have the cosine only. A batch without images
    logs nothing; the measurement at the start then waits for the first that has some.

    TensorBoard gets the image `connector/page`: the first page of rank 0's batch with what P_vocab reads at each place
    (`alignvlm_pl.scoring.readout_page`); none of connectors without P_vocab.

    Args:
        every_n_steps: Interval in optimizer steps, at least 1; null: at the start only.
        tokens: Most visual tokens that a rank measures, evenly spaced over its batch; at least 2.
        page_every_n_steps: Interval of the page in optimizer steps, at least 1, beside one when training starts; null:
            no pages.
    """

    def __init__(
        self, every_n_steps: int | None = 100, tokens: int = 256, page_every_n_steps: int | None = 500
    ) -> None:
        where = "connector_health."
        intervals = {"every_n_steps": every_n_steps, "page_every_n_steps": page_every_n_steps}
        require_at_least(1, where, end=", or null", **intervals)
        require_at_least(2, where, end=", for there to be pairs", tokens=tokens)
        self.every_n_steps = every_n_steps
        self.tokens = tokens
        self.page_every_n_steps = page_every_n_steps
        self._started = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure once before the first step; the command line puts `GainCalibration` before this callback."""
        if self._started:
            return
        found = self._measure(trainer, pl_module, batch)
        self._started = bool(found)  # the same on all ranks
        if found and self.page_every_n_steps is not None:
            show_batch_page(trainer, pl_module, batch)
        if found and trainer.is_global_zero:
            listing = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items())
            log.info("connector before the first step: %s", listing)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not step or not ends_step(trainer, batch_idx):
            return
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            self._measure(trainer, pl_module, batch)
        if self.page_every_n_steps is not None and step % self.page_every_n_steps == 0:
            show_batch_page(trainer, pl_module, batch)

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> dict[str, float]:
        """Measure, log and return the metrics, the same on all ranks; empty for a batch without images."""
        assert isinstance(module, AlignVLMModule)
        net = module.net
        with undisturbed(trainer, module):
            features = visual_features(net, batch["pixel_values"], batch.get("tile_boxes"), limit=self.tokens)
            embeddings: Any = net.get_input_embeddings()
            own = token_spread(net.connector, features, embeddings.weight, limit=self.tokens)
        sums = torch.tensor(own, dtype=torch.float32, device=module.device)
        total = TokenSpread(*trainer.strategy.reduce(sums, reduce_op="sum").tolist())
        found = total.metrics(reads_text=net.connector.reads_text)
        log_metrics(trainer, {f"connector/{name}": value for name, value in found.items()})
        return found


def show_batch_page(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
    """Show TensorBoard the first page of rank 0's batch with what P_vocab reads on it; all ranks must call it."""
    assert isinstance(module, AlignVLMModule)
    net, tiling = module.net, module.processor.geometry
    writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if not writers or not has_places(net):
        return
    # Every rank reads a page of its own, or a tile of zeros: sharded ranks must run the same modules.
    size, tiles = _first_page(batch, tiling)
    pixels = batch["pixel_values"][tiles]
    boxes, thumbnails = (batch[name][tiles] if name in batch else None for name in ("tile_boxes", "thumbnails"))
    with undisturbed(trainer, module):
        readout = read_tokens(net, pixels, boxes, thumbnails)
    if size is None or not trainer.is_global_zero:
        return
    page = join_tiles(_to_uint8(pixels), size, tiling, longest=PAGE_PX)
    tokens = place_tokens(readout, net.config, module.processor.tokenizer, size=size, tiling=tiling)
    image = np.asarray(paint_readout(page, tokens, most=math.log(net.connector.rows), size=size))
    for writer in writers:
        writer.add_image("connector/page", image, trainer.global_step, dataformats="HWC")


def _first_page(batch: Any, tiling: Tiling) -> tuple[tuple[int, int] | None, slice]:
    """Return size (width, height) and tiles of the first page of a batch; None and no tiles where there is none."""
    start = 0
    for sizes, tiles in zip(batch.get("sizes", ()), batch.get("tiles", ()), strict=True):
        # A conversation may show images in another order than `sizes`, and an image twice.
        if sizes and all(size == sizes[0] for size in sizes):
            width, height = sizes[0]  # a list, where a DataLoader has converted the batch
            if tiles >= (count := count_tiles(width, height, tiling)):
                return (width, height), slice(start, start + count)
        start += tiles
    return None, slice(0)


def _to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """Return tiles as uint8, floating-point ones from [-1, 1]."""
    if pixels.is_floating_point():
        pixels = pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.cpu().numpy()


@contextmanager
def undisturbed(trainer: pl.Trainer, module: AlignVLMModule) -> Iterator[None]:
    """Run parts of the model between two steps: in `eval` mode, without gradients, in training's precision, unsharded.

    Changes of the parameters of a sharded model are lost afterwards.
    """
    with evaluating(trainer, module), gathered_parts(module.net):
        yield


@contextmanager
def evaluating(trainer: pl.Trainer, module: AlignVLMModule) -> Iterator[None]:
    """Run the model in `eval` mode, without gradients, in training's precision."""
    modes = [(part, part.training) for part in module.net.modules()]
    module.net.eval()
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            yield
    finally:
        for part, training in modes:
            part.training = training
