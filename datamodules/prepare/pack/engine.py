"""`pack`: raw data -> globally shuffled shards in three passes: spool the parts, plan the order, write the shards.

Each pass can be interrupted at any moment and is continued by the next run. The order depends on the seed and on the
names of parts and rows only, so neither the number of processes nor interruptions change a byte. Scripts that call
`pack` with several workers need Python's usual `if __name__ == "__main__":`.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.utils.atomic_files import write_atomically

from ...shards.index import index_path
from ...shards.manifest import MANIFEST_NAME, Manifest, Shard, load_manifest, read_manifest, write_manifest
from ...shards.sample import SampleError
from ...shards.writer import check_space, is_part_of, space_error
from ..sources.source import Part, RawData
from .options import PackOptions
from .overlap import folder_identity, read_benchmark_images
from .plan import PlannedShard, make_plan, repeated_positions
from .report import MAX_REPORTED, PartReport, merge_reports
from .shards import ShardJob
from .spool import SpoolJob, read_spooled
from .work_folder import WorkFolder, identity_of, input_files, lock_file

Result = TypeVar("Result")
REPORT_NAME = "report.json"
_OVERHEAD = 3 * 512
"""Bytes that a shard adds to a sample, about: headers, padding."""
_PARTS_OF_A_WORKER = 4
"""Parts a process is given at once where a limit of rows may end the reading with any of them, as rows are unknown."""
_job: Callable[..., Any] | None = None
"""The job of this worker process, set when it starts."""


def run_jobs(
    job: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, workers: int, lock: Path
) -> Generator[Result, None, None]:
    """Yield `job(*task)` for each task, in the order of the tasks.

    The job is pickled once into each process, which keeps the file `lock` locked while it lives. With one worker, or
    for a single task, there are no processes.

    Raises:
        DataError: A process was killed; else what the first failing task raises.
    """
    workers = min(workers, len(tasks))
    if workers < 2:
        for task in tasks:
            yield job(*task)
        return
    # Not forked: a copy of a process with threads, such as that of a progress bar, may hang.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(job, lock)) as pool:
            yield from pool.map(_run, tasks)
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} processes was killed, most likely for its memory; run the same command again to resume, "
            "with fewer --workers if it happens again"
        ) from error


def _start(job: Callable[..., Any], lock: Path) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    locked = lock_file(lock, shared=True, patience_s=1.0)
    threading.Thread(target=_end_with_parent, args=(locked,), daemon=True).start()


def _run(task: tuple[Any, ...]) -> Any:
    assert _job is not None  # set by _start
    return _job(*task)


def _end_with_parent(locked: BinaryIO) -> None:
    """Keep the lock until the parent process ends, whatever the reason, and exit: nobody would wait for the result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class Engine:
    """One run of `pack`."""

    def __init__(self, raw: RawData, options: PackOptions) -> None:
        self.raw = raw
        self.options = replace(options, source=options.source or raw.source, license=options.license or raw.license)
        self.work = WorkFolder(options.out)
        self.parts: Sequence[Part] = ()
        self.rows: int | None = None  # of all parts, where each knows its own

    def run(self) -> Manifest:
        """Run what is not done yet and return the manifest of the dataset; raises as `pack`."""
        options, out = self.options, self.options.out
        self.parts = self.raw.parts()
        rows = [part.rows for part in self.parts]
        self.rows = None if None in rows else sum(filter(None, rows))
        identity = identity_of(self.raw, self.parts, options, list(map(folder_identity, options.overlap_with)))
        resumable = self.work.belongs_to(identity)
        if (out / MANIFEST_NAME).exists():
            if resumable:  # finished, but the working folder was not removed
                self.work.remove()
                return load_manifest(out)
            if not options.overwrite:
                raise DataError(f"{out} already holds a finished dataset; choose another folder or allow overwriting")
        for path in input_files(self.raw, self.parts):
            if path.suffix == ".tar" and path.parent.resolve() == out.resolve():
                raise ConfigError(
                    f"{out} holds the input {path.name}, which a dataset could replace; choose another folder"
                )
        self._check_disk(resumable)
        try:
            self._begin(identity)
            manifest = self._pack()
        except SampleError:
            self.work.remove()  # the data must change, so this work cannot be reused
            raise
        finally:
            self.work.close()
        self.work.remove()
        return manifest

    def _begin(self, identity: dict[str, Any]) -> None:
        """Create the folders and remove other datasets from them."""
        out = self.options.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.work.lock()
            if not self.work.belongs_to(identity):
                # In this order: an identity file means that no other dataset is left in the folder.
                self.work.clear()
                _clear(out, self.options.name)
                self.work.begin(identity)
        except OSError as error:
            raise space_error(out, error) from error

    def _pack(self) -> Manifest:
        options = self.options
        reports = self._spool()
        total = merge_reports(reports)
        if not total.written:
            self.work.remove()
            first = total.problems[0]["message"] if total.problems else "there is no row"
            raise DataError(
                f"{self.raw.name}: none of {total.read} records is usable ({total.skipped}); the first: {first}"
            )
        rows = self.work.load_parts(range(len(reports)), "rows.npy")
        repeated = self._repeated_ids(rows)
        plan = make_plan(rows, samples_per_shard=options.samples_per_shard, shard_bytes=options.shard_bytes)
        del rows
        checksums = self.work.load_parts(range(len(reports)), "images.npy")
        samples_of_image = np.unique(checksums, return_counts=True)[1]
        images = {
            "stored": total.images,
            "distinct": len(samples_of_image),
            "in_several_samples": int((samples_of_image > 1).sum()),
        }
        return self._finish(self._write_shards(plan), total, images, repeated)

    def _spool(self) -> list[PartReport]:
        """Run the first pass and return the report of each part."""
        limit, overlap_with = self.options.limit, self.options.overlap_with
        known = read_benchmark_images(overlap_with, self.work.path) if overlap_with else None
        job = SpoolJob(raw=self.raw, options=self.options, known=known)
        total, unit = (len(self.parts), "part") if self.rows is None else (min(self.rows, limit or self.rows), "row")
        with tqdm(total=total, unit=unit, desc="read") as bar:
            return self._spool_parts(job, bar)

    def _spool_parts(self, job: SpoolJob, bar: Any) -> list[PartReport]:
        """Spool the parts in order until the limit of rows is reached; with a limit, in waves of parts."""
        options = self.options
        remaining = math.inf if options.limit is None else options.limit
        wave = bisect_left(list(accumulate(part.rows or 0 for part in self.parts)), remaining) + 1
        if self.rows is None and options.limit is not None:
            wave = _PARTS_OF_A_WORKER * options.workers
        reports: list[PartReport] = []
        for start in range(0, len(self.parts), wave):
            numbers = range(start, min(start + wave, len(self.parts)))
            files = {number: self.work.part_file(number, "json") for number in numbers}
            done = {n: PartReport.from_json(file.read_bytes()) for n, file in files.items() if file.exists()}
            # Each task holds its part only: all parts of millions of files in every process would fill the memory.
            tasks = [(n, self.parts[n], options.limit) for n in numbers if n not in done]
            with closing(run_jobs(job, tasks, workers=options.workers, lock=self.work.workers_lock)) as fresh:
                for number in numbers:
                    report = done.get(number) or next(fresh)
                    if report.read > remaining:
                        files[number].unlink()
                        report = job(number, self.parts[number], int(remaining))
                    reports.append(report)
                    bar.update(report.read if bar.unit == "row" else 1)
                    remaining -= report.read
                    if not remaining:
                        return reports
        return reports

    def _repeated_ids(self, rows: np.ndarray) -> dict[str, Any]:
        """Count samples whose id an earlier sample has, and list the first; with `strict` it is an error."""
        repeated = repeated_positions(rows["id"])
        first = []
        for row in rows[repeated[:MAX_REPORTED]]:
            part = int(row["part"])
            record, _, _ = read_spooled(self.work.part_file(part, "bin"), int(row["offset"]), int(row["length"]))
            first.append({"part": self.parts[part].name, "id": record["id"]})
        if first and self.options.strict:
            raise SampleError(
                f"{first[0]['part']}: id {first[0]['id']!r} is already used by an earlier row", "repeated_id"
            )
        return {"samples": len(repeated), "first": first}

    def _write_shards(self, plan: Sequence[PlannedShard]) -> list[Shard]:
        """Run the third pass and return the entries of all shards."""
        job = ShardJob(options=self.options)
        shards = [job.finished(planned) for planned in plan]
        missing = [planned for planned, shard in zip(plan, shards, strict=True) if shard is None]
        check_space(self.options.out, sum(planned.bytes for planned in missing))
        tasks = [(planned,) for planned in missing]
        written = run_jobs(job, tasks, workers=self.options.workers, lock=self.work.workers_lock)
        finished: list[Shard] = []
        with tqdm(total=sum(len(planned.places) for planned in plan), unit="sample", desc="write") as bar:
            for shard in shards:
                finished.append(shard or next(written))
                bar.update(finished[-1].num_samples)
        return finished

    def _finish(
        self, shards: list[Shard], total: PartReport, images: dict[str, int], repeated: dict[str, Any]
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
            "skipped": dict(sorted(total.skipped.counts.items())),
            "problems": total.problems,
            "pictures": images,
            "repeated_ids": repeated,
            "benchmark_overlap": overlap | {"first": total.overlap_first},
        }
        write_atomically(options.out / REPORT_NAME, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        manifest = Manifest(
            folder=options.out,
            name=options.name,
            source=options.source,
            license=options.license,
            num_samples=total.written,
            shards=tuple(shards),
            sources=dict(total.sources),
            extra={
                "seed": options.seed,
                "origin": self.raw.name,
                "read": total.read,
                "skipped": report["skipped"],
                "skipped_first": dict(sorted(total.skipped.messages.items())),
                "pictures": images,
                "repeated_ids": repeated["samples"],
                "benchmark_overlap": overlap,
            },
        )
        write_manifest(manifest)
        return load_manifest(options.out)

    def _check_disk(self, resumable: bool) -> None:
        """Raise DataError where the bytes to write exceed the free space, before anything is written."""
        needed = self.raw.input_bytes() + _OVERHEAD * (self.rows or 0)
        spool_bytes = getattr(self.raw, "spool_bytes", None)
        spooled = spool_bytes() if spool_bytes else needed
        if self.options.limit is not None:
            # If the number of rows is unknown, the check waits for the plan.
            share = min(1.0, self.options.limit / self.rows) if self.rows else 0.0
            needed, spooled = int(needed * share), int(spooled * share)
        written = sum(path.stat().st_size for path in self.work.spool.glob("*")) if resumable else 0
        folder = next(path for path in (self.options.out, *self.options.out.absolute().parents) if path.is_dir())
        check_space(folder, max(needed + spooled - written, 0))


def _clear(out: Path, name: str) -> None:
    """Remove a finished dataset that is replaced, and files that killed runs left under the same name."""
    if (out / MANIFEST_NAME).exists():
        try:
            listed = [out / shard.path for shard in read_manifest(out).shards]
        except DataError:  # unreadable, but replaced anyway
            listed = []
        (out / MANIFEST_NAME).unlink()
        for path in listed:
            path.unlink(missing_ok=True)
            index_path(path).unlink(missing_ok=True)
        (out / REPORT_NAME).unlink(missing_ok=True)
    for leftover in out.iterdir():
        if is_part_of(name, leftover.name):
            leftover.unlink()


def pack(raw: RawData, options: PackOptions | argparse.Namespace) -> Manifest:
    """Write raw data as globally shuffled shards and return the manifest of the new dataset.

    Args:
        raw: The data.
        options: The settings, or the namespace of a parser with `add_options`.

    Raises:
        ConfigError: Settings are wrong or do not fit the data.
        DataError: Unusable data, a full disk, a dataset that exists, or with `strict` an invalid row.
    """
    return Engine(raw, options if isinstance(options, PackOptions) else PackOptions.from_args(options)).run()


def print_yield(manifest: Manifest) -> None:
    """Print what was written and what was skipped, from the manifest that `Engine` writes."""
    extra = manifest.extra
    lines = [f"{manifest.num_samples} samples in {len(manifest.shards)} shards: {manifest.folder}"]
    lines += [f"  {source}: {number}" for source, number in sorted(manifest.sources.items())]
    lines.append(f"read: {extra['read']} rows")
    lines += [f"skipped: {count} ({reason})" for reason, count in extra["skipped"].items()]
    images = extra["pictures"]
    lines.append(
        f"images: {images['stored']}, {images['distinct']} of them distinct, {images['in_several_samples']} in "
        "several samples"
    )
    if extra["repeated_ids"]:
        lines.append(f"repeated ids: {extra['repeated_ids']}")
    overlap = extra["benchmark_overlap"]
    if overlap["compared_with"]:
        state = "skipped" if overlap["dropped"] else "kept"
        lines.append(f"samples with an image that resembles one of a benchmark: {overlap['samples']} ({state})")
    lines.append(f"details: {manifest.where(REPORT_NAME)}")
    sys.stdout.write("\n".join(lines) + "\n")
