"""Every file in configs/model/connector/: a model with it trains a step, is saved, loaded, and answers the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from alignvlm_pl.cli.params import tables
from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.models.build import build_config, build_model, build_processor
from alignvlm_pl.models.tiny import tiny_spec

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted((CONFIGS / "model" / "connector").glob("*.yaml"))
TOKENS = {
    "align": 729,
    "mlp": 729,
    "mlp-paper": 729,
    "mlp-norm": 729,
    "mlp-shuffle": 81,
    "perceiver": 64,
    "ovis": 729,
    "h-reducer": 189,
    "c-abstractor": 144,
    "align-plain": 729,
    "langbridge": 729,
}
# 27 x 27 tokens, as SigLIP's tiles of 384 px have.
PAPER_GRID = {
    "vision": {"image_size": 54, "patch_size": 2},
    "tiling": {"tile_height": 54, "tile_width": 54, "max_tiles": 2},
    "llm": {"max_position_embeddings": 4096},
}
INPUTS = ("input_ids", "attention_mask", "pixel_values", "tile_boxes", "num_tiles")


def load(path):
    return yaml.safe_load(path.read_text("utf-8"))


def model_of(folder, connector, **options):
    torch.manual_seed(0)
    spec = tiny_spec(folder, connector=connector, **options)
    processor = build_processor(spec)
    return spec, processor, build_model(spec, processor)


def batch_of(processor, *, generation=False, image=True):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (54, 54, 3), dtype=np.uint8))
    content = [{"type": "image"}] * image + [{"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}]
    if not generation:
        messages.append({"role": "assistant", "content": "12"})
    return processor.collate([processor.encode(messages, [picture] * image, generation=generation)])


def inputs_of(batch):
    return {key: batch[key] for key in INPUTS}


def test_every_type_has_a_file():
    assert {path.stem for path in FILES} >= TOKENS.keys()
    assert {load(path)["type"] for path in FILES} >= {
        "align",
        "mlp",
        "perceiver",
        "ovis",
        "h_reducer",
        "c_abstractor",
        "align_plain",
        "langbridge",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_model_with_it_trains_is_saved_and_answers(path, tmp_path):
    spec, processor, model = model_of(tmp_path / "tokenizer", load(path), **PAPER_GRID)
    tokens = TOKENS.get(path.stem, processor.tokens_per_tile)
    assert processor.tokens_per_tile == model.config.tokens_per_tile == tokens
    batch = batch_of(processor)
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model.train()(**inputs_of(batch), labels=batch["labels"]).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert losses[2] < losses[0]
    model.eval().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    second = AutoProcessor.from_pretrained(tmp_path / "model")
    assert loaded.config.connector == load(path) == spec.connector
    prompt = inputs_of(batch_of(second, generation=True))
    with torch.no_grad():
        assert torch.equal(model(**prompt).logits, loaded(**prompt).logits)
    answers = [m.generate(**prompt, max_new_tokens=3, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_text_only_batch_gives_every_parameter_a_gradient_of_zero(path, tmp_path):
    _, processor, model = model_of(tmp_path, load(path), vision={"patch_size": 14})
    batch = batch_of(processor, image=False)
    model(**inputs_of(batch), labels=batch["labels"]).loss_sum.backward()
    for name, parameter in [*model.connector.named_parameters(), *model.vision_tower.named_parameters()]:
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_read_refuses_all_but_align(path, tmp_path):
    connector = load(path)
    _, processor, model = model_of(tmp_path, connector)
    batch = batch_of(processor)
    if connector["type"] == "align":
        assert model.read(batch["pixel_values"], torch.tensor([3, 5]), tile_boxes=batch["tile_boxes"]).shape == (
            1,
            16,
            2,
        )
        return
    with pytest.raises(ConfigError, match=f"{connector['type']}.* has no P_vocab to read out; use 'align'"):
        model.read(batch["pixel_values"], torch.tensor([3, 5]), tile_boxes=batch["tile_boxes"])


@pytest.mark.parametrize("shuffle", [2, 3])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_pixel_shuffle_before_any_of_them(path, shuffle, tmp_path):
    """16 tokens become 2 x 2; 3 does not divide the grid's 4, so its edge is filled up."""
    connector = {**load(path), "pixel_shuffle": shuffle}
    _, processor, model = model_of(tmp_path, connector)
    if path.stem in TOKENS:
        assert processor.tokens_per_tile == {"perceiver": 64, "h_reducer": 2}.get(connector["type"], 4)
    batch = batch_of(processor)
    assert model(**inputs_of(batch), labels=batch["labels"]).loss.isfinite()


@pytest.mark.parametrize(("shuffle", "rows"), [(1, 4), (2, 2), (3, 2)])
def test_the_readout_lays_joined_tokens_out(shuffle, rows, tmp_path):
    from alignvlm_pl.training.module import AlignVLMModule

    connector = {"type": "align", "pixel_shuffle": shuffle}
    spec, processor, model = model_of(tmp_path, connector)
    module = AlignVLMModule(spec)
    module.model = model
    seen = batch_of(processor)
    log_probs = model.read(seen["pixel_values"], torch.arange(32), tile_boxes=seen["tile_boxes"])
    batch = {"tiles": [1], "lines": [[[{"text": "low", "box": [0, 50, 9, 55]}]]]}
    ((page, texts),) = module.readout.pages(model.config, log_probs, {**batch, "sizes": [[(56, 56)]]})
    assert torch.equal(page, log_probs[0].reshape(rows, rows, 32))
    assert texts == [""] * (rows - 1) + ["low"]


def test_the_grid_is_the_tiles(tmp_path):
    """The embedded tower's tiles are no squares: 3 x 32 tokens."""
    from alignvlm_pl.models.build import Backbone, ModelSpec

    spec = tiny_spec(tmp_path, connector={"type": "h_reducer"})
    vision = Backbone(config={"model_type": "pp_ocr_vision"})
    tiling = {"tile_height": 96, "tile_width": 256}
    counts = {}
    for name in TOKENS:
        connector = load(CONFIGS / "model" / "connector" / f"{name}.yaml")
        found = ModelSpec(vision=vision, llm=spec.llm, connector=connector, tiling=tiling)
        counts[name] = build_config(found, image_token_id=0).tokens_per_tile
    kept = dict.fromkeys(("align", "align-plain", "langbridge", "mlp", "mlp-norm", "mlp-paper", "ovis"), 96)
    assert counts == {**kept, "mlp-shuffle": 11, "perceiver": 64, "h-reducer": 24, "c-abstractor": 36}


def test_another_number_of_tokens_is_named(tmp_path):
    _, processor, model = model_of(tmp_path, {"type": "perceiver", "num_latents": 9, "depth": 1})
    batch = batch_of(processor)
    model.config.tokens_per_tile = 16
    with pytest.raises(DataError, match=r"gave 16 tokens .*tokens_per_tile is 16, and the connector makes 9"):
        model(**inputs_of(batch))


def test_another_width_is_named(tmp_path):
    _, processor, model = model_of(tmp_path, {"type": "mlp"})
    model.config.vision_config.hidden_size = 48
    with pytest.raises(ConfigError, match="features of width 32, but the connector reads width 48"):
        model(**inputs_of(batch_of(processor)))


def test_a_class_token_is_no_part_of_a_grid(tmp_path):
    vision = {"model_type": "clip_vision_model"}
    spec = tiny_spec(tmp_path, connector={"type": "h_reducer"}, vision=vision)
    with pytest.raises(ConfigError, match="4 x 4 = 16 tokens, the vision tower gives 17; a class token"):
        build_processor(spec)
    assert build_processor(tiny_spec(tmp_path, connector={"type": "mlp"}, vision=vision)).tokens_per_tile == 17


@pytest.mark.slow
def test_params_shows_the_connector_of_a_file_and_of_a_recipe(tmp_path):
    recipe = CONFIGS / "recipe" / "llama3.2-3b.yaml"
    (table, *_) = tables(recipe, connector=CONFIGS / "model" / "connector" / "perceiver.yaml")
    assert "81,516,288" in table
    assert "one tile is 64 visual tokens" in table
    content = yaml.safe_load(recipe.read_text("utf-8"))
    for key in ("model", "trainer"):
        content[key] = str((recipe.parent / content[key]).resolve())
    for entry in content["stages"]:
        for key in entry.keys() - {"override"}:
            entry[key] = str((recipe.parent / entry[key]).resolve())
    content["connector"] = str(CONFIGS / "model" / "connector" / "h-reducer.yaml")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    (table, *_) = tables(tmp_path / "recipe.yaml")
    assert "30,089,856" in table
    assert "one tile is 189 visual tokens" in table
    content["connector"] = "perceiver"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"`connector:` to be the path of a file.*found 'perceiver'"):
        tables(tmp_path / "recipe.yaml")
