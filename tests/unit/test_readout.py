"""Reading P_vocab: the alphabet, CTC, and which text a row of visual tokens should read."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.page_readout import CHARACTERS, Alphabet, ctc_loss, read_rows, row_texts, to_rows
from alignvlm_pl.models.pixels import cut_tiles
from alignvlm_pl.models.tiny import tiny_tokenizer
from alignvlm_pl.preprocessing.tiling import Tiling, plan_tiles

ABC = Alphabet((9, 5, 6, 7), "ab ")


def test_alphabet_of_a_tokenizer():
    tokenizer = tiny_tokenizer()
    alphabet = Alphabet.from_tokenizer(tokenizer)
    assert alphabet.characters == CHARACTERS
    assert len(CHARACTERS) == 95
    assert tokenizer.decode(list(alphabet.columns)) == "\n" + CHARACTERS
    text = "Total: 12.50 EUR"
    assert alphabet.decode(list(itertools.chain(*((c, 0) for c in alphabet.encode(text))))) == text
    assert alphabet.decode(alphabet.encode("11:00")) == "11:00"


def test_alphabet_needs_character_tokens():
    def words(text, **_):
        return {"input_ids": [1, 2] if text in "\nabcdefghijklm" else [ord(text)]}

    with pytest.raises(ConfigError, match=r"82 of 95 printable characters \(newline: \[1, 2\]\)"):
        Alphabet.from_tokenizer(words)


def test_encode_strips_accents_and_drops_the_unknown():
    assert ABC.encode("á  b\tß") == [1, 3, 2, 3]
    assert ABC.encode("") == []


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        ([], ""),
        ([0, 0], ""),
        ([1, 1, 0, 1, 2, 2], "aaabb"),
        ([3, 1, 3, 3, 0, 3, 2, 3], "a b"),
        ([2, 0, 0, 2], "bb"),
    ],
)
def test_greedy_decoding(classes, text):
    assert ABC.decode(classes) == text


def test_read_rows_takes_the_best_class():
    rows = torch.full((2, 3, 4), -5.0)
    for row, column, best in ((0, 0, 1), (0, 1, 0), (0, 2, 1), (1, 0, 2), (1, 1, 2), (1, 2, 0)):
        rows[row, column, best] = 0.0
    assert read_rows(rows, ABC) == ["aa", "bb"]


def brute_force_nll(row, target):
    """-log of the summed probability of all paths that are the target once blanks are dropped."""
    total = 0.0
    for path in itertools.product(range(row.shape[1]), repeat=row.shape[0]):
        if [c for c in path if c] == target:
            total += float(torch.exp(sum(row[t, c] for t, c in enumerate(path))))
    return -np.log(total)


def test_ctc_loss_sums_over_rows():
    # 3 of 8 classes are read, as the characters are a part of the vocabulary.
    rows = torch.randn(4, 3, 8).log_softmax(-1)[..., [0, 2, 5]]
    targets = [[1, 2], [], [1, 1], [2, 2, 1, 1]]  # the last cannot be written in 3 columns
    loss, characters = ctc_loss(rows, targets)
    expected = sum(brute_force_nll(row, target) for row, target in zip(rows[:3], targets[:3], strict=True))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(characters) == 2 + 1 + 2 + 4


def test_ctc_gradient_is_right_for_a_part_of_the_classes():
    scores = torch.randn(2, 3, 8)
    targets = [[1, 2], [2, 2, 1, 1]]

    def loss(values):
        return ctc_loss(values.log_softmax(-1)[..., [0, 2, 5]], targets)[0]

    variable = scores.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(variable), variable)
    step = 1e-2
    for index in np.ndindex(*scores.shape):
        bump = torch.zeros_like(scores)
        bump[index] = step
        expected = float(loss(scores + bump) - loss(scores - bump)) / (2 * step)
        # Differences of a float32 loss of about 5: rounding 1e-4.
        assert float(found[index]) == pytest.approx(expected, abs=1e-3)
    assert bool((found[1] == 0).all())


def test_ctc_loss_of_blank_rows_only():
    rows = torch.randn(2, 3, 4).log_softmax(-1)
    loss, characters = ctc_loss(rows, [[], []])
    torch.testing.assert_close(loss, -rows[..., 0].sum())
    assert float(characters) == 2


def test_to_rows_lays_tiles_out_as_the_page():
    page = torch.arange(4 * 6).reshape(4, 6)  # 2 x 2 tiles of 2 x 3 tokens
    tiles = torch.stack([page[r : r + 2, c : c + 3].flatten() for r in (0, 2) for c in (0, 3)])
    torch.testing.assert_close(to_rows(tiles.unsqueeze(-1), (2, 2), (2, 3)).squeeze(-1), page)


TILING = Tiling(tile_height=40, tile_width=80, max_tiles=9)


def line(text, x0, y0, x1, y1):
    return {"text": text, "box": [x0, y0, x1, y1]}


def test_row_texts_in_one_tile():
    lines = [
        line("right", 40, 11, 70, 19),
        line("left", 0, 10, 30, 18),
        line("low", 0, 30, 10, 40),
        line("up", 0, -9, 9, -3),
    ]
    assert row_texts(lines, (80, 40), TILING, 4) == ((1, 1), ["up", "left right", "", "low"])


def test_row_texts_follow_scale_and_padding():
    # 40 x 20 is enlarged twice; 40 x 40 is a tile as high as it is, with padding beside.
    assert row_texts([line("a", 0, 11, 5, 14)], (40, 20), TILING, 4)[1] == ["", "", "a", ""]
    # 80 x 20 fills the width: 10 px of padding above, so that the first pixel rows are in token row 1.
    assert row_texts([line("a", 0, 0, 9, 4), line("b", 0, 15, 9, 19)], (80, 20), TILING, 4)[1] == [
        "",
        "a",
        "b",
        "",
    ]


@pytest.mark.parametrize("rule", ["ovis", "internvl"])
@pytest.mark.parametrize("thumbnail", ["first", "last", "none"])
def test_row_texts_over_tiles_agree_with_the_pixels(rule, thumbnail):
    """A bar drawn in the image appears in the token row that `row_texts` gives its text to."""
    tiling = Tiling(rule=rule, tile_height=40, tile_width=80, max_tiles=9, thumbnail=thumbnail)
    size, token_rows = (150, 130), 4
    for y in range(2, 126, 9):
        image = Image.new("RGB", size, "black")
        ImageDraw.Draw(image).rectangle((0, y, size[0], y + 2), fill="white")
        (rows, cols), texts = row_texts([line("bar", 0, y, 150, y + 3)], size, tiling, token_rows)
        assert len(texts) == rows * token_rows
        tiles = cut_tiles(image, tiling).numpy()
        plan = plan_tiles(*size, tiling)
        tiles = tiles[[not box.is_thumbnail for box in plan]]
        tokens = tiles.mean(1).reshape(len(tiles), token_rows, 10, 80).max(axis=2).reshape(len(tiles), -1, 1)
        assert rows * cols == len(tiles) > 1
        brightness = to_rows(torch.from_numpy(tokens), (rows, cols), (token_rows, 80)).mean(dim=(1, 2))
        assert brightness[texts.index("bar")] > 0
        assert texts.count("") == len(texts) - 1
