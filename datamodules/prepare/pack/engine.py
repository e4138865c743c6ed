"""`pack`: raw data -> globally shuffled shards in three passes: convert the rows, plan the order, write the shards.

Each pass can be interrupted at any moment and is continued by the next run. The order depends on the seed and on the
numbers of the rows only, so neither the number of processes nor interruptions change a byte. Scripts that call `pack`
with several workers need Python's usual `if __name__ == "__main__":`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.utils.atomic_files import write_atomically

from ...shards.index import index_path
from ...shards.manifest import MANIFEST_NAME, Manifest, Shard, load_manifest, read_manifest, write_manifest
from ...shards.sample import SampleError
from ...shards.writer import check_space, is_part_of, space_error
from ..sources.source import RawData
from .options import PackOptions
from .overlap import folder_identity, read_benchmark_images
from .plan import PlannedShard, make_plan, repeated_positions
from .processes import run_jobs
from .report import MAX_REPORTED, Report
from .shards import ShardJob
from .spool import ConvertJob, Spool, read_spooled
from .work_folder import WorkFolder, identity_of

REPORT_NAME = "report.json"


class Engine:
    """One run of `pack`."""

    def __init__(self, raw: RawData, options: PackOptions) -> None:
        self.raw = raw
        self.options = replace(options, source=options.source or raw.source, license=options.license or raw.license)
        self.work = WorkFolder(options.out)

    def run(self) -> Manifest:
        """Run what is not done yet and return the manifest of the dataset; raises as `pack`."""
        options, out = self.options, self.options.out
        identity = identity_of(self.raw, options, list(map(folder_identity, options.overlap_with)))
        resumable = self.work.belongs_to(identity)
        if (out / MANIFEST_NAME).exists():
            if resumable:  # finished, but the working folder was not removed
                self.work.remove()
                return load_manifest(out)
            self._refuse_finished()
        for path in self.raw.inputs() if any(out.glob("*.tar")) else ():
            if path.suffix == ".tar" and path.parent.resolve() == out.resolve():
                raise ConfigError(
                    f"{out} holds the input {path.name}, which a dataset could replace; choose another folder"
                )
        total = self.raw.num_rows()
        try:
            self._begin(identity)
            manifest = self._pack(total)
        except SampleError:
            self.work.remove()  # the data must change, so this work cannot be reused
            raise
        finally:
            self.work.close()
        self.work.remove()
        return manifest

    def _refuse_finished(self) -> None:
        out = self.options.out
        if (out / MANIFEST_NAME).exists() and not self.options.overwrite:
            raise DataError(f"{out} already holds a finished dataset; choose another folder or allow overwriting")

    def _begin(self, identity: dict[str, Any]) -> None:
        """Create the folders and remove other datasets from them."""
        out = self.options.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.work.lock()
            if not self.work.belongs_to(identity):
                self._refuse_finished()  # that another run has finished meanwhile
                # In this order: an identity file means that no other dataset is left in the folder.
                self.work.clear()
                _clear(out, self.options.name)
                self.work.begin(identity)
        except OSError as error:
            raise space_error(out, error) from error

    def _pack(self, num_rows: int | None) -> Manifest:
        options, overlap_with = self.options, self.options.overlap_with
        known = read_benchmark_images(overlap_with, self.work.path) if overlap_with else None
        total = Spool(self.work, options).read(ConvertJob(raw=self.raw, options=options, known=known), num_rows)
        if not total.written:
            self.work.remove()
            first = total.problems[0]["message"] if total.problems else "there is no row"
            raise DataError(
                f"{self.raw.name}: none of {total.read} records is usable ({total.skipped}); the first: {first}"
            )
        rows = self.work.load_spooled("rows.npy")
        repeated = self._repeated_ids(rows)
        plan = make_plan(rows, samples_per_shard=options.samples_per_shard, shard_bytes=options.shard_bytes)
        del rows
        checksums = self.work.load_spooled("images.npy")
        samples_of_image = np.unique(checksums, return_counts=True)[1]
        images = {
            "stored": total.images,
            "distinct": len(samples_of_image),
            "in_several_samples": int((samples_of_image > 1).sum()),
        }
        return self._finish(self._write_shards(plan), total, images, repeated)

    def _repeated_ids(self, rows: np.ndarray) -> dict[str, Any]:
        """Count samples whose id an earlier sample has, and list the first; with `strict` it is an error."""
        repeated = repeated_positions(rows["id"])
        first = []
        for row in rows[repeated[:MAX_REPORTED]]:
            first.append({"row": int(row["row"]), "id": read_spooled(self.work, row)[0]["id"]})
        if first and self.options.strict:
            where = f"{self.raw.name}, row {first[0]['row']}"
            raise SampleError(f"{where}: id {first[0]['id']!r} is already used by an earlier row", "repeated_id")
        return {"samples": len(repeated), "first": first}

    def _write_shards(self, plan: Sequence[PlannedShard]) -> list[Shard]:
        """Run the third pass and return the entries of all shards."""
        job = ShardJob(options=self.options)
        shards = [job.finished(planned) for planned in plan]
        missing = [planned for planned, shard in zip(plan, shards, strict=True) if shard is None]
        check_space(self.options.out, sum(planned.bytes for planned in missing))
        written = run_jobs(job, missing, workers=self.options.workers)
        finished: list[Shard] = []
        total = sum(len(planned.places) for planned in plan)
        with closing(written), tqdm(total=total, unit="sample", desc="write") as bar:
            for shard in shards:
                finished.append(shard or next(written))
                bar.update(finished[-1].num_samples)
        return finished

    def _finish(self, shards: list[Shard], total: Report, images: dict[str, int], repeated: dict[str, Any]) -> Manifest:
        """Write report and manifest."""
        options = self.options
        overlap = {
            "compared_with": [str(folder) for folder in options.overlap_with],
            "samples": total.overlap,
            "dropped": options.drop_overlap,
        }
        counts = {"read": total.read, "skipped": dict(sorted(total.skipped.counts.items())), "pictures": images}
        report = counts | {
            "written": total.written,
            "problems": total.problems,
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
                **counts,
                "skipped_first": dict(sorted(total.skipped.messages.items())),
                "repeated_ids": repeated["samples"],
                "benchmark_overlap": overlap,
            },
        )
        write_manifest(manifest)
        return load_manifest(options.out)


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
