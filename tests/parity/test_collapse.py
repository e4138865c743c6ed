"""Collapsed blanks against hand-made batches of the kept embeddings, and against single samples."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.collapse import Collapse
from alignvlm_pl.models.modeling import AlignVLMForConditionalGeneration
from alignvlm_pl.models.tiny import NUM_BYTES, tiny_spec
from alignvlm_pl.preprocessing.chat import IGNORE_INDEX
from alignvlm_pl.training.lora import attach_adapters
from alignvlm_pl.training.lora_config import parse_adapters
from alignvlm_pl.training.module import loss_inputs
from tests.parity.tiny_pages import batch_of, encode, inputs_of, make, picture

BLANKS = tuple(range(NUM_BYTES // 2))
GRID = (4, 4)
NO_THUMBNAIL = {"thumbnail": "none"}


def collapsing(model, batches):
    """A float64 copy of a model for which most of the visual tokens are blank."""
    model = copy.deepcopy(model).double()
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    boxes = torch.cat([batch["tile_boxes"] for batch in batches])
    with torch.no_grad():
        masses = model.read(pixels, BLANKS, tile_boxes=boxes).logsumexp(-1).exp()
    model.connector.collapse = Collapse(float(masses.quantile(0.3)), BLANKS)
    return model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    connector = {"type": "align", "gain_init": 3.0}
    processor, model = make(tmp_path_factory.mktemp("tokenizer"), connector=connector, tiling=NO_THUMBNAIL)
    return processor, collapsing(model, [batch_of(processor, [0, 1, 2])])


def kept_positions(model, batch):
    """Which positions (B, L) of a batch the LLM should see, by a loop over tokens."""
    with torch.no_grad():
        log_probs = model.read(batch["pixel_values"], BLANKS, tile_boxes=batch["tile_boxes"])
    blank = log_probs.logsumexp(-1).exp() > model.connector.collapse.mass
    keep = iter(by_loop(blank.unflatten(1, GRID)).flatten().tolist())
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    image = model.config.image_token_id
    return [
        [i for i, (token, real) in enumerate(zip(*row, strict=True)) if real and (token != image or next(keep))]
        for row in rows
    ]


def by_loop(blank, min_run=1):
    """The tokens (tiles, rows, columns) that stay: the first of each run of blanks, one for consecutive empty rows.

    Of a run of fewer than `min_run` blanks that does not end its row none does.
    """
    kept = torch.ones_like(blank)
    for tile, grid in enumerate(blank.tolist()):
        for row, column in itertools.product(range(len(grid)), range(len(grid[0]))):
            in_run = grid[row][column] and column > 0 and grid[row][column - 1]
            below_empty = row > 0 and all(grid[row]) and all(grid[row - 1])
            after = "".join("-+"[cell] for cell in grid[row][column:])
            length = len(after) - len(after.lstrip("+"))
            ends_row = column + length == len(grid[row])
            is_short = 0 < length < min_run and not in_run and not ends_row
            kept[tile, row, column] = not (in_run or below_empty or is_short)
    return kept


@pytest.mark.parametrize("min_run", [1, 2, 3, 9])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 0.97, 1.0])
def test_the_first_of_each_run_and_of_empty_rows_stays(share, min_run):
    torch.manual_seed(0)
    blank = torch.rand(40, 5, 7) < share
    blank[::3, 1:3] = True
    log_probs = torch.where(blank, 0.0, -20.0).flatten(1)[..., None]
    collapse = Collapse(0.5, (0,), min_run)
    found = collapse.kept(log_probs, (5, 7))
    assert torch.equal(found, by_loop(blank, min_run).flatten(1))
    assert bool(found.any(dim=1).all())
    thumbnails = torch.arange(40) % 2 == 0
    with_thumbnails = collapse.kept(log_probs, (5, 7), thumbnails)
    assert bool(with_thumbnails[thumbnails].all())
    assert torch.equal(with_thumbnails[~thumbnails], found[~thumbnails])


@pytest.mark.parametrize("min_run", [1, 3, 9])
def test_the_last_word_of_a_line_stays_apart_from_the_first_of_the_next(min_run):
    page = ("ab.c.", "d.e..", ".....", ".fg.h")  # a dot is a blank
    blank = torch.tensor([[[cell == "." for cell in row] for row in page]])
    kept = Collapse(0.5, (0,), min_run).kept(torch.where(blank, 0.0, -20.0).flatten(1)[..., None], (4, 5))
    sequence = "".join(cell for cell, stays in zip("".join(page), kept[0].tolist(), strict=True) if stays)
    assert sequence == {1: "ab.c.d.e...fg.h", 3: "abc.de..fgh", 9: "abc.de..fgh"}[min_run]


def test_the_probabilities_of_all_blank_ids_count():
    log_probs = torch.tensor([[[0.3, 0.3], [0.3, 0.3], [0.3, 0.1]]]).log()
    assert Collapse(0.5, (4, 9)).kept(log_probs, (1, 3)).tolist() == [[True, False, True]]


def test_logits_equal_those_of_the_kept_embeddings(parts):
    processor, model = parts
    for index in range(3):
        batch = batch_of(processor, [index])
        kept = kept_positions(model, batch)[0]
        assert 0 < len(kept) < batch["input_ids"].shape[1] - 4
        with torch.no_grad():
            embeds = model.embed(batch["input_ids"], batch["pixel_values"], None, None, tile_boxes=batch["tile_boxes"])
            expected = model.language_model(inputs_embeds=embeds.embeds[:, kept]).logits
            output = model(**inputs_of(batch))
            last = model(**inputs_of(batch), logits_to_keep=2).logits
        torch.testing.assert_close(output.logits[:, kept], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(last, expected[:, -2:], rtol=0, atol=1e-10)
        assert int(output.kept_tokens.sum()) + int((batch["input_ids"] != model.config.image_token_id).sum()) == len(
            kept
        )
        # A position left out has the logits of the last one before it.
        before = [
            max(place for place, at in enumerate(kept) if at <= position) for position in range(output.logits.shape[1])
        ]
        torch.testing.assert_close(output.logits, expected[:, before], rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", ["right", "left", "packed", "collated"])
def test_a_batch_equals_its_samples(parts, way):
    processor, model = parts
    items = [encode(processor, index) for index in range(3)]
    if way == "packed":
        batch = processor.collate_packed([[items[0], items[1]], [items[2]]])
        batch.pop("document_tiles")
    else:
        batch = processor.collate(items, pad_left=way == "left")
    if way == "collated":
        positions = (batch["labels"] != IGNORE_INDEX).flatten().nonzero().flatten()
        batch["supervised_positions"] = positions
    output, gradients = loss_and_gradients(model, batch)
    total, expected = 0.0, []
    for index, item in enumerate(items):
        single = processor.collate([item])
        kept = kept_positions(model, single)[0]
        embeds = model.embed(single["input_ids"], single["pixel_values"], None, None, tile_boxes=single["tile_boxes"])
        logits = model.language_model(inputs_embeds=embeds.embeds[:, kept]).logits[0, :-1]
        loss = F.cross_entropy(logits, single["labels"][0, kept][1:], reduction="sum")
        torch.testing.assert_close(output.document_loss_sums[index], loss.detach(), rtol=1e-9, atol=0)
        total = total + loss
    model.zero_grad(set_to_none=True)
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-9, msg=name)


def loss_and_gradients(model, batch, **options):
    model.zero_grad(set_to_none=True)
    output = model(**batch, **options)
    output.loss_sum.backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


def test_padding_on_the_right_has_no_mask(parts):
    """With one, CUDA's flash attention would not run."""
    processor, model = parts
    batch = processor.collate([encode(processor, index) for index in range(3)])
    seen = {}
    hook = model.language_model.model.register_forward_pre_hook(
        lambda _, __, given: seen.update(given), with_kwargs=True
    )
    model(**loss_inputs(batch, collapse=True), labels=batch["labels"])
    assert seen["attention_mask"] is None
    assert seen["inputs_embeds"].shape[1] == max(map(len, kept_positions(model, batch)))
    left = processor.collate([encode(processor, index) for index in range(3)], pad_left=True)
    model(**inputs_of(left))
    hook.remove()
    assert seen["attention_mask"].sum(1).tolist() == list(map(len, kept_positions(model, left)))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
def test_batched_generation_equals_the_uncached_forward_of_each_sample(parts, options):
    processor, model = parts
    batch = batch_of(processor, [0, 1, 2], generation=True)
    limits = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": []}
    found = model.generate(**inputs_of(batch), **limits, **options)
    length = batch["input_ids"].shape[1]
    assert torch.equal(found[:, :length], batch["input_ids"])
    answers = set()
    for row in range(3):
        single = batch_of(processor, [row], generation=True)
        if options.get("num_beams"):
            expected = model.generate(**inputs_of(single), **limits, **options)[0, -5:]
        else:
            expected = greedily(model, single, 5)
        assert found[row, length:].tolist() == expected.tolist()
        answers.add(tuple(expected.tolist()))
    assert len(answers) > 1


def test_prompts_of_one_length_end_together(parts):
    """They come without padding, and lose unequal numbers of tokens."""
    processor, model = parts
    items = []
    for seed in (0, 1, 5):
        content = [{"type": "image"}, {"type": "text", "text": "What?"}]
        items.append(
            processor.encode([{"role": "user", "content": content}], [picture(120, 60, seed)], generation=True)
        )
    batch = processor.collate(items, pad_left=True)
    assert bool(batch["attention_mask"].all())
    assert len(set(map(len, kept_positions(model, batch)))) > 1
    limits = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": []}
    found = model.generate(**inputs_of(batch), **limits)[:, -5:]
    for row, item in enumerate(items):
        assert found[row].tolist() == greedily(model, processor.collate([item], pad_left=True), 5).tolist()


def greedily(model, batch, steps):
    """Greedy answer from the LLM alone, on hand-picked embeddings."""
    kept = kept_positions(model, batch)[0]
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        embeds = model.embed(batch["input_ids"], batch["pixel_values"], None, None, tile_boxes=batch["tile_boxes"])
        states, answer = embeds.embeds[:, kept], []
        for _ in range(steps):
            answer.append(int(model.language_model(inputs_embeds=states).logits[0, -1].argmax()))
            states = torch.cat([states, table[answer[-1]][None, None]], dim=1)
    return torch.tensor(answer)


def test_lengths_that_count_the_prompt_mean_the_prompt_as_given(parts):
    processor, model = parts
    batch = batch_of(processor, [0, 1], generation=True)
    length = batch["input_ids"].shape[1]
    limits = {"do_sample": False, "eos_token_id": []}
    assert model.generate(**inputs_of(batch), **limits, max_length=length + 3).shape[1] == length + 3
    with pytest.raises(ValueError, match="max_length"):
        model.generate(**inputs_of(batch), **limits, max_length=length)


def test_a_second_turn_continues_from_the_cache(parts):
    processor, model = parts
    batch = inputs_of(batch_of(processor, [0], generation=True))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": []}
    first = model.generate(**batch, **options, return_dict_in_generate=True)
    more = batch_of(processor, [2], generation=True)
    ids = torch.cat([first.sequences, more["input_ids"]], dim=1)
    both = {**{name: torch.cat([batch[name], more[name]]) for name in ("pixel_values", "tile_boxes")}}
    both |= {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "num_tiles": batch["num_tiles"] + more["num_tiles"],
    }
    expected = model.generate(**both, **options)
    found = model.generate(**both, **options, past_key_values=copy.deepcopy(first.past_key_values))
    assert found.tolist() == expected.tolist()
    new = {name: more[name] for name in ("pixel_values", "tile_boxes", "num_tiles")}
    with pytest.raises(DataError, match="pass the tiles of all images"):
        model.generate(**{**both, **new}, **options, past_key_values=first.past_key_values)
    none = {name: value for name, value in both.items() if name in ("input_ids", "attention_mask")}
    with pytest.raises(DataError, match=r"pixel_values has 0; with connector\.collapse pass the tiles of all images"):
        model.generate(**none, **options, past_key_values=first.past_key_values)


def test_a_mass_above_one_changes_no_bit(tmp_path):
    """Nor is P_vocab looked at: probabilities do not add up to more than 1."""
    outputs = []
    for collapse in (None, {"mass": 1.01, "tokens": list(BLANKS)}):
        connector = {"type": "align", "gain_init": 3.0, **({"collapse": collapse} if collapse else {})}
        processor, model = make(tmp_path, connector=connector, tiling=NO_THUMBNAIL)
        batch = batch_of(processor, [0, 1, 2])
        outputs.append(loss_and_gradients(model, inputs_of(batch), labels=batch["labels"], readout_columns=[3, 5]))
    (plain, gradients), (collapsed, others) = outputs
    assert torch.equal(plain.loss, collapsed.loss)
    assert torch.equal(plain.readout_log_probs, collapsed.readout_log_probs)
    assert collapsed.kept_tokens is None
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_the_readout_has_gradients_and_the_choice_of_tokens_has_none(parts):
    processor, model = parts
    batch = batch_of(processor, [0, 1])
    output = model(**inputs_of(batch), readout_columns=[3, 5])
    plain = model.read(batch["pixel_values"], [3, 5], tile_boxes=batch["tile_boxes"])
    torch.testing.assert_close(output.readout_log_probs, plain, rtol=0, atol=1e-10)
    gradients = []
    for log_probs in (output.readout_log_probs, plain):
        model.zero_grad(set_to_none=True)
        log_probs.square().sum().backward()
        gradients.append(model.connector.w2.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_a_blank_page_keeps_a_token_of_each_tile(parts):
    processor, model = parts
    model = copy.deepcopy(model)
    model.connector.collapse = Collapse(1e-9, BLANKS)
    batch = batch_of(processor, [0, 1, 2])
    output = model(**inputs_of(batch), labels=batch["labels"])
    assert output.kept_tokens.sum(1).tolist() == [1] * len(batch["pixel_values"])
    assert bool(torch.isfinite(output.loss))


def test_a_batch_without_images(parts):
    processor, model = parts
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}]
    batch = processor.collate([processor.encode(messages, [])])
    output, gradients = loss_and_gradients(model, inputs_of(batch), labels=batch["labels"])
    assert output.kept_tokens.shape == (0, 16)
    assert all(gradient is not None for gradient in gradients.values())


@pytest.mark.parametrize("position", ["first", "last"])
def test_thumbnails_keep_all_their_tokens(tmp_path, position):
    connector = {"type": "align", "collapse": {"mass": 1e-9, "tokens": list(BLANKS)}}
    processor, model = make(tmp_path, connector=connector, tiling={"thumbnail": position})
    batch = batch_of(processor, [0, 1])  # of three tiles with the thumbnail, and of one
    assert batch["thumbnails"].sum() == 1
    output = model(**inputs_of(batch), thumbnails=batch["thumbnails"], labels=batch["labels"])
    kept = output.kept_tokens.sum(1).tolist()
    assert kept == [16 if thumbnail else 1 for thumbnail in batch["thumbnails"].tolist()]
    with pytest.raises(DataError, match="needs thumbnails"):
        model(**inputs_of(batch))
    with pytest.raises(DataError, match="thumbnails have shape"):
        model(**inputs_of(batch), thumbnails=batch["thumbnails"][1:])


def test_it_is_saved_with_the_model(parts, tmp_path):
    processor, _ = parts
    connector = {"type": "align", "collapse": {"mass": 0.4, "tokens": list(BLANKS)}}
    _, model = make(tmp_path / "tokenizer", connector=connector, tiling=NO_THUMBNAIL)
    model.save_pretrained(tmp_path / "model")
    loaded = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.collapse == Collapse(0.4, BLANKS)
    batch = batch_of(processor, [0])
    assert torch.equal(loaded(**inputs_of(batch)).kept_tokens, model(**inputs_of(batch)).kept_tokens)


@pytest.mark.parametrize(("name", "count"), [("newline", 1), ("whitespace", 10)])
def test_names_of_blanks_become_ids(tmp_path, name, count):
    spec = tiny_spec(tmp_path, connector={"type": "align", "collapse": {"mass": 0.5, "tokens": name}})
    processor = build_processor(spec)
    collapse = build_model(spec, processor).collapse
    texts = [processor.tokenizer.decode([token]) for token in collapse.tokens]
    assert len(texts) == count
    assert "\n" in texts
    assert not "".join(texts).strip()


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        ({"type": "mlp", "collapse": {"mass": 0.5}}, "'mlp' has no P_vocab"),
        ({"collapse": {"mass": 0}}, "collapse.mass=0: expected a number above 0"),
        ({"collapse": {"mass": "half"}}, "collapse.mass='half': expected a number above 0"),
        ({"collapse": {"mass": True}}, "collapse.mass=True"),
        ({"collapse": {"mass": float("nan")}}, "collapse.mass=nan"),
        ({"collapse": {}}, "collapse.mass=None"),
        ({"collapse": {"mass": 0.5, "min_run": 0}}, "collapse.min_run=0: expected 1 to 64"),
        ({"collapse": {"mass": 0.5, "min_run": 1.5}}, "collapse.min_run=1.5"),
        ({"collapse": 0.5}, "collapse=0.5: expected"),
        ({"collapse": {"mass": 0.5, "token": [1]}}, "no option 'token'; did you mean 'tokens'"),
        ({"collapse": {"mass": 0.5, "tokens": []}}, "collapse.tokens is empty"),
        ({"collapse": {"mass": 0.5, "tokens": "blank"}}, "collapse.tokens='blank'"),
        ({"collapse": {"mass": 0.5, "tokens": [3, 400]}}, "has 400, which is none of the 259 rows"),
        ({"collapse": {"mass": 0.5, "tokens": [9]}, "vocab_keep": [1, 2]}, "has 9, which is none of the 2 rows"),
        ({"collapse": {"mass": 0.5}, "vocab_rows": 3}, "'newline': the tokenizer has"),
    ],
)
def test_options_that_are_refused(tmp_path, connector, message):
    spec = tiny_spec(tmp_path, connector={"type": "align", **connector})
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        build_model(spec, build_processor(spec))


def test_a_mask_of_four_axes_is_refused(parts):
    processor, model = parts
    batch = inputs_of(batch_of(processor, [0]))
    length = batch["input_ids"].shape[1]
    four_axes = {**batch, "attention_mask": torch.zeros(1, 1, length, length)}
    for call in (model, model.generate):
        with pytest.raises(DataError, match="takes an attention_mask"):
            call(**four_axes)


def test_adapters_see_the_kept_tokens(parts):
    pytest.importorskip("peft")
    processor, model = parts
    model = copy.deepcopy(model)
    attach_adapters(model, parse_adapters({"llm": {"r": 4, "alpha": 8}}))
    batch = batch_of(processor, [0])
    kept = kept_positions(model, batch)[0]
    output, gradients = loss_and_gradients(model, inputs_of(batch), labels=batch["labels"])
    embeds = model.embed(batch["input_ids"], batch["pixel_values"], None, None, tile_boxes=batch["tile_boxes"])
    logits = model.language_model(inputs_embeds=embeds.embeds[:, kept]).logits[0, :-1]
    expected = F.cross_entropy(logits, batch["labels"][0, kept][1:], reduction="sum")
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-9, atol=0)
    model.zero_grad(set_to_none=True)
    expected.backward()
    adapted = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapted) > 1
    for name, gradient in adapted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-7, atol=1e-9)
