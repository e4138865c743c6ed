"""All loggers of a run receive the same metrics."""

import csv
import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_a_second_logger_receives_every_metric_of_the_first(world, tmp_path):
    loggers = [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": str(tmp_path), **names}}
        for name, names in (
            ("TensorBoardLogger", {"name": "first", "version": ""}),
            ("CSVLogger", {"name": "second", "version": ""}),
        )
    ]
    options = [f"--trainer.logger={json.dumps(loggers)}", "--benchmark.subset=3", "--stage.max_steps=1"]
    assert world.run("fit", "--run_dir", tmp_path / "run", *options) == 0
    events = EventAccumulator(str(tmp_path / "first"))
    events.Reload()
    first = set(events.Tags()["scalars"]) - {"epoch"}
    with (tmp_path / "second/metrics.csv").open() as stream:
        second = set(next(csv.reader(stream))) - {"epoch", "step"}
    assert first == second
    for group in ("train", "lr", "perf", "data", "bench", "connector"):
        assert any(tag.startswith(f"{group}") for tag in first), group
