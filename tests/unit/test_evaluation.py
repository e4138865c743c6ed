"""Records of answers, figures of sets, merging over ranks, and the page a model saw."""

import json

import numpy as np
import pytest
from PIL import Image

from alignvlm_pl.errors import DataError
from alignvlm_pl.evaluation import (
    answer_records,
    merge,
    overall,
    page_image,
    readout_records,
    summarize,
    write_predictions,
    write_results,
)
from alignvlm_pl.imaging import cut_tiles
from alignvlm_pl.tiling import Tiling


def batch(*references):
    keys = [f"k-{index}" for index in range(len(references))]
    return {
        "keys": keys,
        "questions": [f"q{key}" for key in keys],
        "references": [list(r) for r in references],
    }


def test_answers_are_scored_against_all_references():
    records = answer_records(batch(["12.50", "12.5"], ["Lund"]), ["12.5", "Land"], ["exact_match", "anls"])
    assert records[0] == {
        "key": "k-0",
        "question": "qk-0",
        "prediction": "12.5",
        "references": ["12.50", "12.5"],
        "exact_match": 1.0,
        "anls": 1.0,
    }
    assert (records[1]["exact_match"], records[1]["anls"]) == (0.0, 0.75)
    assert summarize(records) == {"num": 2, "exact_match": 0.5, "anls": 0.875}


def test_a_lost_answer_is_an_error_and_not_a_shift():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        answer_records(batch(["a"], ["b"]), ["a"], ["anls"])


def test_readings_are_counted_in_edits_over_all_characters():
    records = readout_records(batch(["abcd"], ["ab"]), [("ABCD", "abcd"), ("xb", "ab")])
    assert [(r["edits"], r["characters"]) for r in records] == [(0, 4), (1, 2)]
    # One edit over six characters; the mean of the samples' rates would be 0.25.
    assert summarize(records) == {"num": 2, "cer": pytest.approx(1 / 6)}


def test_merge_takes_each_key_once_in_order():
    records = [{"key": "b", "x": 1}, {"key": "a", "x": 2}, {"key": "b", "x": 1}]
    assert merge(records, name="set", expected=2) == [{"key": "a", "x": 2}, {"key": "b", "x": 1}]


@pytest.mark.parametrize("expected", [1, 3])
def test_merge_refuses_a_part_of_the_set(expected):
    with pytest.raises(
        DataError, match=rf"benchmark 'set': 2 samples were scored, its manifest has {expected}"
    ):
        merge([{"key": "a"}, {"key": "b"}], name="set", expected=expected)


def test_overall_is_a_mean_over_questions_and_leaves_readouts_out():
    results = {
        "large": {"num": 3, "anls": 1.0},
        "small": {"num": 1, "anls": 0.0},
        "read": {"num": 100, "cer": 0.5},
    }
    assert overall(results) == {"num": 4, "anls": 0.75}
    assert overall({"read": {"num": 1, "cer": 0.5}}) == {}


def test_no_records_have_no_figures():
    assert summarize([]) == {"num": 0}
    assert overall({"empty": {"num": 0}}) == {}


@pytest.mark.parametrize("thumbnail", ["none", "first", "last"])
@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 192)])
def test_page_is_put_together_from_its_tiles(thumbnail, size):
    tiling = Tiling(tile_height=64, tile_width=64, max_tiles=4, thumbnail=thumbnail)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    page = page_image(cut_tiles(Image.fromarray(pixels), tiling), size, tiling)
    assert page.size == size
    # Tiles of these sizes are cut without resizing; the way to [-1, 1] and back rounds.
    assert np.abs(np.asarray(page).astype(int) - pixels).max() <= 1


def test_files_are_whole_or_absent(tmp_path):
    write_predictions(tmp_path / "p" / "set.jsonl", [{"key": "a", "prediction": "Ä\n€"}])
    (line,) = (tmp_path / "p" / "set.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prediction"] == "Ä\n€"
    assert "Ä" in line
    write_results(tmp_path / "results.json", {"overall": {"num": 1}})
    earlier = (tmp_path / "results.json").read_text()
    with pytest.raises(TypeError):
        write_results(tmp_path / "results.json", {"bad": object()})
    assert (tmp_path / "results.json").read_text() == earlier
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["p", "results.json", "set.jsonl"]
