"""A saved run as objects again, without a fit: its module and data, the batches of a step, and their losses."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from callbacks.ledger import with_losses
from datamodules import WebDataModule
from datamodules.loading.collate import Batch, EncodedSample, question
from datamodules.loading.train_data import Training
from datamodules.shards.manifest import verify_shard
from datamodules.stream.state import differences

from ..errors import DataError
from ..models.loading import choose_attention
from ..training.module import AlignVLMModule
from ..training.optim import set_modes
from ..training.stage import Stage
from . import replay_weights
from .lightning_cli import AlignParser
from .replay import Micro, changed
from .replay_weights import Weights

if TYPE_CHECKING:
    from callbacks.ledger_file import Entry

_CPU_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")


def open_run(config: dict[str, Any], head: Any) -> tuple[AlignVLMModule, WebDataModule]:
    """Module and data of a saved configuration, tied to a trainer for one CPU process; no weights are loaded yet.

    Args:
        config: Content of the run's `config.yaml`.
        head: Of its ledger (`Entry.head`).

    Raises:
        AlignVLMError: The configuration does not parse any more.
    """
    parser = AlignParser(prog="config.yaml")
    parser.add_class_arguments(AlignVLMModule, "model")
    parser.add_subclass_arguments(WebDataModule, "data")
    parser.add_class_arguments(Stage, "stage")
    values = {name: config[name] for name in ("model", "data", "stage")}
    if head["device"] != "cpu":
        values["model"] = _computed_anywhere(values["model"])
    parsed = parser.parse_object(values)
    built = parser.instantiate(parsed)
    module, data = built.model, built.data
    module.begin_stage(built.stage)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        plugins=[LightningEnvironment()],  # one process, whatever allocation this shell is in
        precision=head["precision"] if head["precision"] in _CPU_PRECISIONS else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    data.num_workers, data.strict = 0, True
    return module, data


def rebuild(data: WebDataModule, entries: Sequence["Entry"]) -> Iterator[Micro]:
    """The micro batches of a step, each compared with what the ledger says of it.

    Raises:
        DataError: Data, settings or processor are not those of the run, naming the first difference.
    """
    data.train_dataloader()
    training = data.training
    assert training is not None, "train_dataloader has just made it"
    if listing := "; ".join(differences(entries[0].head["data"], training.identity)):
        raise DataError(f"the run was trained on other data or settings: {listing}; restore them")
    verified: set[str] = set()
    for entry in entries:
        rows = list(_rows(training, entry, verified))
        batch: Batch = training.batches.collate(rows)
        where = f"step {entry.line['step']}, rank {entry.line['rank']}, micro batch {entry.line['micro']}"
        for name in ("keys", "tiles", "tokens"):
            if batch[name] != entry.line[name]:
                raise changed(where, name, batch[name], entry.line[name])
        yield Micro(entry=entry, batch=batch, prompts=[question(item.sample) for row in rows for item in row])


def compute(
    module: AlignVLMModule, micros: Sequence[Micro], *, run: Path, config: dict[str, Any], given: Path | None
) -> tuple[list[Micro], Weights]:
    """Losses of the micro batches, each run by itself as in training, under the weights the step began with.

    Returns:
        The micro batches with their losses, and the weights that these are of.
    """
    head, step = micros[0].entry.head, micros[0].entry.line["step"]
    seed = config.get("seed_everything")
    pl.seed_everything(seed if isinstance(seed, int) else 0, verbose=False)
    assert module.stage is not None
    doubt = _initial_doubt(module, head, config)
    weights = replay_weights.choose(run, step, given=given, initial_doubt=doubt, stage=module.stage)
    module.configure_model()
    replay_weights.load(module, weights)
    if weights.path is None and module.stage.calibrate:
        weights = _calibrate(module, weights, replay_weights.calibration(run))
    if module.attention in ("eager", "sdpa"):
        choose_attention(module.net.language_model, module.attention)
    precision = module.trainer.precision_plugin
    precision.convert_module(module)
    set_modes(module.net, module.stage)
    found = []
    for micro in micros:
        with torch.no_grad(), precision.forward_context():
            loss, _ = module.batch_loss(micro.batch)
        figures = [loss.total.reshape(1), loss.document_sums, loss.document_supervised]
        own = with_losses({"of": micro.batch["sources"]}, torch.cat(figures).tolist())
        found.append(replace(micro, own=own))
    return found, weights


def _computed_anywhere(model: dict[str, Any]) -> dict[str, Any]:
    """Settings of a model without those that name who computes it, which a CPU may not be able to."""
    spec = model["spec"]
    connector = {name: value for name, value in spec["connector"].items() if name != "backend"}
    own = {"spec": {**spec, "connector": connector}, "loss_backend": "auto", "compile": None}
    return {**model, **own}


def _rows(training: Training, entry: "Entry", verified: set[str]) -> Iterator[list[EncodedSample]]:
    """Rows of a micro batch, read again.

    Raises:
        DataError: A shard has changed, or a sample cannot be read any more.
    """
    positions = iter(entry.line["positions"])
    for count in entry.line.get("per_row", [1] * len(entry.line["positions"])):
        row = []
        for position in (next(positions) for _ in range(count)):
            place = training.stream.locate(position)
            name = place.manifest.where(place.shard.path)
            if (
                name not in verified and not place.manifest.is_remote
            ):  # a fetched one was compared when it came
                verify_shard(place.manifest.shard_path(place.shard), place.shard, verify_sha256=True)
                verified.add(name)
            item = training.batches.read(position)
            assert item is not None, "a strict reader raises"
            row.append(item)
        yield row


def _initial_doubt(module: AlignVLMModule, head: Any, config: dict[str, Any]) -> str:
    """Why the weights that the stage began with may not be built again."""
    seed, strategy = config.get("seed_everything"), config["trainer"].get("strategy")
    kind = strategy["class_path"] if isinstance(strategy, dict) else ""
    if module.stage is not None and module.stage.init_from is None and module.weights is None:
        if not isinstance(seed, int):
            return f"seed_everything was {seed}, so what started at random cannot be had again"
        if head["device"] != "cpu":
            return f"what started at random was drawn on {head['device']}"
        if kind.startswith("alignvlm_pl."):  # those that shard (models/on_meta.py)
            return f"what started at random was drawn in another order under {kind}"
    return ""


def _calibrate(module: AlignVLMModule, weights: Weights, done: dict[str, float] | None) -> Weights:
    """Set the gain as `stage.calibrate` has (CONTRACT: callbacks/gain_calibration.py)."""
    if done is None:
        return replace(weights, doubt="stage.calibrate changed them, and the run has not written down how")
    module.net.connector.norm2.weight.data.mul_(done["gain_factor"])
    return weights
