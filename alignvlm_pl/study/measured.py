"""What the result file of a cell says, read from the folders of its run."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ..models.configuration import AlignVLMConfig
from ..training.flops import count_pairs, stage_work
from ..training.stage import Stage
from ..utils.yaml_files import load_yaml
from .results import Result, tested_questions

ORDER_EVERY = 50
"""Steps between two digests of the order of the samples."""
_VERSIONS = ("torch", "lightning", "transformers")
_LEDGER = "ledger/rank*.jsonl"


def measure_run(stages: Sequence[Path], tested: Path) -> Result:
    """Return the result of a cell: the folders of its stages, and the one of its test."""
    scores = json.loads((tested / "results.json").read_text("utf-8"))
    lines = {stage: list(_lines(stage)) for stage in stages}
    last = lines[stages[-1]]
    return {
        "steps": last[-1]["step"],
        "samples": sum(len(line["keys"]) for one in lines.values() for line in one),
        "seconds": sum(_seconds(stage, one[-1]["step"]) for stage, one in lines.items()),
        "flops": sum(_flops(stage, one) for stage, one in lines.items()),
        "loss": scores["loss"],
        "order": _order(last),
        "questions": tested_questions(tested),
        "made": _made(),
        "measures": {},
    }


def _lines(stage: Path) -> Iterator[dict[str, Any]]:
    """Yield the micro batches of a stage's sample log, of all ranks, in their order."""
    read = [json.loads(text) for path in sorted(stage.glob(_LEDGER)) for text in path.read_text("utf-8").splitlines()]
    yield from sorted(
        (line for line in read if "step" in line), key=lambda line: (line["step"], line["micro"], line["rank"])
    )


def _order(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return step -> digest of the samples up to it."""
    digest, found = hashlib.sha256(), {}
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        digest.update(json.dumps([line["rank"], line["keys"]]).encode())
        ends = following is None or following["step"] != line["step"]
        if ends and (line["step"] % ORDER_EVERY == 0 or line["step"] == 1):
            found[str(line["step"])] = digest.hexdigest()[:16]
    return found


def _seconds(stage: Path, steps: int) -> float:
    """Return the training time of a stage: the median step times the steps, so that an interruption does not count."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage))
    events.Reload()
    points = [(event.step, event.wall_time) for event in events.Scalars("train/loss")]
    pace = [(t1 - t0) / (n1 - n0) for (n0, t0), (n1, t1) in pairwise(points) if n1 > n0]
    return steps * median(pace) if pace else 0.0


def _flops(stage: Path, lines: Sequence[dict[str, Any]]) -> float:
    """Return the model FLOPs of a stage by `training.flops`; blanks that collapse are counted as if they stayed."""
    settings = load_yaml(stage / "config.yaml")["stage"]
    known = {field.name for field in fields(Stage)}
    work = stage_work(
        AlignVLMConfig.from_pretrained(stage / "hf"), Stage(**{key: settings[key] for key in known & settings.keys()})
    )
    return work.total(
        tiles=sum(sum(line["tiles"]) for line in lines),
        tokens=sum(sum(line["tokens"]) for line in lines),
        pairs=sum(count_pairs(line["tokens"]) for line in lines),
        supervised=sum(sum(line["supervised"]) for line in lines),
    )


def _made() -> dict[str, str]:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    processor = next(
        (line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")), platform.machine()
    )
    return {
        "commit": found.stdout.strip() or "unknown",
        "machine": f"{os.cpu_count()} x {processor}",
        "python": platform.python_version(),
        **{name: version(name) for name in _VERSIONS},
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8").splitlines() if path.is_file() else []
