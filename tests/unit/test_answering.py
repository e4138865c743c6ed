"""Prompts answered in batches: each as alone, up to its own limit, streamed as it is made; and P_vocab's own text."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from alignvlm_pl.errors import CheckpointError, ConfigError, DataError
from alignvlm_pl.models.answering import RowLimits, RowStreamer, row_tokens
from alignvlm_pl.models.page_readout import Alphabet, read_lines
from alignvlm_pl.models.pixels import cut_tiles
from alignvlm_pl.serving.model import Prompt, ServedModel, folder_hash
from datamodules.prepare.synthetic.generate import QUESTIONS
from tests.parity.tiny_pages import SAMPLES, picture, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("served"))


@pytest.fixture
def served(folder: Path) -> ServedModel:
    return ServedModel(str(folder), device="cpu")


def prompts(served: ServedModel, *limits: int):
    asked = zip(SAMPLES, limits, strict=True)
    return [
        served.prepare(Prompt(page=picture(*size, index), question=question, max_new_tokens=limit))
        for index, ((question, _, size), limit) in enumerate(asked)
    ]


def test_a_batch_is_answered_as_each_prompt_alone(served: ServedModel) -> None:
    whole = [served.answer([prompt])[0] for prompt in prompts(served, 9, 9, 9)]
    assert len({answer.text for answer in whole}) == 3
    assert {(answer.tokens, answer.finish_reason) for answer in whole} == {(9, "length")}
    found = served.answer(prompts(served, 3, 9, 6))
    assert [answer.tokens for answer in found] == [3, 9, 6]
    assert found[1].text == whole[1].text
    alone = [served.answer([prompt])[0].text for prompt in prompts(served, 3, 9, 6)]
    assert [answer.text for answer in found] == alone


def test_each_row_stops_after_its_limit() -> None:
    limits, ids = RowLimits([1, 3]), torch.zeros(2, 9, dtype=torch.long)
    assert [limits(ids, None).tolist() for _ in range(3)] == [[True, False], [True, False], [True, True]]


def test_an_answer_that_ends_by_itself_says_so(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = served.processor.collate([prompts(served, 9, 9, 9)[0].encoded], pad_left=True)
    length = batch["input_ids"].shape[1]
    del batch["labels"]
    ids = served.model.generate(**batch, max_new_tokens=9, do_sample=False)[0, length:].tolist()
    assert served.answer(prompts(served, 9, 9, 9)[:1])[0].text == served.processor.decode(ids).strip()
    end = ids.index(ids[4])  # random weights may repeat a token from the first one on
    monkeypatch.setattr(served.model.generation_config, "eos_token_id", ids[4])
    found = served.answer([prompts(served, limit, 9, 9)[0] for limit in (9, end + 1, end)][: 3 if end else 2])
    expected = [(end + 1, "stop"), (end + 1, "stop"), (end, "length")][: len(found)]
    assert [(answer.tokens, answer.finish_reason) for answer in found] == expected


def test_streamed_texts_join_to_the_answers(served: ServedModel) -> None:
    parts: dict[int, list[str]] = {0: [], 1: [], 2: []}
    found = served.answer(prompts(served, 4, 12, 7), on_text=lambda row, text: parts[row].append(text))
    assert ["".join(parts[row]) for row in range(3)] == [answer.text for answer in found]
    assert max(map(len, parts.values())) > 2


def test_parts_of_a_character_and_white_space_wait() -> None:
    texts, pieces = [], [" a", "é"[:0], "b ", " ", "c"]
    shown = {1: " a", 2: " a\ufffd", 3: " aé", 4: " aé ", 5: " aé c"}
    streamer = RowStreamer(
        lambda ids: shown[len(ids)], limits=[len(pieces)], ends={99}, on_text=lambda _, text: texts.append(text)
    )
    for ids in (torch.zeros(1, 4), *[torch.tensor([7])] * len(pieces), torch.tensor([99])):
        streamer.put(ids)
    streamer.end()
    assert texts == ["a", "é", " c"]


def test_tokens_of_a_row_end_at_its_end_or_limit() -> None:
    assert row_tokens([5, 6, 2, 0, 0], 4, {2}) == ([5, 6, 2], True)
    assert row_tokens([5, 6, 2, 0, 0], 2, {2}) == ([5, 6], False)


def test_text_of_p_vocab_is_that_of_its_columns(tmp_path: Path) -> None:
    served = ServedModel(str(save(tmp_path, tiling={"thumbnail": "first"})), device="cpu")
    page, net = picture(110, 50, 3), served.model
    tiles = cut_tiles(page, served.processor.geometry)
    assert len(tiles) == 3  # the whole page and two beside each other
    alphabet = Alphabet.from_tokenizer(served.processor.tokenizer)
    with torch.no_grad():
        best = net.read(tiles, alphabet.columns).argmax(-1)
    left, right = (best[tile].unflatten(0, net.grid) for tile in (1, 2))
    rows = torch.cat([left, right], dim=1).tolist()
    assert read_lines(net, served.processor, page) == [alphabet.decode(row) for row in rows]
    answer = served.read_out(page)
    assert answer.text == "\n".join(filter(None, map(alphabet.decode, rows))) and answer.finish_reason == "stop"


def test_a_model_without_p_vocab_has_no_readout(tmp_path: Path) -> None:
    served = ServedModel(str(save(tmp_path, connector={"type": "mlp"})), device="cpu")
    with pytest.raises(ConfigError, match=r"hf: connector 'mlp' has no P_vocab, whose text --prompt readout writes"):
        served.read_out(picture(40, 40, 0))


def test_a_question_without_an_encoding_is_refused(served: ServedModel) -> None:
    with pytest.raises(DataError, match="surrogate"):
        served.prepare(Prompt(page=picture(9, 9, 0), question="\ud83d", max_new_tokens=1))


def test_the_hash_is_that_of_all_files(folder: Path, tmp_path: Path) -> None:
    before = folder_hash(folder)
    (copy := tmp_path / "hf").mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert folder_hash(copy) == before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert folder_hash(copy) != before


def test_a_folder_without_weights_or_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="AlignVLM weights cannot be loaded from"):
        ServedModel(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no processor that can be loaded"):
        ServedModel(str(tmp_path))


def test_transcriptions_are_asked_for_as_in_training(served: ServedModel) -> None:
    assert served.transcription_question in QUESTIONS["transcribe"]


def test_pages_are_shown_as_the_options_say(folder: Path) -> None:
    page = Image.new("RGB", (300, 200), "white")
    page.paste("black", (100, 80, 200, 90))
    assert ServedModel(str(folder)).fit_page(page) is page
    width, height = ServedModel(str(folder), page_width=96).fit_page(page).size
    assert width == 96 and height < 40  # cut to the bar before it was scaled
