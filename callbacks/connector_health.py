"""Health of the connector while it trains: how sharp its weights are, and how alike its outputs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.token_spread import TokenSpread, token_spread, visual_features
from alignvlm_pl.strategies.sharding import gathered_parts
from alignvlm_pl.training.module import AlignVLMModule

from .outputs import log_metrics
from .step import ends_step

log = logging.getLogger(__name__)


class ConnectorHealth(Callback):
    """Measure the connector on the current batch, when training starts and every n optimizer steps.

    `connector/entropy`: mean entropy of P_vocab in nats. `connector/effective_vocabulary`: e to the power of it.
    `connector/max_weight`: mean of each token's largest weight. `connector/token_cosine`: mean cosine between the
    outputs of two different visual tokens. Each rank measures its own batch and the means are over all their tokens;
    the cosine is between tokens of one rank. Connectors without P_vocab have the cosine only. A batch without images
    logs nothing; the measurement at the start then waits for the first that has some.

    Args:
        every_n_steps: Interval in optimizer steps, at least 1; null: at the start only.
        tokens: Most visual tokens that a rank measures, evenly spaced over its batch; at least 2.
    """

    def __init__(self, every_n_steps: int | None = 100, tokens: int = 256) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"connector_health.every_n_steps={every_n_steps}: expected at least 1, or null")
        if tokens < 2:
            raise ConfigError(f"connector_health.tokens={tokens}: expected at least 2, for there to be pairs")
        self.every_n_steps = every_n_steps
        self.tokens = tokens
        self._started = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure once before the first step; the command line puts `GainCalibration` before this callback."""
        if self._started:
            return
        found = self._measure(trainer, pl_module, batch)
        self._started = bool(found)  # the same on all ranks
        if found and trainer.is_global_zero:
            listing = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items())
            log.info("connector before the first step: %s", listing)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps is None or not step or step % self.every_n_steps:
            return
        if ends_step(trainer, batch_idx):
            self._measure(trainer, pl_module, batch)

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
