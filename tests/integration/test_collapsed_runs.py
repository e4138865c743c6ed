"""Runs with collapsed blanks through the command line: two processes, resume, adapters, evaluation alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.build import ModelSpec, build_processor
from datamodules import WebDataModule
from tests.integration.command import cli

pytestmark = pytest.mark.slow
COLLAPSE = {"type": "align", "collapse": {"mass": 0.452, "tokens": list(range(128))}}
"""Half of the rows of a random P_vocab, and about their median mass: some visual tokens are blank, and some are not."""


@pytest.fixture(scope="module")
def collapsed(world: Any) -> list[str]:
    """Options of a model that collapses blanks."""
    path = world.root / "collapse.yaml"
    path.write_text(yaml.safe_dump(COLLAPSE))
    return ["--connector", str(path)]


def scalars(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def image_steps(folder: Path) -> list[int]:
    """Return the steps of the pages that P_vocab was read on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Images("connector/page")]


@pytest.mark.parametrize(
    "strategy", ["ddp", "{class_path: alignvlm_pl.strategies.fsdp.ShardedStrategy}"], ids=["ddp", "fsdp"]
)
def test_two_processes_train_and_answer_like_one(world, trained, collapsed, tmp_path, strategy):
    two = ["--trainer.devices=2", f"--trainer.strategy={strategy}", "--data.init_args.batch_size=8"]
    # Random weights are drawn in another order under FSDP2.
    start = ["--model.weights", trained / "hf"]
    stage = [*collapsed, *start, "--stage.max_steps=2", "--stage.global_batch_size=16"]
    stage += ["--connector_health.page_every_n_steps=1"]
    cli("fit", *world.options(*two, *stage, "--run_dir", tmp_path / "two"))
    one = world.fit(tmp_path / "one", *stage, "--data.init_args.batch_size=16")
    for tag in ("train/loss", "train/gradient_norm", "connector/kept_share", "connector/kept_tokens_per_page"):
        found, expected = (scalars(tmp_path / name, tag) for name in ("two", "one"))
        assert found == pytest.approx(expected, rel=1e-4), tag
    assert 0 < scalars(one, "connector/kept_share")[0] < 1
    # Pages of one tile of 16 tokens, or of two and a thumbnail, of which all are kept.
    assert 1 < scalars(one, "connector/kept_tokens_per_page")[0] < 48
    for name in ("one", "two"):
        options = [*collapsed, "--model.weights", tmp_path / "two/hf", "--run_dir", tmp_path / f"test-{name}"]
        cli("test", *world.options(*options, *(two if name == "two" else [])), ranks=2 if name == "two" else 1)
    one, two = ((tmp_path / f"test-{name}" / "predictions/held.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    pages = sorted((tmp_path / "test-one/predictions/images/held").glob("*.readout.png"))
    assert len(pages) == 4
    for page in pages:
        assert page.read_bytes() == (tmp_path / "test-two/predictions/images/held" / page.name).read_bytes(), page.name
        assert page.name in (tmp_path / "test-two/report.html").read_text()
    assert image_steps(tmp_path / "two") == image_steps(tmp_path / "one") == [0, 1, 2]


def test_a_resume_equals_an_unbroken_run_and_takes_no_other_setting(world, collapsed, tmp_path, capsys):
    whole = world.fit(tmp_path / "whole", *collapsed)
    every = [*collapsed, "--checkpoint_every_n_steps=1"]
    world.cut(tmp_path / "cut", *every)
    assert world.run("fit", "--run_dir", tmp_path / "cut", *every, "--connector.collapse.mass=0.6") == 1
    assert "the checkpoint was trained with connector.collapse=" in capsys.readouterr().err
    resumed = world.fit(tmp_path / "cut", *every)
    expected = load_file(whole / "hf/model.safetensors")
    found = load_file(resumed / "hf/model.safetensors")
    assert all((found[name] == value).all() for name, value in expected.items())
    config = json.loads((resumed / "hf/config.json").read_text())
    assert config["connector"]["collapse"] == {**COLLAPSE["collapse"], "min_run": 1}


def test_packed_rows_and_adapters_train(world, collapsed, tmp_path):
    pytest.importorskip("peft")
    packed = ["--data.init_args.token_budget=120", "--data.init_args.visual_share=0.7"]
    adapters = ["--stage.lora", "{llm: {r: 4, alpha: 8}}", "--stage.lr_vision=null"]
    run = world.fit(tmp_path / "run", *collapsed, *packed, *adapters)
    shares = scalars(run, "connector/kept_share")
    assert 0 < shares[0] < 1
    losses = scalars(run, "train/loss")
    assert len(losses) == 3
    assert all(value > 0 for value in losses)


def test_rows_are_packed_by_the_share_that_was_measured(world):
    spec = ModelSpec.from_fields(yaml.safe_load((world.root / "model.yaml").read_text())["spec"])
    processor = build_processor(spec)

    def packed(**options: Any) -> tuple[int, dict[str, str]]:
        data = WebDataModule([world.root / "train"], token_budget=120, num_workers=0, **options).attach(processor)
        batch = next(iter(data.train_dataloader()))
        assert data.training is not None
        return sum(batch["documents_per_row"]), data.training.identity

    (documents, identity), (more, changed) = packed(), packed(visual_share=0.3)
    assert documents < more
    assert "visual_share" not in identity
    assert changed["visual_share"] == "0.3"
    for share in (0, 1.5):
        with pytest.raises(ConfigError, match=f"visual_share={share}: expected a share above 0, at most 1"):
            WebDataModule(visual_share=share)


def test_a_model_that_was_trained_without_it_is_evaluated_with_it(world, trained, collapsed, tmp_path):
    for name, options in (("with", collapsed), ("without", [])):
        weights = ["--model.weights", trained / "hf", "--run_dir", tmp_path / name]
        assert world.run("test", *weights, *options) == 0
    losses = [
        json.loads((tmp_path / name / "results.json").read_text())["loss"]["held"] for name in ("with", "without")
    ]
    assert losses[0] != losses[1]
