"""Three tiny stages in one `fit`, for the drills that stop it: it must train on what an unbroken run trains on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from tests.drills.launch import Finished, run_command
from tests.drills.resume import history, lines, write_sets

FOLDERS = ("1-first", "2-second", "3-third")
SAMPLES = {"first": "a", "second": "b", "third": "a"}  # stage -> set of `write_sets`


def write_recipe(root: Path, *, steps: int, stages: int = 3) -> list[str]:
    """Write sets, configs and a recipe of up to three stages; returns the options that name them.

    As in the paper's table 6 all parts train, then all on other data, then all but the vision tower.
    """
    from alignvlm_pl.models.tiny import tiny_spec

    write_sets(root / "sets")
    rates = {"lr_vision": 1e-3, "lr_connector": 1e-3, "lr_llm": 1e-3}
    loading = {"num_workers": 1, "shuffle_buffer": 32, "batch_size": 1, "eval_batch_size": 1}
    held = {"held": str(root / "sets" / "c")}
    trainer = {
        "accelerator": "cpu", "limit_val_batches": 0, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
        "callbacks": [{"class_path": "tests.drills.recorder.Recorder"}],
    }  # fmt: skip
    files: dict[str, Any] = {
        "model": {"spec": dataclasses.asdict(tiny_spec(root / "tokenizer"))},
        "trainer": trainer,
    }
    entries = []
    for name, parent in zip(SAMPLES, (None, *SAMPLES), strict=False):
        settings = {"train": [str(root / "sets" / SAMPLES[name])], "val": held, "benchmarks": held, **loading}
        files[f"{name}-data"] = {"class_path": "WebDataModule", "init_args": settings}
        files[name] = {"name": name, **rates, "parent": parent, "global_batch_size": 2, "max_steps": steps}
        entries.append({"stage": f"{name}.yaml", "data": f"{name}-data.yaml"})
    files["third"]["lr_vision"] = None
    files["recipe"] = {"model": "model.yaml", "trainer": "trainer.yaml", "stages": entries[:stages]}
    for name, content in files.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [
        f"--config={root / 'recipe.yaml'}",
        "--benchmark.at_stage_end=false",
        "--progress.every_n_steps=1000",
    ]


def with_signals(root: Path, *places: dict[str, Any]) -> None:
    """Send signals at these places of the runs to come; see `Signaller`."""
    path = root / "trainer.yaml"
    trainer = yaml.safe_load(path.read_text())
    sent = [{"class_path": "tests.drills.signaller.Signaller", "init_args": place} for place in places]
    path.write_text(yaml.safe_dump({**trainer, "callbacks": [trainer["callbacks"][0], *sent]}))


def fit(run: Path, options: list[str], *, world: int = 1, strategy: str = "ddp") -> Finished:
    """Run `fit` to its end; several ranks are gloo processes."""
    words = [f"--run_dir={run}", f"--trainer.devices={world}"]
    chosen = json.dumps({"class_path": strategy}) if "." in strategy else strategy
    words += [f"--trainer.strategy={chosen}"] if world > 1 else []
    return run_command(["fit", *options, *words], ranks=world)


def compare(broken: Path, whole: Path, *, once: bool = True) -> int:
    """Compare losses and keys of all stages of two runs bit for bit; returns the number of micro batches.

    Args:
        broken: A run that was stopped and resumed.
        whole: The unbroken one.
        once: Whether nothing may have been trained twice; a kill without a signal loses what was not saved.
    """
    count = 0
    for folder in sorted(path.name for path in whole.iterdir()):
        expected = history(whole / folder)
        assert history(broken / folder) == expected, f"{folder} of {broken} differs from {whole}"
        trained = len(lines(broken / folder))
        assert trained == len(expected) or not once, f"{folder} of {broken} trained {trained} batches"
        records = [json.loads((run / folder / "hf" / "stage.json").read_text()) for run in (broken, whole)]
        assert records[0]["weights_sha256"] == records[1]["weights_sha256"], folder
        count += len(expected)
    return count
