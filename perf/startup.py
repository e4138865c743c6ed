"""How long `cli.py --help` takes, beside the import of LightningCLI, and which helpers leave torch alone.

    python perf/startup.py [--json] [--runs 5]

The two commands alternate, so that a busy machine slows both; the ratio of their medians is the result (target:
at most 1.3). Exits with 1 when the target is missed or a helper loads torch. With `--json` the last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET_RATIO = 1.3
HELP = ["cli.py", "--help"]
REFERENCE = ["-c", "from lightning.pytorch.cli import LightningCLI"]
# CONTRACT: alignvlm_pl/cli/__init__.py has COMMANDS, name -> (module, text). Commands of this module build their
# options from the model's classes; all others must not need torch to tell theirs.
TRAINING = "alignvlm_pl.cli.training"
HEAVY = ("lightning", "torch", "transformers")


def time_s(arguments: list[str]) -> float:
    """Return the wall time of one Python process in seconds; it must succeed."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def heavy_modules(arguments: list[str]) -> list[str]:
    """Run `cli.py` with these arguments and return which of the heavy packages it has loaded at its end."""
    program = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print('\\nloaded:', *[m for m in {HEAVY} if m in sys.modules]))\n"
        f"sys.argv = ['cli.py', *{arguments}]\n"
        "runpy.run_path('cli.py', run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cli.py {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1].removeprefix("loaded:").split()


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """What one measurement found; times are medians in seconds."""

    help_s: float
    lightning_cli_import_s: float
    ratio: float
    target_ratio: float
    runs: int
    heavy_modules: dict[str, list[str]]

    @property
    def met(self) -> bool:
        """Whether the start is quick enough and the helpers load nothing heavy."""
        return self.ratio <= self.target_ratio and not any(self.heavy_modules.values())


def light_commands() -> list[str]:
    """Name the commands that must tell their options without loading anything heavy."""
    program = "import json; from alignvlm_pl.cli import COMMANDS; print(json.dumps(COMMANDS))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name, (module, _) in json.loads(done.stdout).items() if module != TRAINING]


def measure(*, runs: int) -> Results:
    """Time both commands `runs` times in turn, after one unmeasured run of each, and look at the light helpers."""
    for command in (HELP, REFERENCE):
        time_s(command)
    pairs = [(time_s(HELP), time_s(REFERENCE)) for _ in range(runs)]
    help_s, reference_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Results(
        help_s=round(help_s, 3),
        lightning_cli_import_s=round(reference_s, 3),
        ratio=round(help_s / reference_s, 3),
        target_ratio=TARGET_RATIO,
        runs=runs,
        heavy_modules={f"{name} --help": heavy_modules([name, "--help"]) for name in light_commands()},
    )


def main() -> int:
    """Print the results; return 0 when the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each command (default 5)")
    arguments = parser.parse_args()
    results = measure(runs=arguments.runs)
    print(
        f"cli.py --help {results.help_s} s, LightningCLI import {results.lightning_cli_import_s} s: "
        f"ratio {results.ratio} (at most {TARGET_RATIO})"
    )
    for command, modules in results.heavy_modules.items():
        print(f"cli.py {command}: loads {', '.join(modules) or 'none'} of {', '.join(HEAVY)}")
    if arguments.json:
        print(json.dumps(asdict(results)))
    return 0 if results.met else 1


if __name__ == "__main__":
    raise SystemExit(main())
