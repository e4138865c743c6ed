"""All loggers of a run receive the same metrics, TensorBoard also pages with their predictions."""

import csv
import json

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignvlm_pl.scoring.records import page_path


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
    images = events.Tags()["images"]
    pages = [tag for tag in images if tag != "connector/page"]
    assert len(pages) == 2 * 3, pages  # three, and what P_vocab reads on them
    assert len(images) == len(pages) + 1
    for tag in pages:
        _, name, key = tag.split("/", 2)
        logged = events.Images(tag)[-1]
        with Image.open(page_path(tmp_path / "run/predictions/images", name, key)) as page:
            assert logged.width >= page.width and logged.height >= page.height + 3 * 14, tag
