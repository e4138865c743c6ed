"""The count of a step's memory against what a real step keeps, against formulas by hand, and what follows from it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from alignvlm_pl.cli.params import read_spec, tables
from alignvlm_pl.models.build import build_config, build_model, build_processor
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.training import memory
from alignvlm_pl.training.acceleration import checkpoint_activations
from alignvlm_pl.training.flops import meta_model
from alignvlm_pl.training.memory import (
    CHOICES,
    Kept,
    MicroBatch,
    Spread,
    StepMemory,
    kept_by_part,
    largest_micro_batch,
    step_memory,
)
from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.training.optim import freeze
from alignvlm_pl.training.stage import Stage

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ALL = Stage(name="all", lr_vision=1e-5, lr_connector=1e-5, lr_llm=1e-5)
NO_VISION = Stage(name="no vision", lr_connector=1e-5, lr_llm=1e-5)
CONNECTOR = Stage(name="connector", lr_connector=1e-5)


def kept_in_a_step(model, *, tiles, text, mixed):
    """Bytes that autograd keeps in a forward on the CPU, beside parameters."""
    visual = tiles * model.config.tokens_per_tile
    ids = torch.cat([torch.full((visual,), model.config.image_token_id), torch.arange(text) % 200])[None]
    own, kept = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}, {}

    def pack(tensor):
        if (key := StorageWeakRef(tensor.untyped_storage())) not in own:
            kept[key] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        output = model(
            input_ids=ids,
            pixel_values=torch.rand(tiles, 3, 56, 56),
            num_tiles=torch.tensor([tiles]),
            labels=ids.masked_fill(ids == model.config.image_token_id, -100),
            use_cache=False,
        )
    assert output.loss.requires_grad  # what it needs is still there; a frozen layer's inputs are not
    size = sum(size for key, size in kept.items() if not key.expired())
    return size, MicroBatch(rows=1, tokens=ids.shape[1], tiles=tiles, supervised=text)


@pytest.mark.parametrize("parts", [(), ("vision", "llm")], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("stage", [ALL, NO_VISION, CONNECTOR], ids=lambda stage: stage.name)
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16-mixed"])
def test_the_count_is_what_a_step_keeps(tmp_path, monkeypatch, mixed, stage, parts):
    norms = {functional.layer_norm, functional.group_norm}  # the autocast of CPUs leaves them in bfloat16
    monkeypatch.setattr(memory, "_FULL", memory._FULL - norms)
    spec = tiny_spec(tmp_path)
    model = build_model(spec, build_processor(spec))
    model.loss_backend = "chunked"
    freeze(model, stage)
    checkpoint_activations(model, parts)
    found, batch = kept_in_a_step(model, tiles=4, text=200, mixed=mixed)
    counted = kept_by_part(meta_model(model.config, stage), batch, spread=Spread(mixed=mixed))
    again = sum(one.largest for part, one in counted.items() if part in parts)  # kept in backward alone
    expected = sum(one.bytes(checkpointed=part in parts) for part, one in counted.items()) - again
    assert found == pytest.approx(expected, rel=0.02)


def test_a_layer_of_llama_by_hand():
    config = build_config(read_spec(CONFIGS / "model" / "llama3.1-8b.yaml"), image_token_id=0)
    batch = largest_micro_batch(config, batch_size=1, max_text_length=2048)
    assert batch == MicroBatch(rows=1, tokens=9 * 729 + 2048, tiles=9, supervised=2048)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 2
    kept = kept_by_part(meta_model(config, ALL), batch, spread=Spread(shards=64))["llm"]
    width, key, inner, heads = 4096, 1024, 14336, 32
    # In bfloat16: two norms of (input in float32, its root mean square, normed, output), queries, attention's output,
    # keys, values, a number a head, and four tensors of the MLP.
    token = 2 * (8 * width + 4) + 2 * (2 * width + 2 * key) + 4 * heads + 4 * 2 * inner
    first = 2 * 2 * batch.tokens * 128  # cosines and sines, which the layers share
    assert kept.largest - first == kept.inner - kept.largest == batch.tokens * token
    assert kept.inputs == 2 * batch.tokens * width * 2


def test_a_stage_that_reads_p_vocab_is_counted(tmp_path):
    spec = tiny_spec(tmp_path)
    config = build_config(spec, image_token_id=0)
    stage = Stage(name="read", objective="read", lr_vision=1e-5, lr_connector=1e-5)
    found = kept_by_part(
        meta_model(config, stage), MicroBatch(rows=1, tokens=64, tiles=2, supervised=8), objective="read"
    )
    assert found["connector"].rest > 0
    assert found["llm"].rest == found["llm"].inner == 0


def test_what_cannot_be_counted_gets_all_parts(monkeypatch, recwarn):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("Expected inputs of BF16 type\nmore")

    monkeypatch.setattr(memory, "step_memory", fails)
    monkeypatch.setattr(memory, "meta_model", lambda *_: None)
    monkeypatch.setattr(Spread, "from_strategy", lambda strategy: Spread())
    monkeypatch.setattr(memory, "card_bytes", lambda device: 80 * 2**30)
    config = build_config(read_spec(CONFIGS / "model" / "llama3.2-1b.yaml"), image_token_id=0)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda value: value)
    trainer = SimpleNamespace(strategy=strategy, is_global_zero=True)
    assert memory.choose_checkpointing(trainer, config, ALL) == ("vision", "llm")
    (warning,) = (str(one.message) for one in recwarn if "cannot be counted" in str(one.message))
    assert "(RuntimeError: Expected inputs of BF16 type); activation_checkpointing takes ['vision', 'llm']" in warning


def test_the_state_by_hand():
    config = build_config(read_spec(CONFIGS / "model" / "llama3.2-1b.yaml"), image_token_id=0)
    for part in (config.text_config, config.vision_config):
        part.num_hidden_layers = 1
    model = meta_model(config, NO_VISION)
    sizes = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("vision_tower", "connector")}
    small = MicroBatch(rows=1, tokens=800, tiles=1, supervised=71)

    def state(stage, spread):
        rows = step_memory(meta_model(config, stage), stage, small, spread).rows()
        return rows["vision"]["state"], rows["connector"]["state"]

    vision, connector = sizes.values()
    assert state(NO_VISION, Spread()) == (4 * vision, 16 * connector)
    assert state(NO_VISION, Spread(buckets=True)) == (4 * vision, 20 * connector)
    assert state(NO_VISION, Spread(shards=8)) == (4 * vision // 8, 16 * connector // 8)
    assert state(replace(NO_VISION, ema_decay=0.9), Spread()) == (8 * vision, 20 * connector)


def test_as_few_parts_as_fit_are_chosen():
    kept = {
        "vision": Kept(inner=10, inputs=1, largest=1, rest=1),
        "connector": Kept(rest=5),
        "llm": Kept(inner=40, inputs=2, largest=2, rest=3),
    }
    fixed = {part: {"state": 10} for part in (*kept, "context")}
    step = StepMemory(fixed=fixed, kept=kept)
    totals = [step.total(parts) for parts in CHOICES]
    assert totals == [99, 91, 63, 55]
    assert [step.choose(card=round(total / memory.USABLE) + 1) for total in totals] == list(CHOICES)
    assert step.choose(card=10) == CHOICES[-1]
    assert "does NOT fit, by" in step.explain(CHOICES[-1], card=10)
    assert "batch_size" in step.explain(CHOICES[-1], card=10)


@pytest.mark.parametrize(("given", "chosen"), [("auto", ("vision", "llm")), (["llm"], ("llm",)), (None, ())])
def test_auto_follows_from_the_memory_of_the_gpu_and_other_values_win(tmp_path, monkeypatch, caplog, given, chosen):
    monkeypatch.setattr(memory, "card_bytes", lambda device: 2**20)  # less than anything takes
    module = AlignVLMModule(tiny_spec(tmp_path), activation_checkpointing=given).begin_stage(ALL)
    module.trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with caplog.at_level("INFO"):
        module.configure_model()
    assert module.checkpointed == chosen
    assert ("auto takes [vision, llm]; a step does NOT fit" in caplog.text) == (given == "auto")


def test_auto_is_none_without_a_gpu(tmp_path):
    module = AlignVLMModule(tiny_spec(tmp_path)).begin_stage(ALL)
    module.trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    assert module.checkpointed == ()


RECIPES = {  # recipe -> what auto takes in each stage, and GiB without it, of 72.8 usable
    "llama3.2-1b": [("[llm]", 93.1), ("no part", None), ("no part", None)],
    "llama3.2-3b": [("[vision]", 82.2), ("no part", None), ("no part", None)],
    "llama3.1-8b": [("[llm]", 130.0), ("[llm]", 81.4), ("[llm]", 73.5)],
    "low-data-3b": [("[llm]", 93.6), ("no part", None)],
    "vcr-3b": [("no part", None)],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_fit_their_gpus(recipe):
    found = tables(CONFIGS / "recipe" / f"{recipe}.yaml")
    assert len(found) == len(RECIPES[recipe])
    for table, (chosen, without) in zip(found, RECIPES[recipe], strict=True):
        assert f"activation_checkpointing: auto takes {chosen}; a step fits: " in table, table
        if without is not None:
            assert float(table.rsplit("without it ", 1)[1].split()[0]) == pytest.approx(without, rel=0.02)


def test_a_step_that_does_not_fit_is_named(tmp_path):
    for folder in ("model", "cluster", "stage", "data", "benchmark"):
        (tmp_path / folder).symlink_to(CONFIGS / folder)
    (tmp_path / "recipe").mkdir()
    recipe = tmp_path / "recipe" / "some.yaml"
    override = "{data.init_args.batch_size: 8, model.activation_checkpointing: null}"
    stage = f"{{stage: ../stage/3.yaml, data: ../data/docdownstream.yaml, override: {override}}}"
    recipe.write_text(
        f"model: ../model/llama3.2-1b.yaml\ntrainer: ../cluster/gpu1.yaml\nstages:\n  - {stage}\n", "utf-8"
    )
    (table,) = tables(recipe)
    assert "one of 1, for the largest micro batch: 8 x 8,609 tokens, 72 tiles" in table
    assert "model.activation_checkpointing: []; a step does NOT fit, by " in table
