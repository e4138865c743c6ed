"""Where answers and figures go: predictions, page images, TensorBoard, results.json and the reports."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from alignvlm_pl.scoring.faults import problem_lists
from alignvlm_pl.scoring.records import Record, page_path, scored_records
from alignvlm_pl.scoring.report import write_reports
from alignvlm_pl.scoring.results import Losses, results
from alignvlm_pl.scoring.run import Scored
from alignvlm_pl.utils.atomic_files import printable, write_predictions, write_results

log = logging.getLogger(__name__)
PAGE_PX = 1600  # longest side of a page image: legible, and a report of them still opens at once
_SHOWN = 4


def predictions_path(trainer: pl.Trainer, name: str, *, whole: bool) -> Path:
    """File of the predictions of one set, of a part of it with the optimizer step."""
    tag = "" if whole else f"-step{trainer.global_step:06d}"
    return Path(trainer.default_root_dir) / "predictions" / f"{name}{tag}.jsonl"


def write_set(
    trainer: pl.Trainer,
    name: str,
    records: Sequence[Record],
    scored: Scored,
    *,
    page_images: int,
    whole: bool,
) -> None:
    """Write the predictions of one set, and the pages of its first samples and its worst answers."""
    write_predictions(predictions_path(trainer, name, whole=whole), scored_records(records, scored))
    worst = scored.worst_first()[: page_images // 2]
    keys = [answer.key for answer in scored.answers[: page_images - len(worst)]]
    _write_pages(trainer, name, {*keys, *(scored.answers[index].key for index in worst)})


def write_run(
    trainer: pl.Trainer,
    found: Mapping[str, Scored],
    *,
    loss: Losses,
    readout_sets: Sequence[str],
) -> None:
    """Write `results.json`, `problems.json`, `report.md` and `report.html` of all sets."""
    folder = Path(trainer.default_root_dir)
    write_results(folder / "results.json", results(found, loss=loss, readout_sets=readout_sets))
    problems = {name: scored.problems for name, scored in found.items()}
    write_results(folder / "problems.json", problem_lists(problems))
    write_reports(folder, found, images=folder / "predictions" / "images")


def show(trainer: pl.Trainer, name: str, scored: Scored) -> None:
    """Log the figures of one set, and its first pages with what was answered."""
    log_metrics(trainer, {f"bench/{name}/{figure}": value for figure, value in scored.figures.items()})
    log_metrics(trainer, {f"bench/{name}/num": scored.num})
    shown = {"num": scored.num, **scored.figures}
    log.info("%s: %s", name, "  ".join(f"{figure} {value:.4g}" for figure, value in shown.items()))
    for problem in scored.problems:
        log.warning("%s is incomplete: %s", name, problem)
    images = Path(trainer.default_root_dir) / "predictions" / "images"
    first = [a for a in scored.answers if page_path(images, name, a.key).is_file()][:_SHOWN]
    lines = [f"- {a.question} → **{a.prediction}** ({' | '.join(a.references)})" for a in first]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            writer, step = logger.experiment, trainer.global_step
            for answer in first:
                page = np.asarray(Image.open(page_path(images, name, answer.key)))
                writer.add_image(printable(f"{name}/{answer.key}"), page, step, dataformats="HWC")
            writer.add_text(f"bench/{name}", printable("\n".join(lines)), step)


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Log metrics at the current optimizer step, to all loggers of the trainer."""
    for logger in trainer.loggers if metrics else ():
        logger.log_metrics(dict(metrics), step=trainer.global_step)


def _write_pages(trainer: Any, name: str, keys: set[str]) -> None:
    """Store the first image of the samples with these keys."""
    images = Path(trainer.default_root_dir) / "predictions" / "images"
    chosen = trainer.datamodule.benchmark_set(name)
    for key, page in chosen.pages(keys, trainer.datamodule.adapter()):
        page.thumbnail((PAGE_PX, PAGE_PX), Image.Resampling.LANCZOS)
        path = page_path(images, name, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        page.save(path)
