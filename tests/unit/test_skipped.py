"""Skipped samples by reason."""

from alignvlm_pl.utils.skipped import SkippedSamples


def test_counts_and_first_messages_are_kept_and_merged():
    total, other = SkippedSamples(keep=2), SkippedSamples(keep=2)
    total.add("bad_json", "a")
    for message in "bcd":
        other.add("bad_json", message)
    other.add("missing_image", "e", 4)
    total.merge(other)
    assert total.counts == {"bad_json": 4, "missing_image": 4}
    assert total.messages == {"bad_json": ["a", "b"], "missing_image": ["e"]}
    assert other.messages["bad_json"] == ["b", "c"], "the other one stays as it is"
    assert str(total) == "bad_json: 4, missing_image: 4"
    assert str(SkippedSamples()) == "nothing skipped"


def test_all_messages_can_be_kept():
    every = SkippedSamples(keep=None)
    for message in "abc":
        every.add("bad_json", message)
    every.merge(every)
    assert every.messages == {"bad_json": list("abcabc")}
