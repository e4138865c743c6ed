"""`shards info`: what sets of shards hold, by source (no torch here).

Only the JSON of each sample is read: widths and heights stand in it, so no picture is opened.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_pl.errors import DataError
from alignvlm_pl.tiling import Tiling, count_visual_tokens

from .manifest import load_manifest
from .normal_form import parse_record
from .sample import message_text
from .tar_walk import Damage, walk

QUANTILES = (0, 10, 50, 90, 100)
_BARS = " ▁▂▃▄▅▆▇█"
_BINS = 24


@dataclass(kw_only=True, slots=True)
class SourceInfo:
    """What the samples of one source are like.

    Attributes:
        samples: Their number.
        measures: Name of a quantity -> its value for each sample or picture.
    """

    samples: int = 0
    measures: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, value: int) -> None:
        """Note one value of a quantity."""
        self.measures.setdefault(name, []).append(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """How a model would see the samples.

    Attributes:
        count_tokens: Text -> its number of tokens.
        tiling: How pictures are cut.
        tokens_per_tile: Visual tokens of a tile.
    """

    count_tokens: Callable[[str], int]
    tiling: Tiling
    tokens_per_tile: int


def collect(folder: Path, model: Model | None = None) -> dict[str, SourceInfo]:
    """Read the JSON of every sample of a set.

    Args:
        folder: Folder of a set in normal form.
        model: Counts tokens; None: characters are counted.

    Returns:
        Source -> what its samples are like.

    Raises:
        DataError: The set is damaged, or not in normal form.
    """
    found: dict[str, SourceInfo] = {}
    for where, record in _records(folder):
        try:
            info = found.setdefault(str(record.get("source", "unknown")), SourceInfo())
            info.samples += 1
            _add(info, record, model)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where} is not in normal form ({error!r}); see `shards verify`") from error
    return found


def main(argv: list[str], load_model: Callable[[Path], Model]) -> int:
    """Run `shards info`."""
    parser = argparse.ArgumentParser(
        prog="shards info", description=(__doc__ or "").split(":")[1].split("\n")[0]
    )
    parser.add_argument("folders", type=Path, nargs="+", help="folders of sets in normal form")
    parser.add_argument(
        "--model", type=Path, help="configs/model/NAME.yaml: count its text and visual tokens"
    )
    options = parser.parse_args(argv)
    model = load_model(options.model) if options.model else None
    for folder in options.folders:
        manifest = load_manifest(folder)
        size = sum(shard.bytes for shard in manifest.shards)
        sys.stdout.write(
            f"{folder}: {manifest.num_samples:,} samples, {len(manifest.shards)} shards, {size / 1e6:,.1f} MB, "
            f"{manifest.license}\n"
        )
        for source, info in sorted(collect(folder, model).items()):
            sys.stdout.write(_table(source, info))
    return 0


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    manifest = load_manifest(folder)
    for shard in manifest.shards:
        path = manifest.shard_path(shard)
        with path.open("rb") as stream:
            for member in walk(path):
                if isinstance(member, Damage):
                    raise DataError(f"{folder}/{member}; see `shards verify`")
                if not member.name.endswith(".json"):
                    continue
                where = f"{path}, {member.name}"
                stream.seek(member.data_offset)
                yield where, parse_record(stream.read(member.size), where=where)


def _add(info: SourceInfo, record: dict[str, Any], model: Model | None) -> None:
    texts = {"user": "", "assistant": ""}
    for turn in record["messages"]:
        role = "assistant" if turn["role"] == "assistant" else "user"
        texts[role] += message_text(turn)
    count, unit = (model.count_tokens, "tokens") if model else (len, "characters")
    info.add("turns", len(record["messages"]))
    info.add("pictures", len(record.get("images", [])))
    info.add(f"prompt {unit}", count(texts["user"]))
    info.add(f"answer {unit}", count(texts["assistant"] or " ".join(record.get("references", [])[:1])))
    visual = 0
    for image in record.get("images", []):
        info.add("width px", image["w"])
        info.add("height px", image["h"])
        if model:
            visual += count_visual_tokens(image["w"], image["h"], model.tiling, model.tokens_per_tile)
    if model:
        info.add("visual tokens", visual)


def _table(source: str, info: SourceInfo) -> str:
    lines = [f"  {source}: {info.samples:,} samples"]
    header = "".join(f"{f'{quantile} %':>9}" for quantile in QUANTILES)
    lines.append(f"    {'':<18}{header}   histogram from 0 to the largest")
    for name, values in info.measures.items():
        cells = "".join(f"{value:>9.0f}" for value in np.percentile(values, QUANTILES))
        lines.append(f"    {name:<18}{cells}   {histogram(values)}")
    return "\n".join(lines) + "\n"


def histogram(values: list[int]) -> str:
    """Draw how often values fall into equal bins from 0 to the largest, a column each."""
    counts, _ = np.histogram(values, bins=_BINS, range=(0, max([*values, 1])))
    heights = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    return "".join(_BARS[height] for height in heights)
