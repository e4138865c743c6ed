"""Answering and scoring one benchmark, and the files that keep what came out."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import DataError
from .metrics import character_error_rate, get_metric
from .tiling import Tiling, choose_grid

Record = dict[str, Any]


def answer_records(batch: dict[str, Any], predictions: Sequence[str], metrics: Iterable[str]) -> list[Record]:
    """Prediction records of one generation batch: key, question, prediction, references and the scores."""
    records = []
    for key, question, prediction, references in zip(
        batch["keys"], batch["questions"], predictions, batch["references"], strict=True
    ):
        scores = {name: float(get_metric(name)(prediction, references)) for name in metrics}
        records.append(
            {
                "key": key,
                "question": question,
                "prediction": prediction,
                "references": list(references),
                **scores,
            }
        )
    return records


def readout_records(batch: dict[str, Any], readings: Sequence[tuple[str, str]]) -> list[Record]:
    """Records of one batch read from P_vocab: the reading, the truth, edits and characters (case ignored)."""
    records = []
    for key, (found, truth) in zip(batch["keys"], readings, strict=True):
        edits, length = character_error_rate(found, truth, ignore_case=True)
        records.append(
            {"key": key, "prediction": found, "references": [truth], "edits": edits, "characters": length}
        )
    return records


def merge(records: Iterable[Record], *, name: str, expected: int) -> list[Record]:
    """Records of all ranks, each key once, in key order.

    Raises:
        DataError: If the number of keys is not the size of the set: a figure over part of it is not the benchmark's.
    """
    merged = {record["key"]: record for record in records}
    if len(merged) != expected:
        raise DataError(f"benchmark {name!r}: {len(merged)} samples were scored, its manifest has {expected}")
    return [merged[key] for key in sorted(merged)]


def summarize(records: Sequence[Record]) -> dict[str, float]:
    """Figures of a set: `num`, and the mean of each score or the character error rate `cer` over the set."""
    figures: dict[str, float] = {"num": len(records)}
    if records and "edits" in records[0]:
        figures["cer"] = sum(r["edits"] for r in records) / max(sum(r["characters"] for r in records), 1)
        return figures
    fields = {"key", "question", "prediction", "references"}
    for name in (field for field in (records[0] if records else {}) if field not in fields):
        figures[name] = sum(record[name] for record in records) / len(records)
    return figures


def overall(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over all questions of all answered sets; readout sets keep their own figures."""
    answered = [figures for figures in results.values() if "cer" not in figures]
    total = sum(figures["num"] for figures in answered)
    if not total:
        return {}
    names = [name for name in answered[0] if name != "num"]
    means = {name: sum(f[name] * f["num"] for f in answered) / total for name in names}
    return {"num": total, **means}


def page_image(tiles: np.ndarray, size: tuple[int, int], tiling: Tiling) -> Image.Image:
    """Put an image's tiles (tiles, 3, H, W) in [-1, 1] back together as the page that the model saw."""
    grid = choose_grid(size[0], size[1], tiling)
    count = grid.rows * grid.cols
    first = int(tiling.thumbnail == "first" and count > 1)
    page = tiles[first : first + count].reshape(
        grid.rows, grid.cols, 3, tiling.tile_height, tiling.tile_width
    )
    pixels = page.transpose(0, 3, 1, 4, 2).reshape(
        grid.rows * tiling.tile_height, grid.cols * tiling.tile_width, 3
    )
    return Image.fromarray(np.uint8(np.clip((pixels + 1) * 127.5, 0, 255).round()))


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_predictions(path: Path, records: Sequence[Record]) -> None:
    """Write records as jsonl."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, text)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json`."""
    text = json.dumps(results, indent=2) + "\n"
    write_atomically(path, text)
