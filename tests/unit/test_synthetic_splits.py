"""Held-out documents share no word, value or answer with training documents, whatever the seed."""

import re
from functools import cache
from random import Random

import pytest

from alignvlm_pl.errors import ConfigError
from datamodules.prepare.synthetic import KINDS, Document, generate_document
from datamodules.prepare.synthetic.lexicon import SHARED_RUNS, alphanumerics, belongs, load_lexicon
from datamodules.prepare.synthetic.makers import TEXT_MAKERS, draw

NUM_DOCUMENTS = 40  # of each kind and split


@cache
def _documents(split: str) -> list[Document]:
    return [
        generate_document(seed, split=split, kind=kind, num_questions=9)
        for kind in KINDS
        for seed in range(NUM_DOCUMENTS)
    ]


def _prints(texts: list[str]) -> set[str]:
    """Whole tokens (also cut at colons, as in ``Key:value``) and runs of letters, as read by anybody."""
    found: set[str] = set()
    for text in texts:
        found.update(alphanumerics(token) for token in re.split(r"[\s:]+", text))
        found.update(run for run in re.findall(r"[a-z]{3,}", text.lower()))
    return {print_ for print_ in found if len(print_) >= 2} - SHARED_RUNS


def _page_texts(split: str) -> list[str]:
    return [line["text"] for document in _documents(split) for line in document.lines]


def test_no_word_or_value_of_a_heldout_page_is_on_a_training_page() -> None:
    heldout, train = _prints(_page_texts("heldout")), _prints(_page_texts("train"))
    # Times of day such as 12:30 fall apart at the colon; their halves say nothing alone.
    shared = {print_ for print_ in heldout & train if not (print_.isdigit() and len(print_) <= 2)}
    assert len(heldout) > 500 and len(train) > 500
    assert not {print_ for print_ in shared if not re.fullmatch(r"\d{1,2}(am|pm)", print_)}


def test_no_heldout_answer_is_a_training_answer() -> None:
    answers = {
        split: {turn.answer.lower() for document in _documents(split) for turn in document.turns}
        for split in ("train", "heldout")
    }
    assert len(answers["heldout"]) > 300
    assert not answers["train"] & answers["heldout"]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_maker_gives_texts_of_its_split(split: str) -> None:
    rng = Random(5)
    for maker in TEXT_MAKERS:
        texts = [draw(rng, split, maker) for _ in range(30)]
        assert all(belongs(text, split) for text in texts), maker.__name__
        assert len(set(texts)) > 3, maker.__name__


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", True),  # single characters are free
        ("BAKERY", None),
        ("$1,250.00", None),
    ],
)
def test_a_text_belongs_to_one_split_whatever_its_case_and_marks(text: str, expected: bool | None) -> None:
    sides = [belongs(text, split) for split in ("train", "heldout")]
    if expected is not None:
        assert sides == [expected, expected]
    else:
        assert sides.count(True) == 1
        assert belongs(f"({text.lower()})", "train") == sides[0]


def test_the_lexicon_is_large_and_its_parts_are_disjoint() -> None:
    train, heldout = load_lexicon("train"), load_lexicon("heldout")
    sizes = [sum(map(len, part.words.values())) for part in (train, heldout)]
    assert sizes[0] > 15_000 and sizes[1] > 2_000
    for origin in ("common", "names", "places", "foreign"):
        assert not set(train.words[origin]) & set(heldout.words[origin])


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown 'held-out'; did you mean 'heldout'"):
        generate_document(0, split="held-out")
