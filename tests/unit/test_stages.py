"""Stages: what they refuse, and the accumulation that follows from the global batch."""

import dataclasses

import pytest

from alignvlm_pl.errors import CheckpointError, ConfigError
from alignvlm_pl.training.checkpoint_metadata import check_data, check_stage
from alignvlm_pl.training.stage import Stage, accumulation, require_parent, steps_of_epochs


def test_learning_rates_by_part_and_frozen_by_default():
    stage = Stage(name="x", lr_connector=1e-3)
    assert stage.learning_rates == {"vision": None, "connector": 1e-3, "llm": None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "reed"}, r"stage.objective='reed'; did you mean 'read'\?"),
        ({"schedule": "cosin"}, r"stage.schedule='cosin'; did you mean 'cosine'\?"),
        ({"lr_llm": None}, "'x' trains nothing: set lr_vision, lr_connector or lr_llm"),
        ({"lr_llm": 0.0}, "trains nothing"),
        ({"objective": "read"}, "'read' does not run the LLM; set lr_llm to null"),
        ({"global_batch_size": 0}, "stage.global_batch_size=0: expected at least 1"),
        ({"epochs": 0}, "stage.epochs=0"),
        ({"max_text_length": 0}, "stage.max_text_length=0"),
        ({"max_steps": 0}, "stage.max_steps=0: expected at least 1, or null"),
        ({"warmup_share": 1.0}, r"expected a share in \[0, 1\)"),
        ({"adam_beta2": 1.0}, r"stage.adam_beta2=1.0: expected a share in \[0, 1\)"),
        ({"min_lr_share": 1.5}, r"stage.min_lr_share=1.5: expected a share in \[0, 1\]"),
        ({"max_minutes": 0.0}, "stage.max_minutes=0.0: expected more than 0, or null"),
        ({"lr_vision": -1e-5}, "stage.lr_vision=-1e-05: expected a positive learning rate, or null"),
        ({"lr_vision": float("nan")}, "stage.lr_vision=nan: expected a positive learning rate, or null"),
        # Taken as it is, a negative one would turn the gradients round, and 0 take them away.
        ({"gradient_clip_norm": -1.0}, "stage.gradient_clip_norm=-1.0: expected more than 0, or null"),
        ({"gradient_clip_norm": 0.0}, "stage.gradient_clip_norm=0.0: expected more than 0, or null"),
        ({"weight_decay": -0.1}, "stage.weight_decay=-0.1: expected 0 to 1000"),
        ({"readout_weight": -0.5}, "stage.readout_weight=-0.5: expected 0 to 1000"),
        ({"readout_weight": 1e38}, r"stage.readout_weight=1e\+38: expected 0 to 1000"),
        ({"readout_weight": None}, "stage.readout_weight=None: expected 0 to 1000"),
        ({"weight_decay": float("inf")}, "stage.weight_decay=inf: expected 0 to 1000"),
        ({"lr_vision": float("inf")}, "stage.lr_vision=inf: expected a positive learning rate"),
        ({"max_minutes": float("inf")}, "stage.max_minutes=inf: expected more than 0, or null"),
        ({"max_minutes": "x"}, "stage.max_minutes=x: expected more than 0, or null"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Stage(**{"name": "x", "lr_llm": 1e-3} | fields)


@pytest.mark.parametrize(("size", "devices", "expected"), [(1, 1, 64), (8, 8, 1), (4, 2, 8)])
def test_accumulation_makes_up_the_global_batch(size, devices, expected):
    assert accumulation(64, size, devices) == expected


@pytest.mark.parametrize(("batch", "below", "above"), [(30, 24, 32), (5, 8, 16)])
def test_an_indivisible_global_batch_names_the_nearest_valid_ones(batch, below, above):
    with pytest.raises(
        ConfigError, match=rf"={batch} is not a multiple .* = 8; nearest valid values: {below}, {above}"
    ):
        accumulation(batch, 4, 2)


@pytest.mark.parametrize(
    ("calibrate", "message"),
    [
        (
            {"target_entropie": 3.0},
            r"stage.calibrate has no setting 'target_entropie'; did you mean 'target_entropy'\?",
        ),
        ({}, "stage.calibrate.target_entropy=None: expected nats above 0"),
        ({"target_entropy": 0.0}, "stage.calibrate.target_entropy=0.0"),
        ({"target_entropy": float("nan")}, "stage.calibrate.target_entropy=nan"),
    ],
)
def test_a_calibration_is_a_number_of_nats(calibrate, message):
    with pytest.raises(ConfigError, match=message):
        Stage(name="x", lr_llm=1e-3, calibrate=calibrate)


def test_calibration_of_a_frozen_connector_is_refused():
    # Frozen weights are compared at the stage's end, and its gain would have changed.
    with pytest.raises(ConfigError, match="'x': calibrate sets the connector's gain, but the stage freezes"):
        Stage(name="x", lr_llm=1e-3, calibrate={"target_entropy": 3.0})
    assert Stage(name="x", lr_connector=1e-3, calibrate={"target_entropy": 3.0}).calibrate


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"last_blocks": {"connector": 2}}, "stage.last_blocks.connector: this part has no blocks"),
        ({"last_blocks": {"llm": 0}}, "stage.last_blocks.llm=0: expected a whole number of at least 1"),
        ({"last_blocks": {"llm": True}}, "stage.last_blocks.llm=True: expected a whole number"),
        ({"last_blocks": {"vision": 2}}, "stage.last_blocks.vision needs stage.lr_vision"),
        ({"last_blocks": {"llm": 2}, "lora": {"llm": {}}}, "stage.last_blocks.llm and stage.lora.llm exclude each"),
    ],
)
def test_last_blocks_are_a_number_of_blocks_of_a_trained_part(fields, message):
    with pytest.raises(ConfigError, match=message):
        Stage(name="x", lr_llm=1e-3, **fields)


def test_a_resumed_stage_trains_the_same_blocks():
    trained = dataclasses.asdict(Stage(name="x", lr_llm=1e-3, last_blocks={"llm": 2}))
    check_stage(trained, Stage(**trained))
    for blocks in (None, {"llm": 1}):
        with pytest.raises(ConfigError, match=r"stage.last_blocks=\{'llm': 2\}, now .*: its optimizer would bring"):
            check_stage(trained, dataclasses.replace(Stage(**trained), last_blocks=blocks))
    before = {name: value for name, value in trained.items() if name != "last_blocks"}  # of an older checkpoint
    check_stage(before, dataclasses.replace(Stage(**trained), last_blocks=None))


def test_a_stage_that_names_a_parent_needs_its_folder():
    require_parent("two", parent="one", init_from="runs/one/hf")
    require_parent("one", parent=None, init_from=None)
    with pytest.raises(
        ConfigError, match=r"stage 'two' starts from the end of stage 'one', but stage.init_from is null"
    ):
        require_parent("two", parent="one", init_from=None)


@pytest.mark.parametrize(
    ("epochs", "micro_batches", "accumulated", "limit", "steps"),
    [
        (1, 8, 2, 1.0, 4),
        (3, 8, 2, None, 12),
        (2, 1, 4, 1.0, 2),  # an epoch of one micro batch is one step
        (2, 9, 4, 1.0, 6),  # its last step has one
        (2, 8, 2, 4, 4),
        (2, 8, 2, 100, 8),
        (1, 8, 2, 0.5, 2),
    ],
)
def test_epochs_are_counted_in_optimizer_steps(epochs, micro_batches, accumulated, limit, steps):
    found = steps_of_epochs(epochs, micro_batches=micro_batches, accumulated=accumulated, limit=limit)
    assert found == steps


def test_the_position_in_another_modules_data_is_not_lost_in_silence():
    checkpoint = {"WebDataModule": {"epoch_samples": 9, "ranks": [{}]}}
    check_data(checkpoint, "WebDataModule")
    check_data({}, "WebDataModule")
    with pytest.raises(CheckpointError, match=r"was trained with WebDataModule, data\.class_path is Other"):
        check_data(checkpoint, "Other")
