"""How long a worker takes to open the sample index of a shard and read one row of it, beside parsing the rows as JSON.

    python perf/index.py [--json] [--samples 5041] [--rounds 50]

A worker of many meets another shard at nearly every sample. Both are timed in turn; the ratio of their medians is the
result. With `--json` the last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.shards.index import IndexRow, SampleIndex, write_index


def time_us(call: Callable[[], object]) -> float:
    """Return the wall time of a call in microseconds."""
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def main() -> None:
    """Write an index, open it and its rows as JSON in turn, and print both times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    parser.add_argument("--samples", type=int, default=5041, help="samples of the shard; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=50, help="timings of each; default: %(default)s")
    options = parser.parse_args()
    rows = [
        IndexRow(offset=1024 * number, key=f"pages-{number:08d}", sizes=((1024, 768),), text_bytes=99, source="pages")
        for number in range(options.samples)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pages.index.safetensors"
        write_index(path, rows, end=1024 * options.samples)
        text = json.dumps([asdict(row) for row in rows])
        middle = options.samples // 2
        calls = {"mapped_us": lambda: SampleIndex(path)[middle], "json_us": lambda: json.loads(text)[middle]}
        times = [{name: time_us(call) for name, call in calls.items()} for _ in range(options.rounds)]
        found = {name: statistics.median(each[name] for each in times) for name in calls}
        found |= {"ratio": found["json_us"] / found["mapped_us"], "bytes_a_sample": path.stat().st_size / len(rows)}
    sys.stdout.write("".join(f"{name:<16}{value:10.1f}\n" for name, value in found.items()))
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
