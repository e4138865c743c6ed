"""Kill a training run with -9 again and again; what it trains on must be what an unbroken run trains on.

`python -m tests.drills.resume --kills 50` takes about ten minutes on two cores;
tests/integration/test_resume_drill.py runs a shorter one. Two gloo processes with two workers each, a weighted mixture
of three sources with uneven shards.

1. Kills at random moments, the same command again: losses and keys of every step equal the unbroken run's bit for bit.
2. 2 -> 1 -> 4 processes, killed in between: every sample of the epoch once.
"""

import argparse
import dataclasses
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from tests.drills.launch import Process, start_command

SOURCES = {"a": (61, 5), "b": (17, 3), "c": (5, 2)}  # name -> samples, weight
LIMIT_SECONDS = 300
ATTEMPTS = 3
MODES: dict[str, list[str]] = {
    "plain": ["--data.init_args.batch_size=1"],
    "packed": [
        "--data.init_args.batch_size=1",
        "--data.init_args.token_budget=160",
        "--data.init_args.pack_window=16",
    ],
}


def write_sets(root: Path) -> None:
    """Pages of one or two tiles, and text alone, in shards of unequal sizes."""
    from datamodules.shards.writer import ShardWriter

    for name, (count, _) in SOURCES.items():
        with ShardWriter(root / name, name=name, source=name, license="CC0-1.0", samples_per_shard=7) as out:
            for index in range(count):
                text, buffer = f"{index % 7}{index % 5}", io.BytesIO()
                picture = Image.new("RGB", (56, 56) if index % 3 else (112, 56), "white")
                ImageDraw.Draw(picture).text((4, 4), text, fill="black")
                picture.save(buffer, "PNG")
                images = [] if index % 5 == 4 else [buffer.getvalue()]
                asked = [{"type": "image", "index": 0}] * len(images) + [{"type": "text", "text": "what?"}]
                answer = [{"type": "text", "text": text * (1 + index % 3)}]
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                out.add({"messages": messages}, images, ["png"] * len(images))


def write_world(root: Path, *, steps: int, mixture: bool) -> list[str]:
    """Configs of a tiny model; returns the options that name them."""
    from alignvlm_pl.models.tiny import tiny_spec

    folders = {name: str(root.parent / "sets" / name) for name in SOURCES}
    sets: dict[str, Any] = {"train": list(folders.values())}
    if mixture:
        sets = {"mixture": {name: {"sets": [folders[name]], "weight": SOURCES[name][1]} for name in SOURCES}}
    content = {
        "model": {"spec": dataclasses.asdict(tiny_spec(root / "tokenizer"))},
        "data": {"class_path": "WebDataModule", "init_args": {**sets, "num_workers": 2, "shuffle_buffer": 32}},
        "stage": {"name": "drill", "lr_connector": 1e-3, "lr_llm": 1e-3, "global_batch_size": 4, "max_steps": steps},
        "trainer": {
            "accelerator": "cpu", "limit_val_batches": 0, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
            "callbacks": [{"class_path": "tests.drills.recorder.Recorder"}],
        },
    }  # fmt: skip
    for name, values in content.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(values))
    options = [f"--{name}={root / name}.yaml" for name in content]
    return [
        *options,
        "--benchmark.at_stage_end=false",
        "--checkpoint_every_n_steps=1",
        "--progress.every_n_steps=1000",
    ]


def start(run: Path, options: list[str], world: int) -> Process:
    """Start `fit` in a process group of its own."""
    strategy = "ddp" if world > 1 else "auto"
    words = [f"--run_dir={run}", f"--trainer.devices={world}", f"--trainer.strategy={strategy}"]
    return start_command(["fit", *options, *words], run.parent / f"{run.name}.log", ranks=world)


def lines(run: Path) -> list[dict[str, Any]]:
    """The ledgers of all ranks, in the order they were written by each; the last line of a killed run may be cut."""
    found = []
    for path in sorted(run.glob("ledger-*.jsonl")):
        for text in path.read_text().splitlines():
            try:
                found.append({"rank": int(path.stem.split("-")[1]), **json.loads(text)})
            except ValueError:
                continue
    return found


def kill(process: Process) -> None:
    """Kill a process, its ranks and its workers at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


def run_until(run: Path, options: list[str], world: int, *, step: int, rng: random.Random) -> bool:
    """Train until a step has been written down and a random moment more, then kill; True where the run ended first.

    A port that another process took between its choice and its use says nothing about resuming: the same command is
    given again. Any other death fails the drill, with its log.
    """
    for _ in range(ATTEMPTS):
        found = _run_once(run, options, world, step=step, rng=rng)
        if found is not None:
            return found
        tail = (run.parent / f"{run.name}.log").read_text(errors="replace")[-3000:]
        if "ddress already in use" not in tail and "EADDRINUSE" not in tail:
            break
    raise SystemExit(f"drill: the run died by itself; see {run}.log: {tail}")


def _run_once(run: Path, options: list[str], world: int, *, step: int, rng: random.Random) -> bool | None:
    """As `run_until`; None where the run died by itself."""
    process, begun = start(run, options, world), time.monotonic()
    while process.poll() is None:
        if max((line["step"] for line in lines(run)), default=0) >= step:
            time.sleep(rng.random() * 0.3)
            if process.poll() is None:
                kill(process)
                return False
        if time.monotonic() - begun > LIMIT_SECONDS:
            kill(process)
            raise SystemExit(f"drill: no step {step} after {LIMIT_SECONDS} s; see {run}.log")
        time.sleep(0.05)
    if status := process.poll():
        sys.stderr.write(f"drill: {run.name} died by itself with {status}\n")
        return None
    return True


def history(run: Path) -> dict[tuple[int, int, int], tuple[Any, ...]]:
    """(step, micro batch, rank) -> keys and loss; a batch that was trained again after a kill must be the same."""
    found: dict[tuple[int, int, int], tuple[Any, ...]] = {}
    for line in lines(run):
        # Not by epoch: a stage counts in steps, and a resumed run may number its epochs anew.
        place = (line["step"], line["micro"], line["rank"])
        value = (tuple(line["keys"]), line["loss"])
        if found.setdefault(place, value) != value:
            raise SystemExit(f"drill: batch {place} was {found[place]}, and {value} after a kill; see {run}")
    return found


def same_ranks(root: Path, mode: str, kills: int, rng: random.Random) -> None:
    """Phase 1."""
    steps = 6 + 2 * kills
    options = [*write_world(root, steps=steps, mixture=True), *MODES[mode]]
    assert run_until(root / "whole", options, 2, step=steps + 1, rng=rng)
    for number in range(kills):
        if run_until(root / "broken", options, 2, step=2 * (number + 1), rng=rng):
            raise SystemExit("drill: the run was over before the last kill")
    run_until(root / "broken", options, 2, step=steps + 1, rng=rng)
    whole, broken = history(root / "whole"), history(root / "broken")
    if whole != broken:
        wrong = [place for place in whole if whole[place] != broken.get(place)]
        raise SystemExit(f"drill: {len(wrong)} batches differ, the first is {wrong[:1]}; see {root}")
    sys.stdout.write(f"{mode}: {kills} kills, {len(whole)} batches of {steps} steps equal, bit for bit\n")


def other_ranks(root: Path, mode: str, rng: random.Random) -> None:
    """Phase 2."""
    total = sum(count for count, _ in SOURCES.values())
    options = [*write_world(root, steps=total // 4, mixture=False), *MODES[mode]]
    run = root / "elastic"
    run_until(run, options, 2, step=4, rng=rng)
    run_until(run, options, 1, step=9, rng=rng)
    run_until(run, options, 4, step=total + 1, rng=rng)
    seen = Counter(key for batch in kept_batches(run) for key in batch)
    import torch

    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["WebDataModule"]
    expected = expected_keys(root, mode, state)
    if seen != expected:
        raise SystemExit(f"drill: twice or unasked {seen - expected}, lost {expected - seen}; see {root}")
    if mode == "plain" and (len(seen) != total // 4 * 4 or set(seen.values()) != {1}):
        raise SystemExit(f"drill: {len(seen)} samples of {total}; see {root}")
    sys.stdout.write(f"{mode}: 2 -> 1 -> 4 processes, {len(seen)} of {total} samples of the epoch, each once\n")


def kept_batches(run: Path) -> list[list[str]]:
    """Keys of the batches that the final weights were trained on: of each step, those of the last run that took it."""
    steps: dict[int, dict[tuple[int, int], list[str]]] = {}
    worlds: dict[int, int] = {}
    order = {2: 0, 1: 1, 4: 2}
    for line in lines(run):
        step = line["step"] + (0 if closes(line) else 1)
        if order[line["world"]] > order.get(worlds.get(step, 2), 0):
            steps[step], worlds[step] = {}, line["world"]
        worlds.setdefault(step, line["world"])
        if worlds[step] == line["world"]:
            steps.setdefault(step, {})[line["batch"], line["rank"]] = line["keys"]
    return [keys for batches in steps.values() for keys in batches.values()]


def closes(line: dict[str, Any]) -> bool:
    """Whether a micro batch was the last of its optimizer step: the step is then counted already."""
    return bool((line["batch"] + 1) % (4 // line["world"]) == 0)


def expected_keys(root: Path, mode: str, state: dict[str, Any]) -> Counter[str]:
    """The keys of all batches before the cursors of a state, asked of the stream itself."""
    from datamodules.shards.reader import ShardReader
    from datamodules.stream.state import Cursor, unfinished_windows

    data, collator = drill_data(root, mode)
    stream, planner, reader = data._stream(), data._planner(), ShardReader()
    from datamodules.loading.loader import TrainBatches
    from datamodules.shards.decode import Decoder

    batches = TrainBatches(
        stream=stream, planner=planner, cursor=Cursor(), decoder=Decoder(), collator=collator, counter=None
    )
    left, begun = unfinished_windows([Cursor.from_state_dict(cursor) for cursor in state["ranks"]])
    done = dict(left)
    found: Counter[str] = Counter()
    for window in range(begun):
        plan = planner.plan(window, batches._lengths)
        for batch in plan[: done.get(window, len(plan))]:
            found.update(reader.read(stream.locate(position))["__key__"] for row in batch for position in row)
    return found


def drill_data(root: Path, mode: str) -> tuple[Any, Any]:
    """The DataModule of the drill with its stage's seed, and its collator."""
    from types import SimpleNamespace

    from alignvlm_pl.models.build import build_processor
    from alignvlm_pl.models.tiny import tiny_spec
    from datamodules import WebDataModule

    settings = yaml.safe_load((root / "data.yaml").read_text())["init_args"]
    for option in MODES[mode]:
        name, value = option.removeprefix("--data.init_args.").split("=")
        settings[name] = int(value)
    data = WebDataModule(**settings)
    stage = SimpleNamespace(name="drill", max_text_length=2048)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(stage=stage))  # type: ignore[assignment]
    data.attach(build_processor(tiny_spec(root / "tokenizer")))
    return data, data._collator()


def main() -> None:
    """Run the drill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills of the first phase, over all modes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--phases", nargs="+", choices=["same", "other"], default=["same", "other"])
    parser.add_argument("--keep", type=Path, help="work here and keep everything")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        write_sets(folder / "sets")
        for mode in options.modes:
            for phase in options.phases:
                root = folder / f"{mode}-{phase}"
                root.mkdir(parents=True)
                if phase == "same":
                    same_ranks(root, mode, max(1, options.kills // len(options.modes)), rng)
                else:
                    other_ranks(root, mode, rng)


if __name__ == "__main__":
    main()
