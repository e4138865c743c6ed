"""`prepare benchmark`: a benchmark's published file -> shards in normal form."""

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from alignvlm_pl.benchmarks import Benchmark, Source, get_benchmark
from alignvlm_pl.errors import ConfigError, DataError

from ..shards.left_out import LeftOut, print_left_out
from ..shards.manifest import Manifest, file_digest, file_sha256, load_manifest
from ..shards.sample import SampleError
from ..shards.writer import ShardWriter
from .sources.docdownstream import DocDownstreamTest
from .sources.source import SourceSample, image_bytes
from .sources.vlmevalkit import VLMEvalKitTable

logger = logging.getLogger(__name__)
_READERS = {".tsv": "vlmevalkit-tsv", ".jsonl": "docdownstream"}


def main(argv: Sequence[str]) -> int:
    """Run `prepare benchmark`."""
    parser = argparse.ArgumentParser(prog="prepare benchmark", description=__doc__)
    parser.add_argument("benchmark", help="name of a benchmark, for example docvqa")
    parser.add_argument(
        "file", type=Path, help="VLMEvalKit's <NAME>.tsv, or DocDownstream's <Dataset>_test.jsonl"
    )
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument(
        "--image-root", type=Path, help="folder that image paths are relative to; default: the file's"
    )
    parser.add_argument("--meta", type=Path, help="folder of DUE's document.jsonl and metadata.jsonl")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished set")
    options = parser.parse_args(argv)
    benchmark = get_benchmark(options.benchmark)
    _check_published(benchmark, options.file)
    samples = open_source(benchmark, options.file, image_root=options.image_root, meta=options.meta)
    manifest = write_benchmark(
        benchmark, samples, options.file, options.out, strict=options.strict, overwrite=options.overwrite
    )
    sys.stdout.write(
        f"{manifest.num_samples} questions in {len(manifest.shards)} shards: {manifest.folder}\n"
    )
    print_left_out(manifest.extra)
    return 0


def open_source(
    benchmark: Benchmark, path: Path, *, image_root: Path | None = None, meta: Path | None = None
) -> Iterable[SourceSample | SampleError]:
    """Open a published file.

    Raises:
        ConfigError: It is of no known kind, or of none that the benchmark is made from.
        DataError: It is missing; with name, origin and size of what to fetch.
    """
    if path.suffix not in _READERS:
        raise ConfigError(f"{path}: expected a {' or '.join(_READERS)} file; {_wanted(benchmark)}")
    known = {source.format for source in benchmark.sources}
    if known and _READERS[path.suffix] not in known:
        raise ConfigError(
            f"{path}: {benchmark.name} is not made from {path.suffix} files; {_wanted(benchmark)}"
        )
    if not path.is_file():
        raise DataError(f"there is no {path}; {_wanted(benchmark)}")
    if path.suffix == ".tsv":
        return VLMEvalKitTable(path=path, benchmark=benchmark, image_root=image_root)
    return DocDownstreamTest(path=path, benchmark=benchmark, image_root=image_root or path.parent, meta=meta)


def write_benchmark(
    benchmark: Benchmark,
    samples: Iterable[SourceSample | SampleError],
    origin: Path,
    out: Path,
    *,
    strict: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write the samples of a benchmark as shards; bad ones are counted by reason, and the first are named.

    Raises:
        SampleError: A bad sample, with `strict`.
        DataError: The folder holds a finished set, or there is no usable sample.
    """
    left_out = LeftOut()
    with ShardWriter(
        out, name=benchmark.name, source=benchmark.name, license=benchmark.licence, overwrite=overwrite
    ) as writer:
        for sample in samples:
            try:
                if isinstance(sample, SampleError):
                    raise sample
                data = [image_bytes(image, where=str(origin)) for image, _ in sample.images]
                writer.add(sample.record, data, [ending for _, ending in sample.images])
            except SampleError as error:
                if strict:
                    raise
                left_out.add(error)
        writer.extra |= {
            "benchmark": benchmark.name,
            "origin": origin.name,
            "origin_sha256": file_sha256(origin),
        } | left_out.extra()
    left_out.write(out)
    return load_manifest(out)


def _check_published(benchmark: Benchmark, path: Path) -> None:
    """Warn about a file that is not the one its publisher describes: its scores are of another benchmark."""
    known = [md5 for source in benchmark.sources if source.file == path.name for md5 in source.md5]
    if known and path.is_file() and (found := file_digest(path, "md5")) not in known:
        logger.warning(
            "%s is not the published file: expected md5 %s, found %s", path, " or ".join(known), found
        )


def _wanted(benchmark: Benchmark) -> str:
    return f"{benchmark.name} is made from " + ", or ".join(
        _described(source, benchmark) for source in benchmark.sources
    )


def _described(source: Source, benchmark: Benchmark) -> str:
    command = f" by `prepare {source.format}`" if source.format in ("wtq", "tabfact") else ""
    held = source.contents or f"{source.size or benchmark.size:,} questions"
    return f"{source.file}{command} ({held}), to be fetched from {source.url}"
