"""Third pass: each shard is written by one process, complete or not at all; finished ones are kept."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.utils.atomic_files import write_atomically

from ...shards.index import index_path
from ...shards.manifest import Shard
from ...shards.shard_file import OpenShard, ShardSample, record_bytes
from ...shards.writer import space_error
from .options import PackOptions
from .plan import PlannedShard
from .spool import read_spooled, unnamed
from .work_folder import WorkFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """Writes single shards; an object, as it is sent to other processes."""

    options: PackOptions

    def finished(self, planned: PlannedShard) -> Shard | None:
        """Return the entry of a shard that has already been written as it is planned, or None."""
        path, record = self._files(planned.number)
        try:
            found = json.loads(record.read_text("utf-8"))
            shard = Shard(**found["shard"])
            whole = path.stat().st_size == shard.bytes
            index = hashlib.sha256(index_path(path).read_bytes()).hexdigest()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return shard if whole and found["plan"] == planned.identity and index == shard.index_sha256 else None

    def __call__(self, planned: PlannedShard) -> Shard:
        """Write a shard and its record; raises DataError if the disk is full, or the spool is damaged."""
        path, record = self._files(planned.number)
        record.unlink(missing_ok=True)
        try:
            shard = self._write(path, planned)
            write_atomically(record, json.dumps({"plan": planned.identity, "shard": asdict(shard)}))
        except OSError as error:
            raise space_error(self.options.out, error) from error
        return shard

    def _files(self, number: int) -> tuple[Path, Path]:
        """Return the paths of a shard and of its record."""
        out = self.options.out
        return out / f"{self.options.name}-{number:05d}.tar", WorkFolder(out).packed / f"{number:06d}.json"

    def _write(self, path: Path, planned: PlannedShard) -> Shard:
        out = OpenShard(path)
        try:
            for position, place in enumerate(planned.places, start=planned.start):
                out.add(self._sample(f"{self.options.name}-{position:08d}", place))
            return out.finish()
        except BaseException:
            out.abandon()
            raise

    def _sample(self, key: str, place: Any) -> ShardSample:
        record, images = read_spooled(WorkFolder(self.options.out), place)
        if record["id"] == unnamed(self.options.name):
            record["id"] = key
        members = [(f"{key}.{ending}", data) for ending, data in images]
        return ShardSample(key=key, record=record, members=[(f"{key}.json", record_bytes(record)), *members])
