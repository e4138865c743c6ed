"""`pack`: raw data -> globally shuffled shards in three passes: spool the parts, plan the order, write the shards.

Each pass can be interrupted at any moment and is continued by the next run. The order depends on the seed and on the
names of parts and rows only, so neither the number of processes nor interruptions change a byte. Scripts that call
`pack` with several workers need Python's usual `if __name__ == "__main__":`.
"""

import argparse
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.utils.atomic_files import printable

from ...shards.index import index_path
from ...shards.manifest import MANIFEST_NAME, Manifest, Shard, load_manifest, read_manifest, write_manifest
from ...shards.sample import SampleError
from ...shards.writer import check_space, is_part_of, space_error
from ..sources.source import Part, PartlySpooled, RawData
from .locks import hold_shared
from .options import PackOptions
from .overlap import BenchmarkImages, folder_identity, read_benchmark_images
from .plan import Plan, load_ids, load_image_checksums, make_plan, repeated_positions
from .report import MAX_REPORTED, PartReport, merge_reports
from .shards import ShardJob, shards_left
from .spool import ROW, SpoolFiles, SpoolJob, read_spooled
from .work_folder import WorkFolder, identity_of, input_files, write_whole

Result = TypeVar("Result")
_job: Callable[..., Any] | None = None
"""The job of this worker process, set when it starts."""


def run_jobs(
    job: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, workers: int, lock: Path
) -> Generator[Result, None, None]:
    """Yield `job(*task)` for each task, in the order of the tasks.

    Args:
        job: Pickled once into each process.
        tasks: Arguments, small.
        workers: Processes; with 1, or for a single task, the jobs run in this process.
        lock: File that each process keeps locked while it lives.

    Raises:
        DataError: A process was killed, or what the first failing task raised.
    """
    if workers < 2 or len(tasks) < 2:
        for task in tasks:
            yield job(*task)
        return
    # Not forked: a copy of a process with threads, such as that of a progress bar, may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=_start, initargs=(job, lock))
    try:
        futures = deque(pool.submit(_run, task) for task in tasks)
        while futures:
            yield futures.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} processes was killed, most likely for its memory; run the same command again to resume, "
            "with fewer --workers if it happens again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(job: Callable[..., Any], lock: Path) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    hold_shared(lock)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _run(task: tuple[Any, ...]) -> Any:
    assert _job is not None  # set by _start
    return _job(*task)


def _end_with_parent() -> None:
    """Exit when the parent process ends, whatever the reason: nobody would wait for the result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


logger = logging.getLogger(__name__)
REPORT_NAME = "report.json"
_OVERHEAD = 3 * 512
"""Bytes that a shard adds to a sample, about: headers, padding."""
_PARTS_OF_A_WORKER = 4
"""Parts a process is given at once where a limit of rows may end the reading with any of them."""


class NothingUsable(DataError):
    """No row of the data is a valid sample."""


class Engine:
    """One run of `pack`."""

    def __init__(self, raw: RawData, options: PackOptions) -> None:
        self.raw = raw
        self.options = options
        self.work = WorkFolder(options.out)
        self.parts: Sequence[Part] = ()

    def run(self) -> Manifest:
        """Run what is not done yet and return the manifest of the dataset.

        Raises:
            ConfigError: Settings do not fit the data.
            DataError: Unusable data, a full disk, a dataset that exists, or with `strict` an invalid row.
        """
        options, out = self.options, self.options.out
        self.parts = self.raw.parts()
        known = [folder_identity(folder) for folder in options.overlap_with]
        identity = identity_of(self.raw, self.parts, options, known)
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
        except (SampleError, NothingUsable):
            # The data must change, so this work cannot be reused.
            self.work.remove()
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
                _clear(out, self.options.dataset_name)
                self.work.begin(identity)
        except OSError as error:
            raise space_error(out, error) from error

    def _pack(self) -> Manifest:
        known = read_benchmark_images(self.options.overlap_with, self.work.path) if self.options.overlap_with else None
        reports = self._spool(known)
        numbers = range(len(reports))
        total = merge_reports(reports)
        if not total.written:
            first = total.problems[0]["message"] if total.problems else "there is no row"
            raise NothingUsable(
                f"{self.raw.name}: none of {total.read} records is usable ({total.skipped}); the first: {first}"
            )
        repeated = self._repeated_ids(numbers)
        samples_of_image = np.unique(load_image_checksums(self.work.spool, numbers), return_counts=True)[1]
        images = {
            "stored": total.images,
            "distinct": len(samples_of_image),
            "in_several_samples": int((samples_of_image > 1).sum()),
        }
        plan = make_plan(
            self.work.spool,
            numbers,
            self.work.path / "plan.npy",
            samples_per_shard=self.options.samples_per_shard,
            shard_bytes=self.options.shard_bytes,
        )
        shards = self._write_shards(plan)
        return self._finish(shards, total, images, repeated)

    def _spool(self, known: BenchmarkImages | None) -> list[PartReport]:
        """Run the first pass and return the report of each part."""
        job = SpoolJob(
            raw=self.raw,
            folder=self.work.spool,
            name=self.options.dataset_name,
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
        """Return the number of rows of all parts, or None if a part does not know its own."""
        rows = [part.rows for part in self.parts]
        return None if None in rows else sum(number or 0 for number in rows)

    def _spool_parts(self, job: SpoolJob, bar: Any) -> list[PartReport]:
        """Spool the parts in order until the limit of rows is reached; with a limit, in waves of parts."""
        remaining = self.options.limit
        wave = max(1, len(self.parts) if remaining is None else self._wave(remaining))
        reports: list[PartReport] = []
        for start in range(0, len(self.parts), wave):
            numbers = range(start, min(start + wave, len(self.parts)))
            files = {number: SpoolFiles(folder=self.work.spool, number=number).report for number in numbers}
            done = {n: PartReport.from_json(file.read_bytes()) for n, file in files.items() if file.exists()}
            # Each task holds its part only: all parts of millions of files in every process would fill the memory.
            tasks = [(n, self.parts[n], self.options.limit) for n in numbers if n not in done]
            workers, lock = self.options.workers, self.work.workers_lock
            with closing(run_jobs(job, tasks, workers=workers, lock=lock)) as fresh:
                for number in numbers:
                    report = done.get(number) or next(fresh)
                    if remaining is not None and report.read > remaining:
                        files[number].unlink()
                        report = job(number, self.parts[number], remaining)
                    reports.append(report)
                    bar.update(report.read if bar.unit == "row" else 1)
                    remaining = None if remaining is None else remaining - report.read
                    if remaining == 0:
                        return reports
        return reports

    def _wave(self, limit: int) -> int:
        """Return how many parts to start at once: enough for `limit` rows, if the parts know their rows."""
        rows = 0
        for number, part in enumerate(self.parts, start=1):
            if part.rows is None:
                return _PARTS_OF_A_WORKER * self.options.workers
            rows += part.rows
            if rows >= limit:
                return number
        return len(self.parts)

    def _repeated_ids(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Count samples whose id an earlier sample has, and list the first.

        Raises:
            SampleError: There is one, with `strict`.
        """
        repeated = repeated_positions(load_ids(self.work.spool, numbers))
        first = [self._id_at(numbers, int(place)) for place in repeated[:MAX_REPORTED]]
        if first and self.options.strict:
            raise SampleError(
                f"{first[0]['part']}: id {first[0]['id']!r} is already used by an earlier row", "repeated_id"
            )
        return {"samples": len(repeated), "first": first}

    def _id_at(self, numbers: Sequence[int], place: int) -> dict[str, Any]:
        """Return part and id of the sample at an index over all parts."""
        for number in numbers:
            files = SpoolFiles(folder=self.work.spool, number=number)
            rows = np.load(files.rows, mmap_mode="r", allow_pickle=False)
            if place < len(rows):
                row = np.array(rows[place], dtype=ROW)
                with files.samples.open("rb") as stream:
                    record, _, _ = read_spooled(stream, int(row["offset"]), int(row["length"]))
                return {"part": self.parts[number].name, "id": record["id"]}
            place -= len(rows)
        raise IndexError(place)

    def _write_shards(self, plan: Plan) -> list[Shard]:
        """Run the third pass and return the entries of all shards."""
        job = ShardJob(
            out=self.options.out,
            spool=self.work.spool,
            packed=self.work.packed,
            plan=plan,
            name=self.options.dataset_name,
            source=self.options.source or self.raw.source,
            license=self.options.license or self.raw.license,
        )
        shards, missing = shards_left(job)
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
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        write_whole(options.out / REPORT_NAME, printable(text).encode())
        manifest = Manifest(
            folder=options.out,
            name=options.dataset_name,
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
                "skipped_first": dict(sorted(total.skipped.messages.items())),
                "pictures": images,
                "repeated_ids": repeated["samples"],
                "benchmark_overlap": overlap,
            },
        )
        write_manifest(manifest)
        return load_manifest(options.out)

    def _check_disk(self, resumable: bool) -> None:
        """Compare the bytes to write with the free space before anything is written.

        Raises:
            DataError: Too little space is free.
        """
        needed = self.raw.input_bytes() + _OVERHEAD * (self._rows() or 0)
        spooled = self.raw.spool_bytes() if isinstance(self.raw, PartlySpooled) else needed
        if self.options.limit is not None:
            rows = self._rows()
            # If the number of rows is unknown, the check waits for the plan.
            share = min(1.0, self.options.limit / rows) if rows else 0.0
            needed, spooled = int(needed * share), int(spooled * share)
        written = self.work.size() if resumable else 0
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
    """Write raw data as globally shuffled shards.

    Args:
        raw: The data.
        options: The settings, or the namespace of a parser with `add_options`.

    Returns:
        The manifest of the new dataset.

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
