"""Noise on the vision features (the paper's table 3): what it costs in scores, and how far the outputs turn."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.utils.atomic_files import write_results
from alignvlm_pl.utils.collectives import gather

RESULT = "noise.json"


class FeatureNoise(pl.Callback):
    """Add Gaussian noise to the vision features before the connector, in `validate`, `test` and `predict`.

    At the end `noise.json` in the run folder has `cosine_distance`, the mean over visual tokens of 1 - cosine of the
    connector's outputs with and without the noise, and `tokens`, their number.

    Args:
        sigma: Standard deviation of the noise; 3 in the paper.
        relative: Whether `sigma` counts in standard deviations of a batch's features; if not, in their own units, as
            in the paper.
        seed: Seed of the noise, which is the same for equal batches.
    """

    def __init__(self, sigma: float, relative: bool = False, seed: int = 0) -> None:
        if not sigma >= 0:
            raise ConfigError(f"FeatureNoise sigma={sigma}: expected at least 0")
        self.sigma, self.relative, self.seed = sigma, relative, seed
        self.sums = [0.0, 0.0]  # of distances, and of tokens
        self._clean: tuple[Any, ...] | None = None
        self._handles: list[Any] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            raise ConfigError("FeatureNoise is for validate, test and predict; fit trains without it")

    def attach(self, connector: torch.nn.Module) -> None:
        """Disturb what a connector reads, until `detach`."""
        self.sums = [0.0, 0.0]
        self._generator = torch.Generator().manual_seed(self.seed)
        self._handles = [
            connector.register_forward_pre_hook(self._disturb),
            connector.register_forward_hook(self._compare, with_kwargs=True),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        self.attach(pl_module.net.connector)

    on_validation_start = on_predict_start = on_test_start

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.detach()
        distance, tokens = (sum(values) for values in zip(*gather(self.sums), strict=True))
        if trainer.is_global_zero:
            found = {"sigma": self.sigma, "relative": self.relative, "tokens": int(tokens)}
            path = Path(trainer.default_root_dir) / RESULT
            write_results(path, {**found, "cosine_distance": distance / tokens if tokens else None})

    on_validation_end = on_predict_end = on_test_end

    def _disturb(self, connector: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._clean is not None:  # the clean run of `_compare`
            return None
        features: Tensor = arguments[0]
        self._clean = arguments
        scale = self.sigma * (float(features.float().std()) if self.relative else 1.0)
        noise = torch.randn(features.shape, generator=self._generator).to(features)
        return (features + scale * noise, *arguments[1:])

    def _compare(self, connector: Any, arguments: Any, keywords: Any, output: Any) -> None:
        if self._clean is None or arguments[0] is self._clean[0]:
            return
        with torch.no_grad():
            clean = connector(*self._clean, **keywords).embeds
        self._clean = None
        distances = 1 - F.cosine_similarity(clean.float(), output.embeds.float(), dim=-1)
        self.sums[0] += float(distances.sum())
        self.sums[1] += distances.numel()
