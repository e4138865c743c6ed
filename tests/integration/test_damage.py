"""Every kind of damage in the three uses of a set: training, evaluation, `shards verify`. Nothing vanishes in silence.

A set is damaged and then either used with the manifest that it had (a copy went wrong), or indexed as it is (shards
made elsewhere). What each use must find stands beside each kind, and nothing may hang.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignvlm_pl.errors import DataError
from alignvlm_pl.models.processing import AlignVLMProcessor
from alignvlm_pl.models.tiny import TILE_PX, TOKENS_PER_TILE, tiny_tokenizer
from tests.integration.damage_bytes import FILES
from tests.integration.damage_kinds import CAPTIONS, NORMAL, flipped
from tests.integration.damage_world import (
    KEYS,
    SHARD,
    TARGET,
    Outcome,
    caption_set,
    copied,
    data_module,
    evaluate,
    index_again,
    members,
    rewrite,
    train_epoch,
    verify,
    whole_set,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="session")
def processor() -> AlignVLMProcessor:
    tiling = {"tile_height": TILE_PX, "tile_width": TILE_PX, "max_tiles": 4}
    return AlignVLMProcessor(tiny_tokenizer(), tiling=tiling, tokens_per_tile=TOKENS_PER_TILE, chat_template="chatml")


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    return whole_set(tmp_path_factory.mktemp("whole") / "set")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    return whole_set(tmp_path_factory.mktemp("photos") / "set", "JPEG")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    return caption_set(tmp_path_factory.mktemp("pairs") / "set")


def left_out(reason: str, *kinds: str, key: str = TARGET) -> Outcome:
    """Skipped in training, named in evaluation, found by `verify`."""
    keys = KEYS if key in KEYS else sorted(key if old == TARGET else old for old in KEYS)
    return Outcome(skipped={"made": {reason: 1}}, bad=[(key, reason)], verify=list(kinds or (reason,)), keys=keys)


def stops(message: str, *kinds: str) -> Outcome:
    """Training and evaluation stop with the same error."""
    return Outcome(skipped=message, bad=message, verify=list(kinds))


WHOLE = Outcome()
# Shards that were indexed as they are; a text where `prepare index` refuses them.
PARTIAL = rf"sample '{TARGET}' in .*{SHARD} is partial: its json names 1 images but 0.png is not in the shard"
NO_JSON = rf"sample '{TARGET}' in .*{SHARD} has no json member \(found: "
TWICE = rf"{SHARD} is damaged at sample 1 of 4, byte \d+ \({TARGET}.* duplicate file name"
NOT_INDEXED = rf"{SHARD}: sample '{TARGET}' has the member {TARGET}\.\S+ twice, again at byte \d+; rebuild"
INDEXED: dict[str, Outcome | str] = {
    "member twice": stops(TWICE, "repeated_member"),
    "picture called .txt": PARTIAL,
    "json called .jsn": NO_JSON + r"0\.png, jsn\)",
    "no json": NO_JSON + r"0\.png\)",
    "no picture": PARTIAL,
    "json a list": left_out("bad_json"),
    "json empty": left_out("bad_json"),
    "json cut": left_out("bad_json"),
    "no messages": left_out("invalid_sample"),
    "null messages": left_out("invalid_sample"),
    "null content": left_out("invalid_sample"),
    "null text": left_out("invalid_sample"),
    "json not UTF-8": left_out("bad_json"),
    "json nested deeply": left_out("bad_json"),
    "half a surrogate pair": left_out("bad_json"),
    "two placeholders": left_out("placeholder_count"),
    "no placeholder": left_out("placeholder_count"),
    "placeholder of another index": left_out("placeholder_count"),
    # To be asked about, but not to be learned from.
    "empty answer": Outcome(skipped={"made": {"nothing_to_learn": 1}}),
    "no answer": Outcome(skipped={"made": {"nothing_to_learn": 1}}),
    "picture of 0x0": left_out("undecodable_image"),
    "picture of 1x20000": WHOLE,
    "CMYK JPEG": WHOLE,
    "16-bit PNG": WHOLE,
    "animated GIF": WHOLE,
    "animated WEBP": WHOLE,
    # Only its own json remembers another picture.
    "picture of another size": Outcome(verify=["wrong_picture"]),
    "JPEG cut": left_out("undecodable_image"),
    "JPEG header flipped": left_out("undecodable_image"),
    "picture empty": left_out("undecodable_image"),
    "HTML page as picture": left_out("undecodable_image"),
    "decompression bomb": left_out("undecodable_image"),
    # It is there, under a name that another has too.
    "key of another shard": Outcome(
        verify=["repeated_key"], keys=sorted(KEYS[0] if key == TARGET else key for key in KEYS)
    ),
    "sample in two parts": rf"members of sample '{TARGET}' stand apart \(json, and 0.png at byte \d+\)",
}
INDEXED_PAIRS: dict[str, Outcome | str] = {
    "picture called .txt": NOT_INDEXED,
    "picture called .jpg_large": left_out("missing_image"),
    "json called .jsn": WHOLE,
    "no json": WHOLE,
    "no picture": left_out("missing_image"),
    "no txt": WHOLE,
    "neither json nor txt": left_out("empty_caption"),
    "empty txt": left_out("empty_caption"),
    "txt not UTF-8": left_out("bad_text"),
    "json a list": left_out("bad_json"),
    "json not UTF-8": left_out("bad_json"),
    "json nested deeply": left_out("bad_json"),
    "CMYK JPEG": WHOLE,
    "animated GIF": WHOLE,
    "JPEG cut": left_out("undecodable_image"),
    "HTML page as picture": left_out("undecodable_image"),
    "picture of 0x0": left_out("undecodable_image"),
    "decompression bomb": left_out("undecodable_image"),
    "key with dots": left_out("missing_image", key="2301"),
    "key not UTF-8": Outcome(keys=sorted("caf\\xe9" if key == TARGET else key for key in KEYS)),
}
# With the manifest and the index of before, where size and places are the same.
SAME_PLACE = {
    "picture of another size": left_out("size_mismatch"),
    "key of another shard": stops(rf"{SHARD} is damaged at sample 1 of 4, byte 2560 \(found {KEYS[0]} in its place"),
}
MAY_FOLLOW = ("wrong_index", "wrong_picture", "wrong_count", "repeated_key", "members_apart")
TRUNCATED = rf"{SHARD} is truncated: expected 20480 bytes, found "
SECOND = rf"{SHARD} is damaged at sample 1 of 4, byte 2560 \("
FIRST = rf"{SHARD} is damaged at sample 0 of 4, byte 0 \("
LOST = ("not_a_sample", "wrong_count", "wrong_index")
DAMAGED = {
    "cut in data": stops(TRUNCATED + "4103", "wrong_size", "cut_in_data", *LOST),
    "cut at a sample": stops(TRUNCATED + "2560", "wrong_size", "cut_at_member", *LOST[1:]),
    "cut at a member": stops(TRUNCATED + "3584", "wrong_size", "cut_at_member", *LOST),
    "cut in a header": stops(TRUNCATED + "3684", "wrong_size", "cut_in_header", *LOST),
    "cut before the end mark": stops(TRUNCATED + "10240", "wrong_size", "cut_at_member"),
    "cut in the end mark": stops(TRUNCATED + "10752", "wrong_size", "cut_at_end"),
    "cut to nothing": stops(TRUNCATED + "0", "wrong_size", "cut_at_member", *LOST[1:]),
    "zeros from a sample on": stops(SECOND + "nothing but zeros in its place", "wrong_sha256", *LOST[1:]),
    "zeros from a member on": stops(SECOND + rf"nothing but zeros after {TARGET}\.json\)", "wrong_sha256", *LOST),
    "zeros in the last picture": left_out("undecodable_image", "wrong_sha256", "undecodable_image", key=KEYS[7]),
    "zeroed header": stops(
        SECOND + "byte 2560: a header of zeros in the middle", "wrong_sha256", "zeroed_header", *LOST[1:]
    ),
    "zeroed header of the last member": stops(
        rf"{SHARD} is damaged at sample 3 of 4, byte 7680 \(byte 8704: a header of zeros in the middle",
        *("wrong_sha256", "zeroed_header", "not_a_sample", "wrong_index"),
    ),
    "garbage header": stops(SECOND + "byte 2560: broken header here", "wrong_sha256", "bad_header", *LOST[1:]),
    "garbage first header": stops(FIRST + "byte 0: broken header", "wrong_sha256", "bad_header", *LOST[1:]),
    "size below zero": stops(
        SECOND + "byte 3584: broken header after this member .a member of -512 bytes",
        *("wrong_sha256", "bad_header", *LOST),
    ),
    "size of no bytes": stops(
        SECOND + "byte 4096: broken header", "wrong_sha256", "bad_header", "undecodable_image", *LOST[1:]
    ),
    "size beyond the file": stops(
        SECOND + "byte 5120: the file ends inside this member", "wrong_sha256", "cut_in_data", *LOST
    ),
    "HTML page": stops(TRUNCATED + "64", "wrong_size", "cut_in_header", *LOST[1:]),
    "HTML page of the same size": stops(
        FIRST + "byte 0: broken header at its begin: it is no tar", "wrong_sha256", "bad_header", *LOST[1:]
    ),
    "deleted": stops(f"{SHARD} is missing but manifest.json lists it", "missing"),
    "grown": stops(f"{SHARD} is changed: expected 20480 bytes, found 30720", "wrong_size"),
    "content of another shard": stops(
        FIRST + f"found {KEYS[0]} in its place", "wrong_sha256", *["repeated_key"] * 4, "wrong_index"
    ),
    "json overwritten": left_out("bad_json", "wrong_sha256", "bad_json"),
    "picture overwritten": left_out("undecodable_image", "wrong_sha256", "undecodable_image"),
}
# Two workers evaluate two parts at a time: the second begins with the sample at byte 5120.
THIRD = rf"{SHARD} is damaged at sample 2 of 4, byte 5120 \("
SECOND_PART = {
    "zeros from a sample on": THIRD + "nothing but zeros in its place",
    "zeros from a member on": THIRD + "nothing but zeros in its place",
    "HTML page of the same size": THIRD + "byte 5120: broken header here",
    "content of another shard": THIRD + f"found {KEYS[2]} in its place",
}
# What `prepare index` says of the same.
REFUSED = {
    "cut in data": "cut_in_data",
    "cut at a sample": "cut_at_member",
    "cut at a member": "cut_at_member",
    "cut in a header": "cut_in_header",
    "cut before the end mark": "cut_at_member",
    "cut in the end mark": "cut_at_end",
    "cut to nothing": "cut_at_member",
    "zeroed header": "zeroed_header",
    "zeroed header of the last member": "zeroed_header",
    "garbage header": "bad_header",
    "garbage first header": "bad_header",
    "size below zero": "bad_header",
    "size of no bytes": "bad_header",
    "size beyond the file": "cut_in_data",
    "HTML page": "cut_in_header",
    "HTML page of the same size": "bad_header",
}


def check(
    folder: Path,
    processor: Any,
    capsys: Any,
    expected: Outcome,
    *,
    captions: bool = False,
    workers: tuple[int, ...] = (0, 2),
    second_part: str | None = None,
) -> None:
    """Use a set in all three ways and compare with what is expected."""
    for num_workers in workers:
        options = {"captions": captions, "num_workers": num_workers}
        if isinstance(expected.skipped, str):
            with pytest.raises(DataError, match=expected.skipped):
                train_epoch(folder, processor, **options)
        else:
            keys, skipped = train_epoch(folder, processor, num_samples=len(expected.keys), **options)
            assert skipped == expected.skipped
            assert sorted(keys.elements()) == seen(expected, bool(skipped))
        if isinstance(expected.bad, str):
            with pytest.raises(DataError, match=(num_workers and second_part) or expected.bad):
                evaluate(folder, processor, **options)
        else:
            keys, bad = evaluate(folder, processor, **options)
            assert bad == expected.bad
            assert sorted(keys.elements()) == seen(expected, bool(bad))
    assert verify(folder, capsys, format="captions" if captions else "normal") == expected.verify


def seen(expected: Outcome, one_is_bad: bool) -> list[str]:
    """All keys, each as often as it is there; without the only bad sample."""
    bad = expected.bad[0][0] if expected.bad else TARGET
    return sorted((Counter(expected.keys) - Counter([bad] if one_is_bad else [])).elements())


def test_every_kind_has_its_outcome(whole, processor, capsys):
    assert INDEXED.keys() == NORMAL.keys()
    assert INDEXED_PAIRS.keys() == CAPTIONS.keys()
    assert DAMAGED.keys() == FILES.keys()
    check(whole, processor, capsys, WHOLE)


@pytest.mark.parametrize("kind", NORMAL)
def test_shards_indexed_with_their_damage(whole, tmp_path, processor, capsys, kind):
    folder = copied(whole, tmp_path / "set")
    rewrite(folder, NORMAL[kind])
    expected = NOT_INDEXED if kind == "member twice" else INDEXED[kind]
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            index_again(folder, "normal")
        assert not (folder / "manifest.json").exists()
        return
    index_again(folder, "normal")
    check(folder, processor, capsys, expected)


@pytest.mark.parametrize("kind", CAPTIONS)
def test_pairs_made_elsewhere(pairs, tmp_path, processor, capsys, kind):
    folder = copied(pairs, tmp_path / "set")
    rewrite(folder, CAPTIONS[kind])
    expected = INDEXED_PAIRS[kind]
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            index_again(folder, "captions")
        return
    index_again(folder, "captions")
    check(folder, processor, capsys, expected, captions=True)


@pytest.mark.parametrize("kind", NORMAL)
def test_a_shard_rewritten_after_its_manifest(whole, tmp_path, processor, capsys, kind):
    """Its size tells; where its blocks fill up to the same size, the places of its samples, or the sample itself."""
    folder = copied(whole, tmp_path / "set")
    path = folder / SHARD
    size, places = path.stat().st_size, [(member.begin, member.end) for member in members(path)]
    rewrite(folder, NORMAL[kind])
    now = path.stat().st_size
    alone = INDEXED[kind] if isinstance(INDEXED[kind], Outcome) else stops(INDEXED[kind], "not_a_sample")
    if now != size:
        state = "truncated" if now < size else "changed"
        expected = stops(rf"{SHARD} is {state}: expected {size} bytes, found {now}")
    elif [(member.begin, member.end) for member in members(path)] != places:
        # Where the sample ends by the index, the next one does not begin.
        expected = stops(rf"{SHARD} is damaged at sample [12] of 4, byte \d+ \(")
    else:
        expected = SAME_PLACE.get(kind, alone)
    found = verify(folder, capsys)
    assert found[0] == ("wrong_sha256" if now == size else "wrong_size")
    assert set(alone.verify) <= set(found[1:]) <= {*alone.verify, *MAY_FOLLOW}
    check(folder, processor, capsys, replace(expected, verify=found), workers=(0,))


@pytest.mark.parametrize("kind", FILES)
def test_a_shard_damaged_after_its_manifest(whole, tmp_path, processor, capsys, kind):
    folder = copied(whole, tmp_path / "set")
    FILES[kind](folder / SHARD)
    check(folder, processor, capsys, DAMAGED[kind], second_part=SECOND_PART.get(kind))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_damaged_shard_is_not_indexed(whole, tmp_path, kind):
    folder = copied(whole, tmp_path / "set")
    FILES[kind](folder / SHARD)
    with pytest.raises(DataError, match=rf"shard .*{SHARD} is cut or damaged: .*\({REFUSED[kind]}\)"):
        index_again(folder, "normal")
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["deleted", "grown", "content of another shard"])
def test_what_is_no_damage_once_it_is_indexed(whole, tmp_path, processor, capsys, kind):
    folder = copied(whole, tmp_path / "set")
    FILES[kind](folder / SHARD)
    index_again(folder, "normal")
    other = {"deleted": [], "grown": KEYS[4:8], "content of another shard": KEYS[:4]}[kind]
    repeated = ["repeated_key"] * 4 if kind == "content of another shard" else []
    check(folder, processor, capsys, Outcome(keys=sorted([*KEYS[:4], *other, *KEYS[8:]]), verify=repeated))


def test_a_jpeg_whose_bytes_flipped_decodes_and_only_checksums_tell(photos, tmp_path, processor, capsys):
    folder = copied(photos, tmp_path / "set")
    path = folder / SHARD
    place = next(m for m in members(path) if m.name == f"{TARGET}.0.jpg")
    at = place.data_offset + place.size - 40
    path.write_bytes(flipped(path.read_bytes(), start=at, stop=at + 8))
    check(folder, processor, capsys, Outcome(verify=["wrong_sha256", "wrong_picture"]))
    index_again(folder, "normal")
    check(folder, processor, capsys, Outcome(verify=["wrong_picture"]))


def test_a_shard_that_goes_or_grows_while_it_is_used(whole, tmp_path, processor):
    """After `setup` has compared the sizes."""
    for number, (kind, message) in enumerate(
        {"deleted": f"{SHARD} is missing", "grown": f"{SHARD} is changed: expected"}.items()
    ):
        folder = copied(whole, tmp_path / str(number))
        data = data_module(folder, processor, batch_size=2, num_workers=0)
        data.setup("fit")
        loader = data.train_dataloader()
        FILES[kind](folder / SHARD)
        with pytest.raises(DataError, match=message):
            list(loader)
        with pytest.raises(DataError, match=message):
            list(data.benchmark_dataloader("held"))
