"""`stage.calibrate`: the vocabulary norm's gain from a target entropy, set on the first batch of a fresh stage."""

import logging
import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.modeling import AlignVLMForConditionalGeneration
from alignvlm_pl.models.token_spread import gain_factor, mean_entropy, visual_features, vocabulary_scores
from alignvlm_pl.ops import full_weight
from alignvlm_pl.training.module import AlignVLMModule

from .connector_health import undisturbed
from .data_health import sum_counts
from .step import on_one_rank

log = logging.getLogger(__name__)
TOKENS = 512  # Most visual tokens that are measured, evenly spaced over the batch


class GainCalibration(Callback):
    """Multiply the vocabulary norm's gain so that P_vocab has a mean entropy of `target_entropy` nats.

    The batch is the first with images, on the first rank that has one; its factor is applied on all. A resumed stage
    keeps its gain. `module.calibration` has the result for the stage's record.
    """

    def __init__(self, target_entropy: float) -> None:
        self.target = target_entropy

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        self.check(pl_module.net)

    def check(self, net: AlignVLMForConditionalGeneration) -> None:
        """Raise a ConfigError for a target that no gain can reach; `net` may be on the meta device."""
        if not net.connector.reads_text:
            raise ConfigError(
                f"stage.calibrate: connector {net.config.connector['type']!r} has no P_vocab with an entropy to set; "
                "use connector type 'align', or leave calibrate out"
            )
        most = math.log(net.connector.rows)
        if not self.target < most:
            raise ConfigError(
                f"stage.calibrate.target_entropy={self.target:g} nats: weights over {net.connector.rows} rows have an "
                f"entropy between 0 and {most:.3f} nats; choose a target between them"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        if pl_module.calibration is not None or trainer.ckpt_path is not None:
            return
        connector = pl_module.net.connector
        with undisturbed(trainer, pl_module):
            features = visual_features(pl_module.net, batch["pixel_values"], batch.get("tile_boxes"), limit=TOKENS)
            having = sum_counts({str(trainer.global_rank): len(features)})
            ranks = [int(rank) for rank, tiles in having.items() if tiles]
            if not ranks:
                return  # text alone on all ranks; the next batch may have images
            found = on_one_rank(trainer, lambda: self._search(connector, features), min(ranks))
        # Behind the block a sharded model has its own rows again, not a copy of all.
        connector.norm2.weight.data.mul_(found["gain_factor"])
        found["gain"] = round(float(full_weight(connector.norm2.weight.detach()).mean()), 6)
        pl_module.calibration = found
        if trainer.is_global_zero:
            log.info(
                "calibrated: gain x %.4g = %.4g, mean entropy of P_vocab %.3f -> %.3f nats over %d visual tokens",
                *(found[name] for name in ("gain_factor", "gain", "entropy_before", "entropy", "tokens")),
            )

    def _search(self, connector: Any, features: Any) -> dict[str, float]:
        scores = vocabulary_scores(connector, features, limit=TOKENS)
        factor, entropy = gain_factor(scores, connector.norm2.bias, target=self.target)
        return {
            "target_entropy": self.target,
            "tokens": len(scores),
            "entropy_before": round(mean_entropy(scores), 6),
            "entropy": round(entropy, 6),
            "gain_factor": factor,
        }
