"""The LightningModule: steps, token-normalised loss, optimizers, generation."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import CheckpointError, ConfigError, require_known
from ..models.build import ModelSpec, build_config, build_model, build_processor, load_weights
from ..models.connectors import connector_class
from ..models.loading import choose_attention, weights_folder
from ..models.losses import TokenLoss
from ..models.modeling import AlignVLMForConditionalGeneration
from ..models.page_readout import PageReadout
from ..models.patch_alignment import PatchAlignment
from ..models.processing import AlignVLMProcessor
from ..ops.linear_cross_entropy import check_loss_backend
from ..preprocessing.batch import Batch, StepSummary
from ..preprocessing.chat import IGNORE_INDEX
from ..strategies.fsdp import ShardedStrategy, refuse_unknown
from ..strategies.meta_init import build_on_meta, load_parts
from ..strategies.sharded_checkpoint import load_file
from ..strategies.sharding import is_sharded, no_grad
from ..utils.collectives import sum_over_ranks
from ..utils.cpu import keep_freed_memory
from .acceleration import (
    CHECKPOINTED,
    check_parts,
    checkpoint_activations,
    choose_matmul_precision,
    compile_parts,
    skip_constant_buffers,
)
from .checkpoint_metadata import CONTENTS, check_collapse, check_contract, check_stage, contract
from .export import check_given, compare_states, recorded_steps
from .finite import FiniteCheck, poisoned, require_finite
from .lora import attach_adapters
from .lora_config import parse_adapters
from .memory import choose_checkpointing
from .optim import (
    build_optimizer,
    clip_gradient_values,
    clip_gradients,
    freeze,
    gradient_norms,
    parameter_groups,
    set_modes,
    step_schedule,
)
from .stage import PARTS, Stage

SPEC = "spec"  # Key of a checkpoint: the fields of the model's `ModelSpec`
_TRAINING_PRECISIONS = ("None", "32", "32-true", "bf16", "bf16-mixed", "64", "64-true")
"""As the Trainer takes them; None is its default, 32-true."""
_WEIGHT_PRECISIONS = ("bf16-true", "16-true")  # Precisions that weights are cast to
MODEL_KEYS = ("input_ids", "attention_mask", "pixel_values", "num_tiles")
_OF_LOADING = ("map_location", "hparams_file", "strict", "weights_only")
"""Arguments of Lightning's `load_from_checkpoint` beside the path."""
LOSS_KEYS = ("segment_ids", "visual_positions", "supervised_positions", "document_bounds", "longest_document")


class AlignVLMModule(pl.LightningModule):
    """Train and run an AlignVLM.

    Args:
        spec: Vision encoder, LLM, connector, tiling; a `ModelSpec`, or a mapping of its fields.
        weights: Folder of a saved AlignVLM to start from (as written at the end of a stage), or `box:NAME`; null: the
            pretrained parts of `spec`. A stage's `init_from` takes precedence.
        attention: Attention of the LLM during `fit`: `eager`, `sdpa`, `flash_attention_2`, or another of transformers;
            null: its choice. `validate`, `test` and `predict` always take that choice, as whoever
            loads the folder does.
        loss_backend: How supervised positions meet the LM head: `auto`, `chunked`, `liger` or `plain`
            (`alignvlm_pl.ops.linear_cross_entropy.head_losses`).
        activation_checkpointing: Parts (`vision`, `llm`) whose layers run again in backward instead of keeping what
            they computed; null: none. `auto`: on a GPU as few as let the stage's largest micro batch fit
            (`alignvlm_pl.training.memory`).
        compile: Parts (`vision`, `connector`, `llm`) that `torch.compile` compiles; null: none.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: str | None = None,
        attention: str | None = None,
        loss_backend: str = "auto",
        activation_checkpointing: list[str] | Literal["auto"] | None = "auto",
        compile: list[str] | None = None,
    ) -> None:
        super().__init__()
        spec = ModelSpec.from_fields(spec)
        check_loss_backend(loss_backend)
        given = None if activation_checkpointing == "auto" else activation_checkpointing
        self.checkpointed = check_parts("activation_checkpointing", given, CHECKPOINTED)
        self._chooses_checkpointing = activation_checkpointing == "auto"
        self.compiled = check_parts("compile", compile, tuple(PARTS))
        self.spec = spec
        self.weights = weights
        self.attention = attention
        self.loss_backend = loss_backend
        self.model: AlignVLMForConditionalGeneration | None = None  # built in configure_model
        self.stage: Stage | None = None
        self._normaliser = torch.ones(())  # of the optimizer step that is under way
        self._step_sums: dict[str, Tensor] = {}
        self._gradient_norm = torch.zeros(())  # of the newest optimizer step, before clipping
        self._finite = FiniteCheck()
        self._started = time.monotonic()
        self._earlier_seconds = 0.0
        self.calibration: dict[str, float] | None = None  # of callbacks.GainCalibration, for checkpoints
        self.loaded_steps = 0  # optimizer steps that the loaded weights have had in their stage

    @cached_property
    def processor(self) -> AlignVLMProcessor:
        """Processor of the model, which DataModules use, too."""
        return build_processor(self.spec)

    @cached_property
    def readout(self) -> PageReadout:
        return PageReadout(self.processor)

    @cached_property
    def patches(self) -> PatchAlignment:
        return PatchAlignment(self.processor)

    @cached_property
    def contract(self) -> dict[str, Any]:
        """What this model's weights are trained with and must be used with."""
        return contract(self.spec, self.processor)

    @property
    def net(self) -> AlignVLMForConditionalGeneration:
        """The model; raises a ConfigError before `configure_model`."""
        if self.model is None:
            raise ConfigError("the model is not built yet: call configure_model(), as a Trainer does")
        return self.model

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # the file holds the spec, so no argument is needed
        cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any
    ) -> "AlignVLMModule":
        """Build the module that a checkpoint file was saved from, and load its weights.

        Args:
            checkpoint_path: A checkpoint file; of a run under FSDP2, which writes folders, use its export.
            *args: As Lightning's, `map_location` first.
            **kwargs: As Lightning's; also arguments of this class, which replace those of the checkpoint.

        Raises:
            CheckpointError: The file is missing or damaged, or does not hold the model's spec.
            ConfigError: It is given as anything but a path, or an argument is unknown.
        """
        known = [*signature(cls.__init__).parameters, *_OF_LOADING][1:]
        for name in kwargs:
            require_known(name, known, f"load_from_checkpoint: unknown argument {name!r}")
        if not isinstance(checkpoint_path, (str, os.PathLike)) or "://" in str(checkpoint_path):
            found = checkpoint_path if isinstance(checkpoint_path, str) else type(checkpoint_path).__name__
            raise ConfigError(f"load_from_checkpoint: {found[:120]!r} is no path; give that of a file on this machine")
        content = load_file(Path(checkpoint_path), weights_only=kwargs.get("weights_only") is not False)
        if "spec" not in kwargs and SPEC not in content:
            raise CheckpointError(f"checkpoint {checkpoint_path} holds no spec of its model; give spec=…")
        kwargs["spec"] = ModelSpec.from_fields(kwargs["spec"] if "spec" in kwargs else content[SPEC])
        kwargs.setdefault("weights_only", True)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def begin_stage(self, stage: Stage) -> "AlignVLMModule":
        """Set what `fit` trains, before it is called. Numbers of steps, accumulation and clipping are the Trainer's."""
        self.stage = stage
        return self

    def configure_model(self) -> None:
        """Build the model once, load the stage's start, freeze what it does not train, and shard it if it is to be.

        Raises a ConfigError for an unsupported strategy, a CheckpointError for weights that are not the model's.
        """
        if self.model is not None:
            return
        start = (self.stage.init_from if self.stage else None) or self.weights
        folder = weights_folder(start)
        if folder is not None and start == self.weights:
            check_given(folder, self.contract)
        self.loaded_steps = recorded_steps(folder) if folder and self.stage is None else 0
        strategy = None
        if (trainer := self._attached_trainer()) is not None:
            strategy = trainer.strategy
            refuse_unknown(strategy)
            if self.stage is not None and self._chooses_checkpointing:
                config = build_config(self.spec, image_token_id=self.processor.image_token_id)
                self.checkpointed = choose_checkpointing(trainer, config, self.stage)
        if isinstance(strategy, ShardedStrategy):
            if self.stage is not None and self.stage.adapters:
                raise ConfigError(
                    f"stage.lora: adapters cannot be trained under {type(strategy).__name__}, which loads weights "
                    "after the model is sharded; use trainer.strategy: ddp, or stage.lora: null"
                )
            model = self.model = build_on_meta(self.spec, self.processor, whole=folder is not None)
            self._prepare(model)
            strategy.shard(model, lambda: load_parts(model, self.spec, folder))
            return
        self.model = build_model(self.spec, self.processor, pretrained=folder is None)
        if folder is not None:
            load_weights(self.model, folder)
        self._prepare(self.model)

    def _prepare(self, model: AlignVLMForConditionalGeneration) -> None:
        model.loss_backend = self.loss_backend
        if self.stage is not None:
            freeze(model, self.stage)
            attach_adapters(model, self.stage.adapters)
        checkpoint_activations(model, self.checkpointed)
        compile_parts(model, self.compiled)

    def setup(self, stage: str) -> None:
        """Raise a ConfigError where there is no stage, or the precision cannot train, before any weights are loaded."""
        check_precision(str(self.trainer.precision), fit=stage == "fit")
        if stage == "fit":
            check_objective(self.current_stage, self.spec.connector)

    def to(self, *args: Any, **kwargs: Any) -> "AlignVLMModule":
        """As torch, but floating-point buffers keep their precision, as transformers has it.

        Rotary frequencies in bfloat16 would be another model: 0.3 % off, several radians at position 7,000.
        """
        exact = [(name, buffer) for name, buffer in self.named_buffers() if buffer.is_floating_point()]
        super().to(*args, **kwargs)
        for name, buffer in exact:
            owner, _, own = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, own, buffer.to(getattr(module, own).device))
        return self

    def on_fit_start(self) -> None:
        """Choose the LLM's attention and the allocator's habits, check the weights, and start the stage's clock."""
        if self.attention is not None:
            choose_attention(self.net.language_model, self.attention)
        if self.device.type == "cpu":
            keep_freed_memory()
        choose_matmul_precision(self.device.type, str(self.trainer.precision))
        if isinstance(wrapped := self.trainer.strategy.model, DistributedDataParallel):
            skip_constant_buffers(wrapped)
        self._require_finite_weights()
        for difference in differences_from_stage(self.trainer, self.current_stage):
            rank_zero_info(difference)
        self._started = time.monotonic()

    def _attached_trainer(self) -> pl.Trainer | None:
        try:
            return self.trainer
        except RuntimeError:  # Lightning's property raises where there is none
            return None

    @property
    def current_stage(self) -> Stage:
        """The stage that is trained; raises a ConfigError where there is none."""
        if self.stage is None:
            raise ConfigError(
                "fit needs a stage, which says what is trained: call module.begin_stage(Stage(name=…, lr_connector=…))"
            )
        return self.stage

    def on_train_start(self) -> None:
        """Put frozen towers in eval mode; a run that resumes inside an epoch has no `on_train_epoch_start`."""
        set_modes(self.net, self.current_stage)

    on_train_epoch_start = on_train_start

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of a micro batch: its sum over supervised tokens, divided by those of the optimizer step.

        Beside `loss` without gradient the sum of the micro batch, `loss_sum`, and of each document `document_loss_sums`
        and `document_supervised`, its tokens (`read`: characters, `patch`: visual ones). Where the connector collapses
        blanks, also `kept_tokens` (tiles,), the visual tokens of each tile that the LLM ran on.
        """
        normaliser = self._step_normaliser(batch, batch_idx)
        loss, sums = self.batch_loss(batch)
        self._finite.add_batch(batch.get("keys", ()), loss.document_sums.detach())
        if self._logs_this_step:
            for tag, pair in sums.items():
                self._step_sums[tag] = self._step_sums.get(tag, 0) + torch.stack(pair).detach()
        return {
            "loss": poisoned(loss.total) / normaliser,
            "loss_sum": loss.total.detach(),
            "document_loss_sums": loss.document_sums.detach(),
            "document_supervised": loss.document_supervised.detach(),
            **({} if loss.kept_tokens is None else {"kept_tokens": loss.kept_tokens}),
        }

    def _step_normaliser(self, batch: Batch, batch_idx: int) -> Tensor:
        """Number that the micro batch's loss sum is divided by: supervised tokens of its step, over what averages.

        Lightning divides the loss by the accumulation, and the strategy averages gradients over ranks. A custom
        DataLoader that hands over less than a step at a time (`preprocessing.batch.with_steps`) gets the mean of the
        means of that.
        """
        step: Sequence[StepSummary | Batch] | None = batch.get("step", [batch])
        if step is not None:
            accumulated = self.trainer.accumulate_grad_batches
            left = self.trainer.num_training_batches - batch_idx  # an epoch may end within a step
            whole = batch_idx % accumulated == 0 and len(step) >= min(accumulated, left)
            count = sum(map(self._num_supervised, step[: int(min(left, len(step)))]))
            # Neither waits for the device, as a copy from the host and Lightning's `reduce`, with its barrier, would.
            total = sum_over_ranks(torch.full((), float(count), device=self.device), self.trainer.world_size)
            averaged = accumulated if whole else len(step)
            self._normaliser = total.clamp(min=1) / (averaged * self.trainer.world_size)
        return self._normaliser

    def _num_supervised(self, batch: StepSummary | Batch) -> int:
        """Supervised tokens of a micro batch; of `read` characters, of `patch` visual tokens over text."""
        if self.stage is not None and self.stage.objective == "read":
            return self.readout.count_characters(self.net.config, batch)
        if self.stage is not None and self.stage.objective == "patch":
            return self.patches.count(self.net.config, batch)
        if "num_supervised" not in batch:  # of a custom DataLoader; counting waits for the device
            return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        return int(batch["num_supervised"])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norms = {part: norm.to(self.device) for part, norm in gradient_norms(optimizer.param_groups).items()}
        self._gradient_norm = torch.linalg.vector_norm(torch.stack([*norms.values()]))
        self._finite.add_step(self.trainer.global_step + 1, norms)
        if not self._logs_this_step:
            return
        tags, sums = list(self._step_sums), torch.stack([*self._step_sums.values()])
        self._step_sums.clear()
        totals, counts = sum_over_ranks(sums, self.trainer.world_size).unbind(1)
        # Lightning would number the steps from 0 in the logger, where everything else counts from 1.
        step = {"step": torch.tensor(self.trainer.global_step + 1.0)}
        losses = dict(zip(tags, totals / counts.clamp(min=1), strict=True))
        self.log_dict({**losses, **{f"train/gradient_norm/{part}": norm for part, norm in norms.items()}, **step})

    @property
    def _logs_this_step(self) -> bool:
        """Whether the step that is under way is one whose metrics Lightning logs; others need not be passed to it."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it dynamically
        return bool(every) and (self.trainer.global_step + 1) % every == 0

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, also with a fused optimizer (without a loss scale); log the norm before clipping."""
        if gradient_clip_val is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_algorithm == "value":
            clip_gradient_values(parameters, gradient_clip_val)
            return
        clip_gradients(parameters, gradient_clip_val, self._gradient_norm)
        if self._logs_this_step:
            self.log("train/gradient_norm", self._gradient_norm)

    def on_train_batch_end(self, *_: Any) -> None:
        """Raise a TrainingError at a loss or gradient that is not finite; on a GPU one step later."""
        self._finite.check(newest=False)

    def batch_loss(self, batch: Batch) -> tuple[TokenLoss, dict[str, tuple[Tensor, Tensor]]]:
        """Loss of a training batch under the stage's objective, and the means to log: tag -> sum and number."""
        if self.current_stage.objective == "read":
            loss = self.readout.loss(self.net.config, self.readout.log_probs(self.net, batch), batch)
            return loss, {"train/readout_loss": (loss.total, loss.supervised)}
        if self.current_stage.objective == "patch":
            loss = self.patches.loss(self.net, batch)
            return loss, {"train/patch_loss": (loss.total, loss.supervised)}
        weight = self.current_stage.readout_weight
        columns = self.readout.alphabet.columns if weight else None
        inputs = loss_inputs(batch, collapse=self.net.collapse is not None)
        output = self.net(**inputs, labels=batch["labels"], readout_columns=columns, use_cache=False)
        loss_sum, count = output.loss_sum, output.num_supervised
        sums = {"train/loss": (loss_sum, count), **kept_tokens(output.kept_tokens, batch)}
        if weight:
            readout = self.readout.loss(self.net.config, output.readout_log_probs, batch)
            sums["train/readout_loss"] = (readout.total, readout.supervised)
            # A sum, divided by the step's tokens like the rest: a mean would depend on how the step is cut.
            loss_sum = loss_sum + weight * readout.total
        kept = None if output.kept_tokens is None else output.kept_tokens.sum(dim=1)
        return TokenLoss(loss_sum, count, output.document_loss_sums, output.document_supervised, kept), sums

    def on_validation_start(self) -> None:
        """Check that the newest step of `fit`, or else the loaded weights, are finite before they are evaluated."""
        self._finite.check(newest=True)
        if self.trainer.state.fn != "fit":
            self._require_finite_weights()

    def on_train_end(self) -> None:
        """Check the last step, which nothing may have saved; raises TrainingError."""
        self._finite.check(newest=True)

    def _require_finite_weights(self) -> None:
        """Check all weights as they were loaded; raise a CheckpointError that names where they come from."""
        init_from = self.stage and self.stage.init_from
        places = {"ckpt_path": self.trainer.ckpt_path, "stage.init_from": init_from, "model.weights": self.weights}
        source = next((f"{setting}={path}" for setting, path in places.items() if path), None)
        require_finite(self.net.named_parameters(), source=source or "pretrained parts of model.spec")

    on_test_start = on_predict_start = _require_finite_weights

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Evaluate a batch as its `task` says: `loss` (where there is none), `generate` or `read`.

        Logs `val/<dataset>/loss`, the mean over the supervised tokens of the dataset. Returns `loss_sum` and
        `num_supervised`; or `predictions`, one string a sample, and for `read` `references`, the true text of each
        sample's first image. Of a filler, which evens out the ranks, values are zero or empty.
        """
        task = batch.get("task", "loss")
        if task == "loss":
            return self._validation_loss(batch, batch.get("dataset", str(dataloader_idx)))
        if task == "read":
            texts = self.read(batch)
            outputs = {"predictions": [found for found, _ in texts], "references": [true for _, true in texts]}
        else:
            outputs = {"predictions": self.generate(batch, max_new_tokens=batch["max_new_tokens"])}
        return {name: [] for name in outputs} if batch["filler"] else outputs

    def _validation_loss(self, batch: Batch, dataset: str) -> dict[str, Tensor]:
        inputs = loss_inputs(batch, collapse=self.net.collapse is not None)
        if batch["filler"]:  # the forward must run, as FSDP gathers in it, but nothing counts
            self.net(**inputs, logits_to_keep=1, use_cache=False)
            loss_sum = num_supervised = torch.zeros((), device=self.device)
            weight = 0.0
        else:
            output = self.net(**inputs, labels=batch["labels"], use_cache=False)
            loss_sum, num_supervised = output.loss_sum, output.num_supervised
            weight = float(batch.get("num_supervised", num_supervised))
        self.log(
            f"val/{dataset}/loss",
            loss_sum / num_supervised.clamp(min=1),
            # The weight of this mean. As an int, Lightning would round its average over ranks down.
            batch_size=weight,  # type: ignore[arg-type]
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            add_dataloader_idx=False,
        )
        return {"loss_sum": loss_sum, "num_supervised": num_supervised}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """Predictions of a batch, one string a sample; none of a filler."""
        return self.validation_step(batch, batch_idx, dataloader_idx)["predictions"]

    def on_validation_epoch_end(self) -> None:
        """Log the optimizer step that the metrics belong to; Lightning would take 0 outside of `fit`."""
        self.log("step", float(self.evaluated_step), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    @property
    def evaluated_step(self) -> int:
        """Optimizer steps of the weights: of the current fit, else of the checkpoint or folder they come from."""
        return self.trainer.global_step or self.loaded_steps

    def generate(self, batch: Batch, *, max_new_tokens: int = 64) -> list[str]:
        """Greedy predictions of a left-padded prompt batch, one string a sample."""
        inputs = {key: value.to(self.device) for key, value in model_inputs(batch).items()}
        # Autocast as in training: the predictions of `test` must be those of the validation during `fit`.
        with no_grad(self.net), self.trainer.precision_plugin.forward_context():
            # Sharded ranks continue together until the longest prediction ends, or they would wait for each other.
            ids = self.net.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, synced_gpus=is_sharded(self.net)
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        return self.processor.post_process_image_text_to_text(new)

    def read(self, batch: Batch) -> list[tuple[str, str]]:
        """Text that P_vocab reads from each sample's first image, and the true text; non-empty rows, one a line."""
        with no_grad(self.net), self.trainer.precision_plugin.forward_context():
            log_probs = self.readout.log_probs(self.net, batch)
        return self.readout.texts(self.net.config, log_probs, batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        stage = self.current_stage
        optimizer = build_optimizer(parameter_groups(self.net, stage), stage)
        factor = step_schedule(stage, int(self.trainer.estimated_stepping_batches), self._stage_minutes)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _stage_minutes(self) -> float:
        """Time of rank 0: all ranks must take the same learning rate."""
        return float(self.trainer.strategy.broadcast(self.stage_seconds) / 60)

    @property
    def stage_seconds(self) -> float:
        """Wall time spent in this stage, runs before a resume included."""
        return self._earlier_seconds + time.monotonic() - self._started

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the stage and the time spent in it; errors as of `require_finite_step`."""
        self.require_finite_step()
        checkpoint[SPEC] = asdict(self.spec)
        checkpoint["stage"] = {
            "name": self.stage.name if self.stage else None,
            "seconds": self.stage_seconds,
            "calibration": self.calibration,
            "precision": str(self.trainer.precision),
        }

    def require_finite_step(self) -> None:
        """Raise an error if the newest step, or a trained weight, is not finite; all ranks must call it."""
        self._finite.check(newest=True)
        trained = ((name, p) for name, p in self.net.named_parameters() if p.requires_grad)
        require_finite(trained, source=f"step {self.trainer.global_step} is not saved")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is one of this model and stage, and take up the stage's clock.

        A CheckpointError names the first difference; a ConfigError a setting that the checkpoint does not go with.
        """
        trainer, record = self._attached_trainer(), checkpoint.get("stage", {})
        if self.stage is not None and (name := record.get("name")) != self.stage.name:
            raise CheckpointError(
                f"ckpt_path is of stage {name!r}, this is stage {self.stage.name!r}; a stage starts from the folder of "
                "another with stage.init_from"
            )
        if (contents := checkpoint.get(CONTENTS)) is not None:
            check_contract(contents["processor"], self.contract, source="ckpt_path")
            if self.stage is None:  # outside of `fit` the checkpoint says which adapters there are
                adapters = parse_adapters(contents["stage"].get("lora"))
                if adapters and is_sharded(self.net):
                    raise ConfigError(
                        f"ckpt_path has adapters on {', '.join(adapters)}, which a sharded model cannot take: use "
                        "trainer.strategy: ddp, or --model.weights with the stage's hf folder, where they are merged"
                    )
                attach_adapters(self.net, adapters)
            else:
                check_stage(contents["stage"], self.stage)
                check_collapse(contents["model"], self.net.config.connector)
        if "state_dict" in checkpoint:
            expected = trainer.strategy.lightning_module_state_dict() if trainer else self.state_dict()
            compare_states(checkpoint["state_dict"], expected, source="ckpt_path")
            source = f"ckpt_path={trainer.ckpt_path}" if trainer else "the checkpoint"
            for weights in ("state_dict", "current_model_state"):  # with an average of the weights there are both
                # Rows of a sharded checkpoint are read where they are loaded, and looked at when the stage begins.
                whole = ((name, v) for name, v in checkpoint.get(weights, {}).items() if isinstance(v, Tensor))
                require_finite(whole, source=source)
        self.loaded_steps = int(checkpoint.get("global_step", 0))
        if self.stage is not None and trainer is not None:
            self._check_resume(trainer, record.get("precision"))
        self._earlier_seconds = float(record.get("seconds", 0.0))
        self.calibration = record.get("calibration")

    def _check_resume(self, trainer: pl.Trainer, precision: str | None) -> None:
        """Refuse a stage that ends before the checkpoint's step; log another precision than the checkpoint's."""
        if 0 <= trainer.max_steps < self.loaded_steps:
            raise ConfigError(
                f"the checkpoint has {self.loaded_steps} steps, the stage ends after {trainer.max_steps}: nothing is "
                f"left to train; set stage.max_steps={self.loaded_steps} to end it there, or choose another run_dir"
            )
        if precision is not None and precision != (now := str(trainer.precision)):
            rank_zero_info(f"the stage was trained with trainer.precision={precision} and resumes with {now}")


def differences_from_stage(trainer: pl.Trainer, stage: Stage) -> list[str]:
    """What a stage says of the training loop and the Trainer, whose value counts, does otherwise."""
    pairs = [
        ("gradient_clip_norm", stage.gradient_clip_norm, "gradient_clip_val", trainer.gradient_clip_val),
        ("max_steps", stage.max_steps, "max_steps", trainer.max_steps),
    ]
    return [
        f"stage.{field}={wanted} has no effect: the Trainer has {setting}={value}, which counts"
        for field, wanted, setting, value in pairs
        if wanted is not None and wanted != value
    ]


def check_objective(stage: Stage, connector: Mapping[str, Any]) -> None:
    """Raise a ConfigError for a stage that reads out P_vocab of a connector that has none."""
    kind = connector.get("type", "align")
    reads = stage.objective == "read" or stage.readout_weight > 0
    if reads and not getattr(connector_class(kind), "reads_text", False):
        raise ConfigError(f"stage {stage.name!r}: connector {kind!r} has no P_vocab to read out; use 'align'")


def check_precision(precision: str, *, fit: bool) -> None:
    """Raise a ConfigError for a precision that cannot train, or evaluate.

    Norms are clipped and logged with the loss scale of fp16; weights of 16 bits round small updates away.
    """
    if precision not in (_TRAINING_PRECISIONS if fit else _TRAINING_PRECISIONS + _WEIGHT_PRECISIONS):
        evaluating = "" if fit else ", bf16-true or 16-true"
        raise ConfigError(
            f"trainer.precision={precision} is not supported{' in fit' if fit else ''}; use bf16-mixed{evaluating}, or "
            "32-true on a device without bfloat16"
        )


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model takes of a batch; one of Hugging Face's entry points has normalised tiles and no `tile_boxes`."""
    return {key: batch[key] for key in (*MODEL_KEYS, *(key for key in ("tile_boxes", "thumbnails") if key in batch))}


def kept_tokens(kept: Tensor | None, batch: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """What is logged of the visual tokens that the LLM ran on, (tiles, tokens) bool: tag -> sum and number."""
    if kept is None:
        return {}
    tokens, pages = kept.sum(dtype=torch.float32), sum(map(len, batch.get("sizes", ())))
    counts = {"connector/kept_share": kept.numel(), "connector/kept_tokens_per_page": pages}
    return {tag: (tokens, torch.full_like(tokens, count)) for tag, count in counts.items()}


def loss_inputs(batch: Mapping[str, Any], *, collapse: bool = False) -> dict[str, Any]:
    """What the model takes of a batch for its loss, beside `labels`.

    Rows that are padded on the right need no attention mask, with which CUDA's flash attention does not run. A batch
    that no `Collator` has made has one if a row is padded elsewhere; so has every batch whose blanks the model is to
    `collapse`, which needs to know where rows end, and leaves out the mask itself.
    """
    inputs = model_inputs(batch) | {key: batch[key] for key in LOSS_KEYS if key in batch}
    if "segment_ids" in batch:
        inputs["num_documents"] = len(batch["keys"])
    if not collapse and ("supervised_positions" in batch or is_padded_right(batch["attention_mask"])):
        inputs["attention_mask"] = None
    return inputs


def is_padded_right(attention_mask: Tensor) -> bool:
    """Whether each row of a mask (B, L) is tokens, then padding; waits for the device."""
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
