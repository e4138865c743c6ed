"""`shards info`: what datasets hold, by source.

In the sample schema only the JSON of each sample is read, which has the sizes of its images; in other formats the
headers of the images, too.
"""

import argparse
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.tiling import Tiling, count_visual_tokens
from alignvlm_pl.utils.skipped import SkippedSamples

from .manifest import load_manifest
from .reader import is_json, read_range
from .sample import SampleError, check_record, message_text
from .sample_formats import FORMATS, RawSample, locate_sample, parse_record
from .shard_file import upright_size

QUANTILES = (0, 10, 50, 90, 100)
Measures = dict[str, list[int]]
"""Name of a quantity -> its value for each sample or image of a source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """How a model would see the samples: text -> number of tokens, how images are cut, visual tokens of a tile."""

    count_tokens: Callable[[str], int]
    tiling: Tiling
    tokens_per_tile: int


def collect(
    folder: Path, model: Model | None = None, *, form: str = "normal"
) -> tuple[dict[str, Measures], SkippedSamples]:
    """Return source -> measures of the samples of a dataset in the format `form`, and the invalid samples.

    A damaged dataset, or one without a sample of that format, is a DataError.
    """
    manifest = load_manifest(folder)
    found: dict[str, Measures] = {}
    skipped = SkippedSamples(keep=1)
    wanted = is_json if form == "normal" else lambda name: True
    for raw in read_range(manifest, wanted=wanted):
        try:
            record = _record(raw, form)
            measures = list(_measure(record, model))
        except SampleError as error:
            skipped.add(error.reason, str(error))
            continue
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            message = f"{locate_sample(raw)} is not in the sample schema ({error!r})"
            skipped.add("invalid_sample", message)
            continue
        of_source = found.setdefault(str(record.get("source", "unknown")), {})
        for name, value in measures:
            of_source.setdefault(name, []).append(value)
    if skipped.counts and not found:
        first = next(iter(skipped.messages.values()))[0]
        raise DataError(
            f"{folder}: none of {skipped.counts.total()} samples reads as --format {form}, the first: "
            f"{first}; known formats: {', '.join(FORMATS)}; see `shards verify`"
        )
    return found, skipped


def main(argv: list[str], load_model: Callable[[Path], Model]) -> int:
    """Run `shards info`."""
    parser = argparse.ArgumentParser(prog="shards info", description=(__doc__ or "").split(":")[1].split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of datasets")
    parser.add_argument("--model", type=Path, help="configs/model/NAME.yaml: count its text and visual tokens")
    parser.add_argument("--format", choices=FORMATS, default="normal", help="what the tars hold; default: %(default)s")
    options = parser.parse_args(argv)
    model = load_model(options.model) if options.model else None
    for folder in options.folders:
        manifest = load_manifest(folder)
        size = sum(shard.bytes for shard in manifest.shards)
        sys.stdout.write(
            f"{folder}: {manifest.num_samples:,} samples, {len(manifest.shards)} shards, {size / 1e6:,.1f} MB, "
            f"{manifest.license}\n"
        )
        sources, skipped = collect(folder, model, form=options.format)
        for source, measures in sorted(sources.items()):
            sys.stdout.write(_table(source, measures))
        for reason, count in skipped.counts.most_common():
            sys.stdout.write(f"  skipped: {count:,} ({reason}), the first: {skipped.messages[reason][0]}\n")
    return 0


def _record(raw: RawSample, form: str) -> dict[str, Any]:
    """Return the record of a sample, with the sizes of its images."""
    where = locate_sample(raw)
    if form == "normal":
        if "json" not in raw:
            raise SampleError(f"{where} has no json", "missing_json")
        return parse_record(raw["json"], where=where)
    try:
        record, images, files = FORMATS[form](raw)
        sizes = [upright_size(data, name=file) for data, file in zip(images, files, strict=True)]
    except SampleError:
        raise
    except DataError as error:  # of another schema: here of this sample alone
        raise SampleError(str(error)) from error
    check_record(record, num_images=len(images), where=where)
    return record | {"images": [{"w": width, "h": height} for width, height in sizes]}


def _measure(record: dict[str, Any], model: Model | None) -> Iterator[tuple[str, int]]:
    """Yield name and value of all quantities of a sample."""
    texts = {"user": "", "assistant": ""}
    for turn in record["messages"]:
        role = "assistant" if turn["role"] == "assistant" else "user"
        texts[role] += message_text(turn)
    count, unit = (model.count_tokens, "tokens") if model else (len, "characters")
    yield "turns", len(record["messages"])
    yield "images", len(record.get("images", []))
    yield f"prompt {unit}", count(texts["user"])
    yield f"answer {unit}", count(texts["assistant"] or " ".join(record.get("references", [])[:1]))
    visual = 0
    for image in record.get("images", []):
        yield "width px", operator.index(image["w"])
        yield "height px", operator.index(image["h"])
        if model:
            visual += count_visual_tokens(image["w"], image["h"], model.tiling, model.tokens_per_tile)
    if model:
        yield "visual tokens", visual


def _table(source: str, measures: Measures) -> str:
    lines = [f"  {source}: {len(measures['turns']):,} samples"]
    header = "".join(f"{f'{quantile} %':>9}" for quantile in QUANTILES)
    lines.append(f"    {'':<18}{header}")
    for name, values in measures.items():
        cells = "".join(f"{value:>9.0f}" for value in np.percentile(values, QUANTILES))
        lines.append(f"    {name:<18}{cells}")
    return "\n".join(lines) + "\n"
