"""How long a worker takes to open the sample index of a shard and read one row of it, beside parsing the rows as JSON.

    python perf/index.py [--json] [--samples 5041] [--shards 30]

A worker of many meets another shard at nearly every sample: `first_us` is its first time in the process, when all of
the index is checked, `again_us` any later one. All are timed in turn; the ratio is that of the medians of JSON and of
later times. With `--json` the last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.shards.index import IndexRow, index_path, load_index, write_index
from datamodules.shards.manifest import Manifest, Shard


def time_us(call: Callable[[], object]) -> float:
    """Return the wall time of a call in microseconds."""
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def _one_row(manifest: Manifest, shard: Shard, number: int) -> IndexRow:
    return load_index(manifest, shard)[number]


def write_dataset(folder: Path, rows: list[IndexRow], *, shards: int) -> Manifest:
    """Write an index of the rows for each of a number of shards, which are not there."""
    end = 1024 * len(rows)
    entries = []
    for number in range(shards):
        path = Path(f"pages-{number:05d}.tar")
        digest = write_index(index_path(folder / path), rows, end=end)
        entries.append(Shard(path=path.name, num_samples=len(rows), bytes=end, sha256="", index_sha256=digest))
    samples = len(rows) * shards
    return Manifest(
        folder=folder, name="pages", source="pages", license="", num_samples=samples, shards=tuple(entries), sources={}
    )


def main() -> None:
    """Write indexes, open each twice and parse its rows as JSON, and print the times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    parser.add_argument("--samples", type=int, default=5041, help="samples of a shard; default: %(default)s")
    parser.add_argument("--shards", type=int, default=30, help="shards; default: %(default)s")
    options = parser.parse_args()
    rows = [
        IndexRow(offset=1024 * number, key=f"pages-{number:08d}", sizes=((1024, 768),), text_bytes=99, source="pages")
        for number in range(options.samples)
    ]
    text, middle = json.dumps([asdict(row) for row in rows]), options.samples // 2
    times: dict[str, list[float]] = {"first_us": [], "again_us": [], "json_us": []}
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_dataset(Path(folder), rows, shards=options.shards)
        size = index_path(Path(folder) / manifest.shards[0].path).stat().st_size
        for shard in manifest.shards:
            times["first_us"].append(time_us(partial(_one_row, manifest, shard, middle)))
            times["again_us"].append(time_us(partial(_one_row, manifest, shard, middle)))
            times["json_us"].append(time_us(lambda: json.loads(text)[middle]))
    found = {name: statistics.median(each) for name, each in times.items()}
    found |= {"ratio": found["json_us"] / found["again_us"], "bytes_a_sample": size / len(rows)}
    sys.stdout.write("".join(f"{name:<16}{value:10.1f}\n" for name, value in found.items()))
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
