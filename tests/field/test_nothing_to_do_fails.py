"""A command whose only product is missing says so and fails.

Sources: Lightning-AI/pytorch-lightning#6332, #19624.
"""

import pytest

from tests.integration.checkpoint_files import error_of


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_evaluation_without_a_dataset_fails(world, tmp_path, capsys, command):
    options = ["--data.init_args.benchmarks=null", "--data.init_args.val=null"]
    error = error_of(capsys, world.run(command, "--run_dir", tmp_path, *options))
    assert "data.init_args.benchmarks names no dataset" in error
    assert f"nothing to {command}" in error
    assert not (tmp_path / "results.json").exists()


def test_predictions_of_losses_alone_are_nothing(world, tmp_path, capsys):
    error = error_of(capsys, world.run("predict", "--run_dir", tmp_path, "--data.init_args.benchmarks={}"))
    assert "nothing to predict" in error


@pytest.mark.parametrize(("command", "limit"), [("test", "test"), ("validate", "val"), ("predict", "predict")])
def test_evaluation_of_no_batch_fails(world, tmp_path, capsys, command, limit):
    error = error_of(capsys, world.run(command, "--run_dir", tmp_path, f"--trainer.limit_{limit}_batches=0"))
    assert f"trainer.limit_{limit}_batches=0: nothing to {command}" in error


def test_losses_alone_are_a_product_of_validate(world, tmp_path):
    assert world.run("validate", "--run_dir", tmp_path, "--data.init_args.benchmarks=null") == 0
    assert (tmp_path / "results.json").exists()


def test_readout_datasets_that_the_connector_cannot_read_are_named(world, tmp_path, capsys):
    options = ["--model.spec.connector={type: mlp}", "--benchmark.readout_sets=[held]", "--data.init_args.val=null"]
    error = error_of(capsys, world.run("test", "--run_dir", tmp_path, *options))
    assert "has held, of benchmark.readout_sets, which this connector cannot read" in error
