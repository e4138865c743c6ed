"""Wall time of `cli.py score` on a file of DocVQA predictions, import time taken off.

    python perf/score.py [--json] [--rows 5000]

A file of made-up answers is scored in a process of its own, and one of a single row in another; what the second takes
is the start of Python and imports. With `--json` the last line is JSON.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = "invoice total Harbour Street 12.50 Lund 1998 May registered office 7 signed by R. Hale".split()


def seconds(folder: Path, rows: int) -> float:
    """Return the wall time of scoring so many rows."""
    rng = random.Random(0)
    path = folder / f"{rows}.jsonl"
    with path.open("w") as stream:
        for number in range(rows):
            truth = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
            found = truth if rng.random() < 0.6 else truth[: rng.randint(0, len(truth))]
            row = {
                "key": f"k{number}",
                "question": "what?",
                "prediction": found,
                "references": [truth, truth.upper()],
            }
            stream.write(json.dumps(row) + "\n")
    command = [
        sys.executable,
        str(ROOT / "cli.py"),
        "score",
        "--benchmark",
        "docvqa",
        "--predictions",
        str(path),
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    """Print both times and their difference in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rows", type=int, default=5000, help="default 5000")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds(Path(folder), 1)  # byte code and disk caches
        start, whole = seconds(Path(folder), 1), seconds(Path(folder), options.rows)
    results = {"rows": options.rows, "import_s": start, "whole_s": whole, "scoring_s": whole - start}
    results = {name: round(value, 3) for name, value in results.items()}
    print(f"score: {results}")
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
