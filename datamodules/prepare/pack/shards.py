"""Third pass: each shard is written by one process, complete or not at all; finished ones are kept."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alignvlm_pl.errors import DataError

from ...shards.index import index_path
from ...shards.manifest import Shard
from ...shards.shard_file import OpenShard, ShardSample, shard_sample
from ...shards.writer import space_error
from .plan import Plan
from .spool import SpoolFiles, read_spooled
from .work_folder import WORK_FOLDER, write_whole

_OPEN_FILES = 128


@dataclass(kw_only=True, slots=True)
class ShardJob:
    """Callable that writes one shard; it is pickled into worker processes.

    Attributes:
        out: Folder of the shards.
        spool: Folder of the spool files.
        packed: Folder of the records of finished shards.
        plan: The order.
        name: Name of the dataset.
        source: ``source`` of samples that name none.
        license: ``license`` of samples that name none.
    """

    out: Path
    spool: Path
    packed: Path
    plan: Plan
    name: str
    source: str
    license: str
    _files: "OrderedDict[int, BinaryIO]" = field(default_factory=OrderedDict, repr=False)

    def path(self, number: int) -> Path:
        """Return the path of a shard."""
        return self.out / f"{self.name}-{number:05d}.tar"

    def finished(self, number: int) -> Shard | None:
        """Return the entry of a shard that this plan has already written, or None."""
        try:
            record = json.loads(self._record(number).read_text("utf-8"))
            shard = Shard(**record["shard"])
            whole = self.path(number).stat().st_size == shard.bytes
            index = hashlib.sha256(index_path(self.path(number)).read_bytes()).hexdigest()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        good = whole and record["plan"] == self.plan.identity and index == shard.index_sha256
        return shard if good else None

    def __call__(self, number: int) -> Shard:
        """Write a shard and its record.

        Raises:
            DataError: The disk is full, or an image or spool file has changed.
        """
        start, end = self.plan.cuts[number], self.plan.cuts[number + 1]
        places = np.load(self.plan.path, mmap_mode="r", allow_pickle=False)[start:end]
        self._record(number).unlink(missing_ok=True)
        try:
            shard = self._write(number, start, places)
            content = {"plan": self.plan.identity, "shard": asdict(shard)}
            write_whole(self._record(number), json.dumps(content).encode())
        except OSError as error:
            raise space_error(self.out, error) from error
        finally:
            self._close()
        return shard

    def _write(self, number: int, start: int, places: np.ndarray) -> Shard:
        out = OpenShard(self.path(number))
        try:
            for position, place in enumerate(places, start=start):
                out.add(self._sample(position, place))
            return out.finish()
        except BaseException:
            out.abandon()
            raise

    def _sample(self, position: int, place: Any) -> ShardSample:
        stream = self._spool_file(int(place["part"]))
        record, images, known = read_spooled(stream, int(place["offset"]), int(place["length"]))
        key = f"{self.name}-{position:08d}"
        sample = shard_sample(
            record,
            images,
            [image["extension"] for image in known],
            key=key,
            source=self.source,
            license=self.license,
            sizes=[(image["w"], image["h"]) for image in known],
        )
        for image, described in zip(known, sample.record["images"], strict=True):
            if image["sha256"] != described["sha256"]:
                raise DataError(
                    f"{image['path'] or stream.name} has changed since its row was read; remove the folder "
                    f"{WORK_FOLDER} of {self.out} and start again"
                )
        return sample

    def _spool_file(self, part: int) -> BinaryIO:
        """Return the open spool file of a part; the least recently used one is closed if too many are open."""
        if part in self._files:
            self._files.move_to_end(part)
            return self._files[part]
        if len(self._files) >= _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        self._files[part] = SpoolFiles(folder=self.spool, number=part).samples.open("rb", buffering=0)
        return self._files[part]

    def _close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _record(self, number: int) -> Path:
        return self.packed / f"{number:06d}.json"


def shards_left(job: ShardJob) -> tuple[dict[int, Shard], Sequence[int]]:
    """Return the finished shards by number, and the numbers of the others."""
    done = {number: shard for number in range(job.plan.num_shards) if (shard := job.finished(number)) is not None}
    return done, [number for number in range(job.plan.num_shards) if number not in done]
