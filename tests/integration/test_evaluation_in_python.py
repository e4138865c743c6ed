"""Benchmarks as val and test loaders of a Trainer built by hand: metrics, limits, loggers, what is left out."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.training.stage import Stage
from callbacks import BenchmarkEvaluation
from datamodules import DocDownstreamDataModule
from datamodules.shards.writer import ShardWriter

from .conftest import write_set

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:Total length of `list` across ranks is zero",
)
RATES = {"lr_vision": 1e-3, "lr_connector": 1e-3, "lr_llm": 1e-3}


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("python")
    write_set(root / "train", 8, samples_per_shard=4)
    write_set(root / "held", 5, samples_per_shard=3)
    tiny_spec(root / "tokenizer")
    return root


def module(root: Path, **settings: Any) -> AlignVLMModule:
    pl.seed_everything(0, verbose=False)
    return AlignVLMModule(spec=tiny_spec(root / "tokenizer"), **settings)


def data(root: Path, **settings: Any) -> DocDownstreamDataModule:
    held = {"held": root / "held"}
    options = {"train": [root / "train"], "val": held, "benchmarks": held, "eval_batch_size": 2, **settings}
    return DocDownstreamDataModule(batch_size=2, num_workers=0, shuffle_buffer=0, **options)


def trainer(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"logger": False, "num_sanity_val_steps": 0, **quiet, **settings}
    return pl.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **settings)


def fit(root: Path, folder: Path, *callbacks: pl.Callback, steps: int = 2, **settings: Any) -> pl.Trainer:
    trained = module(root)
    trained.begin_stage(Stage(name="hand", max_steps=steps, **RATES))
    fitted = trainer(folder, *callbacks, max_steps=steps, log_every_n_steps=1, **settings)
    fitted.fit(trained, datamodule=data(root))
    return fitted


def evaluation(**settings: Any) -> BenchmarkEvaluation:
    return BenchmarkEvaluation(**{"max_new_tokens": 4, **settings})


def test_validate_and_test_return_losses_and_scores(root, tmp_path):
    callback, untrained, held = evaluation(), module(root), data(root)
    evaluator = trainer(tmp_path, callback)
    (losses, scores) = evaluator.validate(untrained, datamodule=held, verbose=False)
    assert scores["bench/held/num"] == 5
    assert 0 <= scores["bench/held/anls"] <= 1
    assert callback.results["held"].keys() == {"num", "anls", "exact_match", "relaxed_accuracy"}
    sums = torch.zeros(2)
    with torch.no_grad():
        for batch in held.val_dataloader()[0]:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values", "num_tiles")}
            output = untrained.net(**inputs, tile_boxes=batch["tile_boxes"], labels=batch["labels"])
            sums += torch.stack([output.loss_sum, output.num_supervised])
    assert losses["val/held/loss"] == pytest.approx(float(sums[0] / sums[1]), rel=1e-5)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["loss"]["held"] == losses["val/held/loss"]
    assert results["benchmarks"] == callback.results
    assert evaluator.test(untrained, datamodule=held, verbose=False) == [losses, scores]


def test_predict_returns_the_predictions_that_test_scores(root, tmp_path):
    untrained, held = module(root), data(root)
    found = trainer(tmp_path / "a", evaluation()).predict(untrained, datamodule=held)
    trainer(tmp_path / "b", evaluation()).test(untrained, datamodule=held, verbose=False)
    one, two = (
        [json.loads(line) for line in (tmp_path / run / "predictions/held.jsonl").read_text().splitlines()]
        for run in "ab"
    )
    assert [r["prediction"] for r in one] == [r["prediction"] for r in two] == [p for b in found for p in b]


def test_a_limited_evaluation_is_marked_incomplete(root, tmp_path):
    limited = trainer(tmp_path, evaluation(), limit_val_batches=1)
    (_, scores) = limited.validate(module(root), datamodule=data(root), verbose=False)
    assert scores["bench/held/num"] == 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["incomplete"]["held"] == ["2 of 5 samples: trainer.limit_val_batches=1"]
    assert "2 of 5 samples" in (tmp_path / "report.html").read_text()


def test_fast_dev_run_evaluates_a_batch_and_leaves_nothing(root, tmp_path):
    (_, scores) = trainer(tmp_path, evaluation(), fast_dev_run=True).validate(
        module(root), datamodule=data(root), verbose=False
    )
    assert scores["bench/held/num"] == 2
    fitted = module(root)
    fitted.begin_stage(Stage(name="hand", max_steps=5, **RATES))
    run = trainer(tmp_path, evaluation(every_n_steps=500), fast_dev_run=True)
    run.fit(fitted, datamodule=data(root))
    assert run.callback_metrics["bench/held/num"] == 2
    assert list(tmp_path.iterdir()) == []


def test_metrics_of_validation_drive_checkpoints_and_early_stopping(root, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="bench_subset/held/anls", mode="max", filename="{step}")
    stop = EarlyStopping("val/held/loss", mode="min", min_delta=1e6, patience=1)
    fitted = fit(root, tmp_path, evaluation(every_n_steps=1, subset=3), best, stop, steps=5, enable_checkpointing=True)
    assert fitted.global_step == 2  # the first validation is the best, the second ends the run
    assert float(best.best_model_score) == fitted.callback_metrics["bench_subset/held/anls"]
    assert Path(best.best_model_path).is_file()


def test_a_subset_has_tags_and_files_of_its_own_at_its_step(root, tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv", version="")]
    fitted = fit(root, tmp_path, evaluation(every_n_steps=2, subset=3), steps=3, logger=loggers)
    tags = set(fitted.callback_metrics)
    assert "bench_subset/held/num" in tags
    assert not any(tag.startswith("bench/") for tag in tags)
    names = sorted(path.name for path in (tmp_path / "predictions").glob("*.jsonl"))
    assert names == ["held-step000002.jsonl", "held-step000003.jsonl"], "every two steps and at the end"
    rows = (tmp_path / "csv/metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    steps = [row.split(",")[header.index("step")] for row in rows[1:] if row.split(",")[header.index("val/held/loss")]]
    assert steps == ["2", "3"]
    assert not (tmp_path / "results.json").exists()
    whole = fit(root, tmp_path / "whole", evaluation(subset=5))
    assert whole.callback_metrics["bench/held/num"] == 5


@pytest.mark.parametrize(("val", "steps"), [(False, [2]), (True, [1, 2])])
def test_without_an_interval_benchmarks_wait_for_the_last_step_unless_there_are_losses(root, tmp_path, val, steps):
    trained = module(root)
    trained.begin_stage(Stage(name="hand", epochs=2, **RATES))
    watched = {"held": root / "held"} if val else {}
    fitted = trainer(tmp_path, evaluation(subset=3), max_epochs=2, accumulate_grad_batches=4)
    fitted.fit(trained, datamodule=data(root, val=watched))
    assert fitted.global_step == 2
    names = sorted(path.name for path in (tmp_path / "predictions").glob("*.jsonl"))
    assert names == [f"held-step{step:06d}.jsonl" for step in steps]


def test_a_run_cut_off_in_its_last_validation_says_so_when_it_is_resumed(root, tmp_path, caplog):
    fit(root, tmp_path, steps=2, limit_val_batches=0).save_checkpoint(tmp_path / "state.ckpt")
    for cut in (True, False):
        resumed = module(root)
        resumed.begin_stage(Stage(name="hand", max_steps=2, **RATES))
        again = trainer(tmp_path, evaluation(subset=3), max_steps=2)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again.fit(resumed, datamodule=data(root), ckpt_path=tmp_path / "state.ckpt")
        message = "step 2: the validation at the end of fit was cut off, held not evaluated; run `validate`"
        assert (message in caplog.messages) == cut
        (tmp_path / "predictions").mkdir(exist_ok=True)
        (tmp_path / "predictions/held-step000002.jsonl").touch()


def test_a_sanity_check_writes_and_logs_nothing(root, tmp_path):
    quiet = evaluation(at_stage_end=False)
    fitted = fit(root, tmp_path, quiet, steps=1, num_sanity_val_steps=1)
    assert "val/held/loss" not in fitted.callback_metrics
    assert not (tmp_path / "predictions").exists()
    assert quiet.results == {}


def test_what_fit_will_not_evaluate_is_logged(root, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        fit(root, tmp_path, evaluation(), steps=1, limit_val_batches=0)
    assert "trainer.limit_val_batches=0: fit does not evaluate held; leave it out" in caplog.text
    with pytest.raises(ConfigError, match=r"val_check_interval=2 and benchmark\.every_n_steps=3 both set"):
        fit(root, tmp_path, evaluation(every_n_steps=3), val_check_interval=2, steps=1)


def test_metrics_of_a_tested_checkpoint_stand_at_its_step(root, tmp_path):
    fit(root, tmp_path, steps=2, limit_val_batches=0).save_checkpoint(tmp_path / "state.ckpt")
    logger = CSVLogger(tmp_path, name="csv", version="")
    tester = trainer(tmp_path / "test", evaluation(), logger=logger)
    (_, scores) = tester.test(module(root), datamodule=data(root), ckpt_path=tmp_path / "state.ckpt", verbose=False)
    assert scores["step"] == 2
    header, row = (tmp_path / "csv/metrics.csv").read_text().splitlines()
    assert row.split(",")[header.split(",").index("step")] == "2"
    report = (tmp_path / "test/report.md").read_text()
    assert "- step: 2" in report
    assert "state.ckpt" in report


@pytest.mark.parametrize("subset", [None, 3])
def test_problems_of_dataset_samples_and_predictions_are_all_kept(root, tmp_path, subset, caplog):
    folder = tmp_path / "tablevqa"
    buffer, cut = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (56, 56), "white").save(buffer, "PNG")
    Image.effect_noise((56, 56), 90).save(cut, "JPEG")
    pages = [(buffer.getvalue(), "png"), (buffer.getvalue(), "png"), (cut.getvalue()[:-200], "jpg")]
    with ShardWriter(folder, name="tablevqa", source="made", license="CC0-1.0") as out:
        for (page, kind), meta in zip(pages, ({"split": "vwtq"}, {}, {"split": "vwtq"}), strict=True):
            content = [{"type": "image", "index": 0}, {"type": "text", "text": "how many?"}]
            turns = [{"role": "user", "content": content}]
            out.add({"messages": turns, "references": ["4"], "meta": meta}, [page], [kind])
        out.extra["skipped"] = {"bad_base64": 2}
    tables = data(root, val={}, benchmarks={"tablevqa": folder})
    with caplog.at_level(logging.WARNING):
        if subset is None:
            trainer(tmp_path / "run", evaluation()).validate(module(root), datamodule=tables, verbose=False)
        else:
            fitted = module(root)
            fitted.begin_stage(Stage(name="hand", max_steps=1, **RATES))
            trainer(tmp_path / "run", evaluation(subset=subset), max_steps=1).fit(fitted, datamodule=tables)
    kept = [line.split(" is incomplete: ")[1] for line in caplog.messages if " is incomplete: " in line]
    assert kept[0] == "2 rows skipped when it was prepared: bad_base64"
    assert kept[1].startswith("1 samples could not be read, undecodable_image: tablevqa-00000002 (")
    assert kept[2].startswith("1 predictions cannot be scored: tablevqa-00000001 (")
    assert kept[3:] == ([] if subset else ["1 of 1,500 questions"])
