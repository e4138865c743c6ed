"""Settings of Lightning's Trainer do here what Lightning's manual says."""

import json
import logging
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

OWN = """
import lightning.pytorch as pl


class Marker(pl.Callback):
    def on_fit_end(self, trainer, pl_module):
        with open("marker.txt", "w") as stream:
            stream.write(str(trainer.global_step))
"""


def keys_by_step(run):
    """Sample keys of each optimizer step, from the sample log."""
    found = {}
    for line in map(json.loads, (run / "ledger/rank00000.jsonl").read_text().splitlines()):
        if "keys" in line:
            found.setdefault(line["step"], []).append(tuple(line["keys"]))
    return list(found.values())


def test_overfit_batches_trains_on_the_same_batches_again(world, tmp_path):
    steps = keys_by_step(world.fit(tmp_path / "run", "--trainer.overfit_batches=2"))
    assert len(steps) == 3
    assert steps[0] == steps[1] == steps[2]
    assert len(set(steps[0])) == 2, "two different batches"


def test_overfit_batches_may_be_a_share_of_an_epoch(world, tmp_path):
    steps = keys_by_step(world.fit(tmp_path / "run", "--trainer.overfit_batches=0.5"))
    assert steps[0] == steps[2] != steps[1], "an epoch of eight batches, half of them: two steps"


@pytest.mark.parametrize(("limit", "batches"), [((), 3), (("--trainer.limit_val_batches=1",), 1)])
def test_a_share_of_the_training_set_is_none_of_a_small_validation_set(world, tmp_path, limit, batches, validated):
    """Lightning would take the same share of it, here less than one batch, and end with an error."""
    options = ["--trainer.overfit_batches=0.25", "--trainer.val_check_interval=1.0", "--stage.max_steps=1", *limit]
    run = world.fit(tmp_path / "run", *options)
    assert len(set(validated)) == batches
    assert len(keys_by_step(run)) == 1


def test_limit_train_batches_ends_an_epoch(world, tmp_path):
    options = ["--stage.max_steps=null", "--stage.epochs=2", "--trainer.limit_train_batches=4"]
    run = world.fit(tmp_path / "run", *options)
    steps = keys_by_step(run)
    assert [len(batches) for batches in steps] == [2, 2, 2, 2], "two epochs of four batches, two of them a step"


@pytest.mark.parametrize(
    "option", ["--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=2"], ids=["limit", "sanity"]
)
def test_validation_batches_are_limited(world, tmp_path, option, monkeypatch):
    from alignvlm_pl.training.module import AlignVLMModule

    seen = []
    step = AlignVLMModule.validation_step

    def counted(self, batch, batch_idx, dataloader_idx=0):
        seen.append((self.trainer.sanity_checking, batch_idx))
        return step(self, batch, batch_idx, dataloader_idx)

    monkeypatch.setattr(AlignVLMModule, "validation_step", counted)
    validating = ["--trainer.limit_val_batches=1.0", "--trainer.val_check_interval=2", "--stage.max_steps=1"]
    world.fit(tmp_path / "run", *validating, option)
    held = 3  # batches of two samples of five
    if "limit" in option:
        assert seen == [(False, 0)]
    else:
        assert seen == [(True, 0), (True, 1), *((False, index) for index in range(held))]


def test_the_report_of_a_profiler_is_printed(world, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        world.fit(tmp_path / "run", "--trainer.profiler=simple", "--stage.max_steps=1")
    assert "Profiler Report" in caplog.text


def test_warnings_of_lightning_are_shown(world, tmp_path):
    with pytest.warns(UserWarning, match="smaller than the logging interval"):
        world.fit(tmp_path / "run", "--trainer.log_every_n_steps=50", "--stage.max_steps=1")


def test_lightnings_table_of_scores_is_printed_on_demand(world, trained, tmp_path, capsys):
    weights = ("--model.weights", trained / "hf")
    for name, options in (("lines", []), ("table", ["--verbose=true"])):
        assert world.run("test", "--run_dir", tmp_path / name, *weights, *options) == 0
        assert ("Test metric" in capsys.readouterr().out) is (name == "table")


def test_print_config_shows_what_follows(world, capsys):
    with pytest.raises(SystemExit):
        world.run("fit", "--run_dir=runs/x", "--print_config")
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["stage"]["max_steps"] == 3
    for line in (
        "max_steps: 3",
        "accumulate_grad_batches: 2",
        "gradient_clip_val: 1.0",
        "default_root_dir: runs/x",
    ):
        assert f"# trainer.{line}   (" in printed


def test_print_config_of_a_recipe_shows_all_its_stages(capsys):
    from alignvlm_pl.cli import main

    assert main(["fit", f"--config={ROOT / 'configs/recipe/demo.yaml'}", "--print_config"]) == 0
    stages = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [stage["stage"]["name"] for stage in stages] == ["read", "documents", "instruct"]
    assert [Path(stage["run_dir"]).name for stage in stages] == ["1-read", "2-documents", "3-instruct"]
    assert {stage["trainer"]["log_every_n_steps"] for stage in stages} == {10}, "enough points for a short stage"


def test_print_config_of_nothing_is_a_template(capsys):
    from alignvlm_pl.cli import main

    with pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"] is None


def test_a_class_in_the_working_directory_is_found(world, tmp_path, monkeypatch):
    (tmp_path / "own_callbacks_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    world.fit(tmp_path / "run", "--trainer.callbacks+=own_callbacks_of_mine.Marker", "--stage.max_steps=1")
    assert (tmp_path / "marker.txt").read_text() == "1"


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        (
            "{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}",
            "stage.global_batch_size",
        ),
        ("{class_path: LearningRateFinder}", "stage.lr_vision, lr_connector, lr_llm"),
        ("{class_path: BatchSizeFinder}", "data.init_args.batch_size"),
        ("{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1}}", "stage.ema_decay"),
    ],
)
def test_callbacks_that_do_not_go_with_a_stage_are_refused(world, tmp_path, capsys, callback, instead):
    assert world.run("fit", f"--run_dir={tmp_path / 'run'}", f"--trainer.callbacks=[{callback}]") == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "does not go with a stage" in said
    assert instead in said
