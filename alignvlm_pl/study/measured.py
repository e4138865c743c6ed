"""What the result file of a cell says, read from the folders of its run."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from datamodules.loading.benchmark_dataset import BenchmarkSource
from datamodules.shards.manifest import Manifest, load_manifest
from datamodules.shards.reader import read_range
from datamodules.shards.sample_formats import read_normal

from ..models.configuration import AlignVLMConfig
from ..training.flops import count_pairs, stage_work
from ..training.stage import Stage
from ..utils.yaml_files import load_yaml
from .results import Result, tested_questions

ORDER_EVERY = 50
"""Steps between two digests of the order of the samples."""
_VERSIONS = ("torch", "lightning", "transformers")
_LEDGER = "ledger/rank*.jsonl"
_PACE = "perf/tokens_per_s"  # logged in every stage, whatever its objective


def measure_run(stages: Sequence[Path], tested: Path) -> Result:
    """Return the result of a cell: the folders of its stages, and the one of its test."""
    scores = json.loads((tested / "results.json").read_text("utf-8"))
    lines = {stage: list(_lines(stage)) for stage in stages}
    return {
        "steps": [one[-1]["step"] for one in lines.values()],
        "samples": sum(len(line["keys"]) for one in lines.values() for line in one),
        "seconds": sum(_seconds(stage, one[-1]["step"]) for stage, one in lines.items()),
        "flops": sum(_flops(stage, one) for stage, one in lines.items()),
        "loss": scores["loss"],
        "order": {key: digest for stage, one in lines.items() for key, digest in _order(_name(stage), one).items()},
        "questions": tested_questions(tested, document_names(stages[-1])),
        "made": made(),
        "measures": {},
    }


def _lines(stage: Path) -> Iterator[dict[str, Any]]:
    """Yield the micro batches of a stage's sample log, of all ranks, in their order."""
    read = [json.loads(text) for path in sorted(stage.glob(_LEDGER)) for text in path.read_text("utf-8").splitlines()]
    yield from sorted(
        (line for line in read if "step" in line), key=lambda line: (line["step"], line["micro"], line["rank"])
    )


def _name(stage: Path) -> str:
    return str(load_yaml(stage / "config.yaml")["stage"]["name"])


def _order(name: str, lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return stage/step -> digest of the stage's samples up to it. Stages of other names have other orders."""
    digest, found = hashlib.sha256(), {}
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        digest.update(json.dumps([line["rank"], line["keys"]]).encode())
        ends = following is None or following["step"] != line["step"]
        if ends and (line["step"] % ORDER_EVERY == 0 or line["step"] == 1):
            found[f"{name}/{line['step']}"] = digest.hexdigest()[:16]
    return found


def benchmark_manifests(data: Mapping[str, Any]) -> dict[str, Manifest]:
    """Return the benchmarks that the configuration of a DataModule names, and their manifests."""
    given = data.get("init_args", {}).get("benchmarks") or {}
    return {name: load_manifest(BenchmarkSource.from_config(one).folder) for name, one in given.items()}


def document_names(stage: Path) -> dict[str, dict[str, str]]:
    """Return benchmark of a stage -> key of a question -> its document: `meta.document`, else its images' checksum."""
    found: dict[str, dict[str, str]] = {}
    for name, manifest in benchmark_manifests(load_yaml(stage / "config.yaml")["data"]).items():
        names = found[name] = {}
        for raw in read_range(manifest):
            record, images, _ = read_normal(raw)
            digest = hashlib.sha256(b"".join(hashlib.sha256(image).digest() for image in images)).hexdigest()[:12]
            own = record.get("meta", {}).get("document")
            names[raw["__key__"]] = str(own) if own is not None else digest if images else raw["__key__"]
    return found


def _seconds(stage: Path, steps: int) -> float:
    """Return the training time of a stage: the median step times the steps, so that an interruption does not count.

    A stage that logs fewer than two points has 0.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage))
    events.Reload()
    tagged = events.Scalars(_PACE) if _PACE in events.Tags()["scalars"] else []
    points = [(event.step, event.wall_time) for event in tagged]
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


def made() -> dict[str, str]:
    """Return commit, machine and versions, for the report."""
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
