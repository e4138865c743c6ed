"""What the damage suite works with: a small whole set, its shards rewritten, and what each use of a set finds."""

import io
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alignvlm_pl.cli import main
from datamodules import CC12MDataModule, WebDataModule
from datamodules.prepare.index import index_shards
from datamodules.shards.tar_walk import Member, walk
from datamodules.shards.writer import ShardWriter
from tests.unit.tar_files import write_tar

Files = list[tuple[str, bytes]]
Skips = dict[str, dict[str, int]]
Bad = list[tuple[str, str]]

NUM_SAMPLES, PER_SHARD = 12, 4
KEYS = [f"set-{number:08d}" for number in range(NUM_SAMPLES)]
TARGET = KEYS[5]
"""The second sample of the second of three shards: what is damaged."""
SHARD = "set-00001.tar"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What must be found in a damaged set.

    Attributes:
        skipped: Training: samples left out by source and reason; or what the error says.
        bad: Evaluation: key and reason of samples that could not be read; or what the error says.
        verify: Kinds that `shards verify` prints, in order.
        keys: All samples that are there, good or bad.
    """

    skipped: Skips | str = field(default_factory=dict)
    bad: Bad | str = field(default_factory=list)
    verify: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=lambda: KEYS)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    pixels = np.random.default_rng(size[0]).integers(0, 255, (size[1] // 4 + 1, size[0] // 4 + 1, 3), np.uint8)
    return encoded(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), kind, **options)


def record(answer: str | None = "a page", **changes: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "what?"}]}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"source": "made", "images": [{"file": "0.png"}], "messages": turns} | changes


def whole_set(folder: Path, kind: str = "PNG") -> Path:
    """12 samples of a picture each in three shards, as `ShardWriter` writes them."""
    with ShardWriter(folder, name="set", source="made", license="CC0-1.0", samples_per_shard=PER_SHARD) as out:
        for number in range(NUM_SAMPLES):
            extension = {"PNG": "png", "JPEG": "jpg"}[kind]
            turns = record(f"page {number}")["messages"]
            out.add({"messages": turns}, [picture(kind, (40 + number, 30))], [extension])
    return folder


def caption_set(folder: Path) -> Path:
    """As img2dataset packs CC-12M: `jpg`, `json` and `txt` of 12 pictures, without manifest or index."""
    folder.mkdir()
    for shard in range(NUM_SAMPLES // PER_SHARD):
        files: Files = []
        for key in KEYS[shard * PER_SHARD : (shard + 1) * PER_SHARD]:
            about = json.dumps({"caption": f"a wall {key}", "url": "https://example.org", "status": "success"})
            files += [
                (f"{key}.jpg", picture("JPEG")),
                (f"{key}.json", about.encode()),
                (f"{key}.txt", f"a wall {key}".encode()),
            ]
        write_tar(folder / f"set-{shard:05d}.tar", files, kind=tarfile.USTAR_FORMAT)
    return folder


def read_tar(path: Path) -> Files:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def members(path: Path) -> list[Member]:
    return [found for found in walk(path) if isinstance(found, Member)]


def rewrite(folder: Path, change: Callable[[Files], Files]) -> None:
    """Write the second shard again; `change` gets its files without the target's, then the target's."""
    path = folder / SHARD
    files = read_tar(path)
    own = [file for file in files if file[0].startswith(TARGET)]
    at = files.index(own[0])
    rest = [file for file in files if file not in own]
    write_tar(path, rest[:at] + change(own) + rest[at:], kind=tarfile.USTAR_FORMAT)


def index_again(folder: Path, format: str) -> None:
    """Forget manifest and indexes, and make them of what is there: `prepare index`."""
    for path in [*folder.glob("*.json")]:
        path.unlink()
    index_shards(folder, name="set", source="made", license="CC0-1.0", format=format)


def data_module(folder: Path | str, processor: Any, *, captions: bool = False, **options: Any) -> WebDataModule:
    """Trains on and evaluates one set; any share of bad samples is tolerated, so that they can be counted."""
    kind = CC12MDataModule if captions else WebDataModule
    shares = {"max_skipped_share": 1.0, "max_unlabelled_share": 1.0}
    settings = {"eval_batch_size": 3, "shuffle_buffer": 0, "stall_seconds": 30, **shares, **options}
    return kind(train=[folder], benchmarks={"held": folder}, **settings).attach(processor)


def train_epoch(
    folder: Path | str, processor: Any, *, num_samples: int = NUM_SAMPLES, **options: Any
) -> tuple[Counter[str], Skips]:
    """Keys of one epoch and what was left out of it."""
    # An epoch has whole batches only, of at least two samples: one whose samples are all bad is no batch.
    size = next(number for number in range(2, num_samples + 1) if num_samples % number == 0)
    data = data_module(folder, processor, batch_size=size, **options)
    try:
        data.setup("fit")
        loader = data.train_dataloader()
        assert len(loader) == num_samples // size
        keys = Counter(key for batch in loader for key in batch["keys"])
        return keys, data.skipped
    finally:
        data.teardown()


def evaluate(folder: Path | str, processor: Any, **options: Any) -> tuple[Counter[str], Bad]:
    """Keys that are answered, and key and reason of those that cannot be."""
    data = data_module(folder, processor, **options)
    data.setup("test")
    batches = list(data.benchmark_dataloader("held"))
    keys = Counter(key for batch in batches if not batch["filler"] for key in batch["keys"])
    return keys, [(bad.key, bad.reason) for batch in batches for bad in batch["skipped"]]


def verify(folder: Path | str, capsys: Any, *, format: str = "normal") -> list[str]:
    """Kinds that `shards verify` prints; its last line and its status must agree with them."""
    capsys.readouterr()
    status = main(["shards", "verify", "--format", format, str(folder)])
    *lines, last = capsys.readouterr().out.splitlines()
    kinds = [re.search(r" \((\w+)\)$", line)[1] for line in lines]
    assert status == int(bool(kinds))
    listing = ", ".join(f"{kind}: {count}" for kind, count in Counter(kinds).most_common())
    assert last == (f"{len(kinds)} damages ({listing})" if kinds else "no damage")
    return kinds


def copied(whole: Path, folder: Path) -> Path:
    return shutil.copytree(whole, folder)
