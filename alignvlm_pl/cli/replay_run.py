"""A saved run as objects again, without a fit: its module and data, the batches of a step, and their losses."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from callbacks.ledger import with_losses
from callbacks.ledger_file import Entry
from datamodules import WebDataModule
from datamodules.shards.sample import last_question

from ..errors import CheckpointError, DataError
from ..models.build import load_weights
from ..models.loading import choose_attention
from ..preprocessing.batch import Batch
from ..strategies.sharded_checkpoint import is_folder, read_rest, read_whole
from ..training.export import RECORD, compare_states
from ..training.module import AlignVLMModule
from ..training.optim import set_modes
from ..training.stage import Stage
from .lightning_cli import build_parts

_CPU_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")


@dataclass(kw_only=True)
class Micro:
    """One micro batch, rebuilt, with the last question of each sample and its losses, if they are recomputed."""

    entry: Entry
    batch: Batch
    prompts: list[str]
    recomputed: dict[str, Any] | None = None


@dataclass(kw_only=True)
class Weights:
    """Weights that losses are computed with: their path, or None for the stage's initial ones.

    They had `after` optimizer steps in their stage, if that is known; `doubt` is why the run's may have differed then.
    """

    path: Path | None
    after: int | None
    doubt: str = ""

    def match(self, step: int) -> bool:
        """Whether the step began with them."""
        return self.after == step - 1 and not self.doubt

    def explain(self, step: int) -> str:
        """Return what they are, and whether the losses can be those of the run."""
        name = "the stage's initial weights" if self.path is None else str(self.path)
        if self.match(step):
            return f"{name} (after step {self.after}): the weights that step {step} began with"
        known = "of no known step" if self.after is None else f"after step {self.after}"
        why = self.doubt or f"step {step} began with those after step {step - 1}, which are not there"
        return f"{name} ({known}), NOT those the step began with: {why}. The losses differ from the recorded ones"


def open_run(config: dict[str, Any], head: Any) -> tuple[AlignVLMModule, WebDataModule]:
    """Build module and data of a run's `config.yaml`, with a trainer for one CPU process; loads no weights."""
    values = dict(config)
    if head["device"] != "cpu":  # a CPU may have none of the run's back-ends
        model = values["model"]
        options = model.get("init_args", model)  # runs of earlier versions name no class
        spec = options["spec"]
        connector = {name: value for name, value in spec["connector"].items() if name not in ("backend", "budget_gib")}
        portable = {"spec": spec | {"connector": connector}, "loss_backend": "auto", "compile": None}
        values["model"] = {**model, "init_args": options | portable} if options is not model else model | portable
    built = build_parts(values, source="config.yaml", model=AlignVLMModule, data=WebDataModule, stage=Stage)
    module, data = built.model, built.data
    module.begin_stage(built.stage)
    precision: Any = head["precision"] if head["precision"] in _CPU_PRECISIONS else "32-true"
    one = LightningEnvironment()  # one process, whatever allocation this shell is in
    trainer = pl.Trainer(accelerator="cpu", devices=1, plugins=one, precision=precision, barebones=True)
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    return module, data


def rebuild(data: WebDataModule, entries: Sequence[Entry]) -> list[Micro]:
    """Read the micro batches of a step again; DataError names the first difference from the sample log."""
    data.num_workers, data.strict = 0, True
    data.train_dataloader()
    training = data.training
    assert training is not None, "train_dataloader has just made it"
    training.require_identity(entries[0].head["data"])
    micros = []
    for entry in entries:
        line = entry.line
        batch, samples = training.read(line["positions"], per_row=line.get("per_row"))
        for name in ("keys", "tiles", "tokens"):
            if batch[name] != line[name]:
                raise DataError(
                    f"step {line['step']}, rank {line['rank']}, micro batch {line['micro']}: {name} is now "
                    f"{batch[name]}, in the run it was {line[name]}; data, processor or code have changed: restore them"
                )
        micros.append(Micro(entry=entry, batch=batch, prompts=[last_question(s.messages) for s in samples]))
    return micros


def compute(
    module: AlignVLMModule, micros: Sequence[Micro], run: Path, config: dict[str, Any], given: Path | None
) -> Weights:
    """Compute the losses of a step's micro batches; returns the weights that it used.

    These are the `given` ones, else those the step began with, else the nearest that the run has left.
    """
    stage, seed = module.stage, config.get("seed_everything")
    assert stage is not None, "open_run has begun it"
    pl.seed_everything(seed if isinstance(seed, int) else 0, verbose=False)
    initial = Weights(path=None, after=0, doubt=_initial_doubt(module, micros[0].entry.head, config))
    weights = _choose(run, micros[0].entry.line["step"], stage, initial, given)
    module.configure_model()
    if weights.path is not None:
        _load(module, weights.path)
    elif stage.calibrate and (gain := _calibration(run)):
        module.net.connector.norm2.weight.data.mul_(gain["gain_factor"])
    elif stage.calibrate:
        weights.doubt = "stage.calibrate changed them, and the run has not recorded how"
    if module.attention in ("eager", "sdpa"):
        choose_attention(module.net.language_model, module.attention)
    precision = module.trainer.precision_plugin
    precision.convert_module(module)
    set_modes(module.net, stage)
    for micro in micros:
        with torch.no_grad(), precision.forward_context():
            loss, _ = module.batch_loss(micro.batch)
        sums = torch.cat([loss.total.reshape(1), loss.document_sums, loss.document_supervised])
        micro.recomputed = with_losses({"of": micro.batch["sources"]}, sums.tolist())
    return weights


def _initial_doubt(module: AlignVLMModule, head: Any, config: dict[str, Any]) -> str:
    seed, strategy = config.get("seed_everything"), config["trainer"].get("strategy")
    kind = strategy["class_path"] if isinstance(strategy, dict) else ""
    if module.weights is not None or module.stage is None or module.stage.init_from is not None:
        return ""  # nothing was drawn
    drawn = "random initial weights were drawn"
    if not isinstance(seed, int):
        return f"{drawn} without a known seed: seed_everything was {seed}"
    if head["device"] != "cpu":
        return f"{drawn} on {head['device']}"
    return f"{drawn} in another order under {kind}" if kind.startswith("alignvlm_pl.") else ""


def _choose(run: Path, step: int, stage: Stage, initial: Weights, given: Path | None) -> Weights:
    if given is not None and not given.exists():
        raise CheckpointError(f"--weights {given}: there is no such file or folder")
    # An export has adapters merged, which cannot be separated again.
    paths = [*sorted((run / "checkpoints").glob("*.ckpt")), *([] if stage.adapters else [run / "hf"])]
    found = [] if given else [initial]
    for path in [given] if given else filter(Path.exists, paths):
        after, doubt = None, ""
        if not path.is_dir() or is_folder(path):
            after = int(read_rest(path)["global_step"])
        elif (path / RECORD).is_file():
            after = int(json.loads((path / RECORD).read_text())["steps"])
            doubt = "the folder holds the average of stage.ema_decay" if stage.ema_decay else ""
        found.append(Weights(path=path, after=after, doubt=doubt))
    known = [weights for weights in found if weights.after is not None] or found
    return min(known, key=lambda weights: (abs((weights.after or 0) - (step - 1)), bool(weights.doubt)))


def _load(module: AlignVLMModule, path: Path) -> None:
    if path.is_dir() and not is_folder(path):
        load_weights(module.net, path)
        return
    checkpoint = read_whole(path)
    # With stage.ema_decay a checkpoint has two sets of weights; this one is trained (callbacks/averaged_weights.py).
    state = checkpoint.get("current_model_state", checkpoint["state_dict"])
    compare_states(state, module.state_dict(), source=str(path))
    module.load_state_dict(state)


def _calibration(run: Path) -> dict[str, float] | None:
    """Read what `stage.calibrate` did to the initial weights from the export, else from a checkpoint."""
    if (run / "hf" / RECORD).is_file():
        return json.loads((run / "hf" / RECORD).read_text()).get("calibration")
    paths = filter(Path.exists, sorted((run / "checkpoints").glob("*.ckpt")))
    return next((read_rest(path).get("stage", {}).get("calibration") for path in paths), None)
