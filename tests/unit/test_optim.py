"""Freezing, groups by part, and the schedule by steps and by time."""

import pytest
import torch

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.training.optim import freeze, parameter_groups, schedule_factor, set_modes, step_schedule
from alignvlm_pl.training.part_table import part_rows, part_table
from alignvlm_pl.training.stage import PARTS, Stage

RATES = {"lr_vision": 1e-5, "lr_connector": 1e-3, "lr_llm": 1e-4}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    spec = tiny_spec(tmp_path_factory.mktemp("spec"), tied=request.param)
    return build_model(spec, build_processor(spec))


def stage(**fields):
    return Stage(**{"name": "x", "weight_decay": 0.1, **RATES, **fields})


def test_every_trained_parameter_is_in_exactly_one_group_with_its_parts_learning_rate(model):
    freeze(model, stage())
    groups = parameter_groups(model, stage())
    names = [f"{part}/{kind}" for part in PARTS for kind in ("decay", "no_decay")]
    assert [group["name"] for group in groups] == names
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted({id(p) for p in model.parameters()})
    for group in groups:
        part, kind = group["name"].split("/")
        assert group["lr"] == RATES[f"lr_{part}"]
        assert group["weight_decay"] == (0.1 if kind == "decay" else 0.0)


def test_norms_biases_and_embeddings_are_not_decayed(model):
    freeze(model, stage())
    decayed = {id(p) for g in parameter_groups(model, stage()) if g["weight_decay"] for p in g["params"]}
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert id(table) not in decayed
    # A head of its own is a matrix like any other; one tied to the table is the table.
    assert (id(head) in decayed) == (head is not table)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            assert id(parameter) not in decayed, name
        elif "proj" in name or "fc1" in name:
            assert id(parameter) in decayed, name


@pytest.mark.parametrize(
    ("connector", "table"),
    [
        ({"type": "c_abstractor", "hidden": 8, "depth": 1}, "position"),
        ({"type": "perceiver", "num_latents": 4, "heads": 2}, "latents"),
        ({"type": "h_reducer", "end_token": True}, "end"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["type"],
)
def test_tables_without_a_module_of_their_own_are_not_decayed(tmp_path, connector, table):
    spec = tiny_spec(tmp_path, connector=connector)
    model = build_model(spec, build_processor(spec))
    decayed = {id(p) for g in parameter_groups(model, stage()) if g["weight_decay"] for p in g["params"]}
    own = dict(model.connector.named_parameters())
    assert own[table].ndim == 2
    assert {name for name, p in own.items() if p.ndim > 1 and id(p) not in decayed} == {table}


@pytest.mark.parametrize("frozen", ["vision", "connector", "llm"])
def test_a_frozen_part_has_no_group_no_gradient_and_stays_in_eval_mode(model, frozen):
    chosen = stage(**{f"lr_{frozen}": None})
    freeze(model, chosen)
    model.train()
    set_modes(model, chosen)
    for part, attribute in PARTS.items():
        module = getattr(model, attribute)
        assert {p.requires_grad for p in module.parameters()} == {part != frozen}
        assert module.training == (part != frozen)
    assert frozen not in {group["name"].split("/")[0] for group in parameter_groups(model, chosen)}
    freeze(model, stage())
    assert all(p.requires_grad for p in model.parameters()), "a later stage thaws the part again"


@pytest.mark.parametrize("part", ["vision", "llm"])
def test_of_a_part_only_its_last_blocks_train(model, part):
    chosen = stage(last_blocks={part: 1})
    freeze(model, chosen)
    set_modes(model.train(), chosen)
    module = getattr(model, PARTS[part])
    last = max((m for m in module.modules() if isinstance(m, torch.nn.ModuleList)), key=len)[-1]
    assert {m for m in module.modules() if m.training} == set(last.modules())
    trained = {id(p) for group in parameter_groups(model, chosen) for p in group["params"]}
    assert {id(p) for p in module.parameters()} & trained == {id(p) for p in last.parameters()}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    rows = {row[0]: row for row in part_rows(model, chosen)}
    assert rows[part][2] == f"{sum(p.numel() for p in last.parameters()):,}"
    freeze(model, stage())
    assert all(p.requires_grad for p in model.parameters()), "a later stage trains all of it again"


def test_more_blocks_than_a_part_has_are_refused(model):
    with pytest.raises(ConfigError, match=r"stage.last_blocks.llm=99: the part has 2 blocks; set at most so many"):
        freeze(model, stage(last_blocks={"llm": 99}))


def test_table_counts_each_part_once(model):
    chosen = stage(lr_vision=None, max_steps=7)
    freeze(model, chosen)
    rows = {row[0]: row for row in part_rows(model, chosen)}
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.vision_tower.parameters())
    assert rows["vision"] == ("vision", f"{frozen:,}", "0", "frozen", "-")
    assert rows["all"][1:3] == (f"{total:,}", f"{total - frozen:,}")
    assert rows["llm"][3:] == ("0.0001", "0, 0.1")
    assert "7 steps" in part_table(model, chosen)


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("cosine", 0.05, 0.5),  # half of the warm-up
        ("cosine", 0.1, 1.0),
        ("cosine", 0.55, 0.6),  # half way down to 0.2
        ("cosine", 1.0, 0.2),
        ("linear", 0.55, 0.6),
        ("linear", 0.775, 0.4),
        ("linear", 1.0, 0.2),
        ("constant", 1.0, 1.0),
    ],
)
def test_schedule_by_hand(schedule, progress, expected):
    chosen = stage(schedule=schedule, warmup_share=0.1, min_lr_share=0.2)
    assert schedule_factor(chosen, progress) == pytest.approx(expected)


def test_without_warmup_the_first_step_has_the_peak_learning_rate():
    assert schedule_factor(stage(warmup_share=0.0), 0.0) == 1.0


def test_no_step_has_a_learning_rate_of_zero():
    factor = step_schedule(stage(warmup_share=0.5), 10, lambda: 0.0)
    factors = [factor(step) for step in range(10)]
    assert all(value > 0 for value in factors)
    peak = factors.index(max(factors))
    assert factors == sorted(factors[: peak + 1]) + sorted(factors[peak + 1 :], reverse=True)


def test_time_runs_the_schedule_down_as_steps_do():
    minutes = 0.0
    factor = step_schedule(stage(max_minutes=10.0, warmup_share=0.0, schedule="linear"), 1000, lambda: minutes)
    early = factor(10)
    minutes = 5.0
    assert factor(10) == pytest.approx(0.5)
    assert early > 0.98
    minutes = 12.0
    assert factor(10) == 0.0
    minutes = 0.0
    assert factor(999) == pytest.approx(1 / 1001), "steps count where they are further"


def test_groups_fit_the_optimizer(model):
    freeze(model, stage())
    optimizer = torch.optim.AdamW(parameter_groups(model, stage()), fused=True)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 1e-5, 1e-3, 1e-3, 1e-4, 1e-4]
