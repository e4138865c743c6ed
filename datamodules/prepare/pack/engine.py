"""Raw data -> shards in three passes: spool the parts, plan the order, write the shards.

Each pass can be cut off at any moment and goes on where it was. The order depends on the seed and on names of parts and
rows only, so neither the number of processes nor interruptions change a byte.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from alignvlm_pl.errors import ConfigError, DataError

from ...shards.index import index_path
from ...shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    load_manifest,
    read_manifest,
    write_manifest,
)
from ...shards.sample import SampleError
from ...shards.writer import check_space, is_part_of, space_error
from .options import PackOptions
from .overlap import KnownPictures, describe_folder, read_known
from .plan import (
    Plan,
    Repeats,
    count_repeats,
    first_repeats,
    load_ids,
    load_pictures,
    make_plan,
)
from .pool import run_jobs
from .report import MAX_REPORTED, PartReport, add_up, listing
from .shards import ShardJob, unfinished
from .source import Part, PartlySpooled, RawData
from .spool import ROW, SpoolFiles, SpoolJob, read_record
from .work_folder import WorkFolder, identity_of, input_files, write_whole

logger = logging.getLogger(__name__)
REPORT_NAME = "report.json"
_OVERHEAD = 3 * 512
"""Bytes that a shard adds to a sample, about: headers, padding."""
_PARTS_OF_A_WORKER = 4
"""Parts a process is given at once where a limit of rows may end the reading with any of them."""


class NothingUsable(DataError):
    """No row of the data became a sample."""


class Engine:
    """One packing."""

    def __init__(self, raw: RawData, options: PackOptions) -> None:
        self.raw = raw
        self.options = options
        self.work = WorkFolder(options.out)
        self.parts: Sequence[Part] = ()

    def run(self) -> Manifest:
        """Do all that is not done yet, and return the manifest of the set.

        Raises:
            ConfigError: Settings do not fit the data.
            DataError: The data is unusable, with `strict` a bad row, the disk too small, or the set is there already.
        """
        options, out = self.options, self.options.out
        self.parts = self.raw.parts()
        known = [describe_folder(folder) for folder in options.overlap_with]
        identity = identity_of(self.raw, self.parts, options, known)
        ours = self.work.belongs_to(identity)
        if (out / MANIFEST_NAME).exists():
            if ours:  # it was finished, but not its cleaning up
                self.work.remove()
                return load_manifest(out)
            if not options.overwrite:
                raise DataError(
                    f"{out} already holds a finished set; choose another folder or allow overwriting"
                )
        for path in input_files(self.raw, self.parts):
            if path.suffix == ".tar" and path.parent.resolve() == out.resolve():
                raise ConfigError(
                    f"{out} holds the input {path.name}, which a set of shards could replace; choose another folder"
                )
        self._check_disk(ours)
        try:
            self._begin(identity)
            manifest = self._pack()
        except (SampleError, NothingUsable):
            # The data has to change, and then nothing of this can be used.
            self.work.remove()
            raise
        finally:
            self.work.close()
        self.work.remove()
        return manifest

    def _begin(self, identity: dict[str, Any]) -> None:
        """Make the folders ready, and free of other sets."""
        out = self.options.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.work.lock()
            if not self.work.belongs_to(identity):
                # In this order: where the work is ours, no other set is left in the folder.
                self.work.clear()
                _clear(out, self.options.set_name)
                self.work.begin(identity)
        except OSError as error:
            raise space_error(out, error) from error

    def _pack(self) -> Manifest:
        known = read_known(self.options.overlap_with, self.work.path) if self.options.overlap_with else None
        reports = self._spool(known)
        numbers = range(len(reports))
        total = add_up(reports)
        if not total.written:
            first = total.problems[0]["message"] if total.problems else "there is no row"
            raise NothingUsable(
                f"{self.raw.name}: none of {total.read} records is usable ({listing(total.skipped)}); see the first: "
                f"{first}"
            )
        repeated = self._repeated_ids(numbers)
        pictures = count_repeats(load_pictures(self.work.spool, numbers))
        plan = make_plan(
            self.work.spool,
            numbers,
            self.work.path / "plan.npy",
            samples_per_shard=self.options.samples_per_shard,
            shard_bytes=self.options.shard_bytes,
        )
        shards = self._write_shards(plan)
        return self._finish(shards, total, pictures, repeated)

    def _spool(self, known: KnownPictures | None) -> list[PartReport]:
        """Do the first pass and return what became of the rows of each part."""
        job = SpoolJob(
            raw=self.raw,
            folder=self.work.spool,
            name=self.options.set_name,
            source=self.options.source or self.raw.source,
            license=self.options.license or self.raw.license,
            seed=self.options.seed,
            strict=self.options.strict,
            known=known,
            drop_overlap=self.options.drop_overlap,
        )
        rows = self._rows()
        if rows is None:
            total, unit = len(self.parts), "part"
        else:
            total, unit = min(rows, self.options.limit or rows), "row"
        with tqdm(total=total, unit=unit, desc="read") as bar:
            return self._spool_parts(job, bar)

    def _rows(self) -> int | None:
        """Rows of all parts, where each says so."""
        rows = [part.rows for part in self.parts]
        return None if None in rows else sum(number or 0 for number in rows)

    def _spool_parts(self, job: SpoolJob, bar: Any) -> list[PartReport]:
        """Spool part after part until the limit of rows is reached; a wave of parts at a time where there is one."""
        remaining = self.options.limit
        wave = max(1, len(self.parts) if remaining is None else self._wave(remaining))
        reports: list[PartReport] = []
        for start in range(0, len(self.parts), wave):
            numbers = range(start, min(start + wave, len(self.parts)))
            done = {number: report for number in numbers if (report := self._spooled(number))}
            # Each with its part alone: all parts of millions of files in every process would fill the memory.
            tasks = [(n, self.parts[n], self.options.limit) for n in numbers if n not in done]
            workers, lock = self.options.workers, self.work.workers_lock
            with closing(run_jobs(job, tasks, workers=workers, lock=lock)) as fresh:
                for number in numbers:
                    report = done.get(number) or next(fresh)
                    if remaining is not None and report.read > remaining:
                        SpoolFiles(folder=self.work.spool, number=number).report.unlink()
                        report = job(number, self.parts[number], remaining)
                    reports.append(report)
                    bar.update(report.read if bar.unit == "row" else 1)
                    remaining = None if remaining is None else remaining - report.read
                    if remaining == 0:
                        return reports
        return reports

    def _wave(self, limit: int) -> int:
        """Parts that are worth starting at once: those that hold `limit` rows, where parts say how many."""
        rows = 0
        for number, part in enumerate(self.parts, start=1):
            if part.rows is None:
                return _PARTS_OF_A_WORKER * self.options.workers
            rows += part.rows
            if rows >= limit:
                return number
        return len(self.parts)

    def _spooled(self, number: int) -> PartReport | None:
        """Return the report of a part that is finished already."""
        path = SpoolFiles(folder=self.work.spool, number=number).report
        return PartReport.from_json(path.read_bytes()) if path.exists() else None

    def _repeated_ids(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Count ids that earlier samples have, and name the first.

        Raises:
            SampleError: There is one, with `strict`.
        """
        ids = load_ids(self.work.spool, numbers)
        further = count_repeats(ids[ids != 0]).further
        first = [self._id_at(numbers, place) for place in first_repeats(ids, MAX_REPORTED)] if further else []
        if first and self.options.strict:
            raise SampleError(
                f"{first[0]['part']}: id {first[0]['id']!r} is that of an earlier row", "repeated_id"
            )
        return {"samples": further, "first": first}

    def _id_at(self, numbers: Sequence[int], place: int) -> dict[str, Any]:
        """Read the id of a sample back."""
        for number in numbers:
            files = SpoolFiles(folder=self.work.spool, number=number)
            rows = np.load(files.rows, mmap_mode="r", allow_pickle=False)
            if place < len(rows):
                row = np.array(rows[place], dtype=ROW)
                with files.samples.open("rb") as stream:
                    record, _, _ = read_record(stream, int(row["offset"]), int(row["length"]))
                return {"part": self.parts[number].name, "id": record["id"]}
            place -= len(rows)
        raise IndexError(place)

    def _write_shards(self, plan: Plan) -> list[Shard]:
        """Do the third pass and return the entries of all shards."""
        job = ShardJob(
            out=self.options.out,
            spool=self.work.spool,
            packed=self.work.packed,
            plan=plan,
            name=self.options.set_name,
            source=self.options.source or self.raw.source,
            license=self.options.license or self.raw.license,
        )
        shards, missing = unfinished(job)
        check_space(self.options.out, sum(plan.bytes[number] for number in missing))
        with tqdm(total=plan.cuts[-1], unit="sample", desc="write") as bar:
            bar.update(sum(shard.num_samples for shard in shards.values()))
            tasks = [(number,) for number in missing]
            written = run_jobs(job, tasks, workers=self.options.workers, lock=self.work.workers_lock)
            for number, shard in zip(missing, written, strict=True):
                shards[number] = shard
                bar.update(shard.num_samples)
        return [shards[number] for number in range(plan.num_shards)]

    def _finish(
        self, shards: list[Shard], total: PartReport, pictures: Repeats, repeated: dict[str, Any]
    ) -> Manifest:
        """Write report and manifest."""
        options = self.options
        overlap = {
            "compared_with": [str(folder) for folder in options.overlap_with],
            "samples": total.overlap,
            "dropped": options.drop_overlap,
        }
        report = {
            "read": total.read,
            "written": total.written,
            "skipped": dict(sorted(total.skipped.items())),
            "problems": total.problems,
            "pictures": {
                "stored": total.pictures,
                "distinct": pictures.distinct,
                "in_several_samples": pictures.repeated,
            },
            "repeated_ids": repeated,
            "benchmark_overlap": overlap | {"first": total.overlap_first},
        }
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        write_whole(options.out / REPORT_NAME, text.encode())
        manifest = Manifest(
            folder=options.out,
            name=options.set_name,
            source=options.source or self.raw.source,
            license=options.license or self.raw.license,
            num_samples=total.written,
            shards=tuple(shards),
            sources=dict(total.sources),
            extra={
                "seed": options.seed,
                "origin": self.raw.name,
                "read": total.read,
                "skipped": report["skipped"],
                "skipped_first": dict(sorted(total.skipped_first.items())),
                "pictures": report["pictures"],
                "repeated_ids": repeated["samples"],
                "benchmark_overlap": overlap,
            },
        )
        write_manifest(manifest)
        return load_manifest(options.out)

    def _check_disk(self, ours: bool) -> None:
        """Compare what will be written with what is free, before anything is.

        Raises:
            DataError: There is less.
        """
        needed = self.raw.input_bytes() + _OVERHEAD * (self._rows() or 0)
        spooled = self.raw.spool_bytes() if isinstance(self.raw, PartlySpooled) else needed
        if self.options.limit is not None:
            rows = self._rows()
            # Where nothing is known, the plan will tell.
            share = min(1.0, self.options.limit / rows) if rows else 0.0
            needed, spooled = int(needed * share), int(spooled * share)
        written = self.work.size() if ours else 0
        folder = next(
            path for path in (self.options.out, *self.options.out.absolute().parents) if path.is_dir()
        )
        check_space(folder, max(needed + spooled - written, 0))


def _clear(out: Path, name: str) -> None:
    """Remove a finished set that is to be replaced, and what killed runs left of one with this name."""
    if (out / MANIFEST_NAME).exists():
        try:
            listed = [out / shard.path for shard in read_manifest(out).shards]
        except DataError:  # it is to be replaced, whatever it is
            listed = []
        (out / MANIFEST_NAME).unlink()
        for path in listed:
            path.unlink(missing_ok=True)
            index_path(path).unlink(missing_ok=True)
        (out / REPORT_NAME).unlink(missing_ok=True)
    for leftover in out.iterdir():
        if is_part_of(name, leftover.name):
            leftover.unlink()
