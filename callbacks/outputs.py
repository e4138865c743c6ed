"""Where predictions and scores go: predictions, page images, loggers, results.json and the reports."""

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from alignvlm_pl.scoring.contact_sheet import captioned
from alignvlm_pl.scoring.problems import problem_lists
from alignvlm_pl.scoring.records import Record, file_name, page_path, readout_path, scored_records
from alignvlm_pl.scoring.report import markdown_text, write_reports
from alignvlm_pl.scoring.results import Losses, results
from alignvlm_pl.scoring.run import Scored
from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.utils.atomic_files import printable, write_predictions, write_results

log = logging.getLogger(__name__)
PAGE_PX = 1600  # longest side of a page image: legible, and a report of them still opens at once
_SHOWN = 4


class RunOutputs:
    """Write the results of one evaluation below the run folder.

    `page_images` counts the page images of each dataset, half of first samples, half of the worst predictions, and
    `readout_pages` those of them on which P_vocab is read; without `whole` the files of predictions are named after the
    step.
    """

    def __init__(
        self, trainer: pl.Trainer, module: AlignVLMModule, *, page_images: int, readout_pages: int, whole: bool
    ) -> None:
        self._trainer: Any = trainer  # `datamodule` is set by Lightning, unknown to its types
        self._module = module
        self._page_images = page_images
        self._readout_pages = min(readout_pages, page_images)
        self._whole = whole
        self._folder = Path(trainer.default_root_dir)
        self._images = self._folder / "predictions" / "images"

    def write_dataset(self, name: str, records: Sequence[Record], scored: Scored) -> dict[Path, Image.Image]:
        """Write predictions and page images; return path -> page of those to be painted with what P_vocab reads."""
        step = None if self._whole else self._module.evaluated_step
        write_predictions(predictions_path(self._folder, name, step=step), scored_records(records, scored))
        for sample in scored.samples:  # of an earlier evaluation, perhaps of another model
            readout_path(self._images, name, sample.key).unlink(missing_ok=True)
        shown, read = (_shown_keys(scored, count) for count in (self._page_images, self._readout_pages))
        data, unpainted = self._trainer.datamodule, {}
        for key, page in data.benchmark_dataset(name).pages(shown, data.adapter()):
            if key in read:
                unpainted[readout_path(self._images, name, key)] = page.copy()
            page.thumbnail((PAGE_PX, PAGE_PX), Image.Resampling.LANCZOS)
            path = page_path(self._images, name, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            page.save(path)
        return unpainted

    def write_run(self, found: Mapping[str, Scored], *, loss: Losses, readout_sets: Sequence[str]) -> None:
        write_results(self._folder / "results.json", results(found, loss=loss, readout_sets=readout_sets))
        problems = {name: scored.problems for name, scored in found.items()}
        write_results(self._folder / "problems.json", problem_lists(problems))
        weights, step = self._trainer.ckpt_path or self._module.weights, self._module.evaluated_step
        run = {
            "run": str(self._folder),
            "weights": str(weights) if weights else "of the fit" if self._module.stage else "untrained",
            "step": "" if step is None else f"{step:,}",
            "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        }
        write_reports(self._folder, found, images=self._images, run=run)

    def show(self, name: str, scored: Scored, *, tag: str) -> None:
        shown = {"num": scored.num, **scored.metrics}
        log.info("%s: %s", name, "  ".join(f"{metric} {value:.4g}" for metric, value in shown.items()))
        for problem in scored.problems:
            log.warning("%s is incomplete: %s", name, problem)
        first = [a for a in scored.samples if page_path(self._images, name, a.key).is_file()][:_SHOWN]
        lines = [
            f"- {markdown_text(a.question)} → **{markdown_text(a.prediction) or '(nothing)'}** "
            f"({markdown_text(' | '.join(a.references))})"
            for a in first
        ]
        for logger in self._trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                writer, step = logger.experiment, self._module.evaluated_step
                for sample in first:
                    right = sample.prediction.strip().lower() in {text.strip().lower() for text in sample.references}
                    texts = (sample.question, sample.prediction, " | ".join(sample.references))
                    paths = (page_path(self._images, name, sample.key), readout_path(self._images, name, sample.key))
                    for path, end in zip(paths, ("", ".readout"), strict=True):
                        if path.is_file():
                            image = np.asarray(captioned(Image.open(path), *texts, right=right))
                            writer.add_image(printable(f"{tag}/{sample.key}{end}"), image, step, dataformats="HWC")
                writer.add_text(tag, printable("\n".join(lines)), step)


def _shown_keys(scored: Scored, count: int) -> set[str]:
    """Return the keys of `count` samples: half of the first, half of the worst predictions of the others."""
    first = range(min(count - count // 2, len(scored.samples)))
    worst = [index for index in scored.worst_first() if index not in first]
    return {scored.samples[index].key for index in [*first, *worst[: count // 2]]}


def predictions_path(folder: Path, name: str, *, step: int | None) -> Path:
    """Return the file of the predictions of one dataset in a run folder; of a subset, with its optimizer step."""
    tag = "" if step is None else f"-step{step:06d}"
    return folder / "predictions" / f"{file_name(name)}{tag}.jsonl"


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Log metrics, the same on all ranks, at the current optimizer step; callbacks can monitor them, too."""
    if not metrics:
        return
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
    # Not to the loggers: Lightning would log them only at its own steps.
    trainer.lightning_module.log_dict(dict(metrics), logger=False, on_step=True, on_epoch=False)
