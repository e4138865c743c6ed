"""Images of benchmarks are found again where they were scaled or compressed, and others are not taken for them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from alignvlm_pl.errors import DataError
from datamodules.prepare.jsonl import JsonlData
from datamodules.prepare.pack.engine import pack, print_yield
from datamodules.prepare.pack.options import PackOptions
from datamodules.prepare.pack.overlap import BenchmarkImages, perceptual_hash, read_benchmark_images
from datamodules.shards.writer import ShardWriter


def page(seed: int, size: tuple[int, int] = (620, 800)) -> Image.Image:
    """Draw a page of lines of dark bars, as text looks from afar; no two have the same lines."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for top in range(40, size[1] - 40, 24):
        if random.random() < 0.8:
            left = 40
            while left < 40 + random.integers(100, size[0] - 100):
                width = int(random.integers(10, 60))
                draw.rectangle((left, top, left + width, top + 12), fill="black")
                left += width + 8
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def recompressed(image: Image.Image, quality: int, scale: float) -> Image.Image:
    buffer = io.BytesIO()
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    small.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def make_known(folder: Path, images: list[Image.Image]) -> BenchmarkImages:
    (folder / "known").mkdir()
    for number, image in enumerate(images):
        image.save(folder / "known" / f"{number:02d}.png")
    return read_benchmark_images([folder / "known"], folder)


@pytest.mark.parametrize(("quality", "scale"), [(100, 1.0), (40, 1.0), (75, 0.5), (60, 0.25)])
def test_copies_are_found_and_other_pages_are_not(tmp_path, quality, scale):
    known = make_known(tmp_path, [page(seed) for seed in range(20)])
    for seed in range(20):
        match = known.find_any([png(page(1000 + seed)), png(recompressed(page(seed), quality, scale))])
        assert match == str(tmp_path / "known" / f"{seed:02d}.png")


def test_forms_of_one_kind_with_other_entries_are_not_the_same(tmp_path):
    form = page(1)

    def filled(seed: int) -> Image.Image:
        image = form.copy()
        image.paste(page(seed, (300, 200)), (200, 500))
        return image

    signs = [perceptual_hash(filled(seed)) for seed in (2, 3)]
    assert signs[0] is not None and signs[1] is not None
    # The signs alone would take the one for the other.
    assert (signs[0] ^ signs[1]).bit_count() <= 6
    known = make_known(tmp_path, [filled(2)])
    assert known.find_any([png(filled(3))]) is None
    assert known.find_any([png(filled(2))]) is not None


def test_an_image_that_shows_nothing_is_like_no_other(tmp_path):
    assert perceptual_hash(Image.new("RGB", (300, 200), "white")) is None
    known = make_known(tmp_path, [Image.new("RGB", (30, 20), "white")])
    assert known.find_any([png(page(1)), b"no picture"]) is None


@pytest.fixture
def raw(tmp_path) -> JsonlData:
    folder = tmp_path / "raw"
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as stream:
        for number in range(6):
            page(number).save(folder / f"{number}.png")
            turns = [{"role": "user", "content": "<|image|>?"}, {"role": "assistant", "content": "a"}]
            stream.write(json.dumps({"image": f"{number}.png", "messages": turns}) + "\n")
    return JsonlData(path=folder / "train.jsonl", image_root=folder, source="set")


@pytest.fixture
def benchmarks(tmp_path) -> list[Path]:
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    recompressed(page(2), 60, 0.5).save(tmp_path / "pictures" / "deep" / "two.jpg")
    turn = {"role": "user", "content": [{"type": "image", "index": 0}]}
    with ShardWriter(tmp_path / "shards", name="bench", source="bench", license="none") as out:
        for seed in (4, 100):
            out.add({"messages": [turn]}, [png(page(seed))], ["png"])
    return [tmp_path / "pictures", tmp_path / "shards"]


def test_overlap_is_counted_named_and_dropped_when_asked(raw, benchmarks, tmp_path, capsys):
    kept = pack(raw, PackOptions(out=tmp_path / "kept", overlap_with=tuple(benchmarks)))
    report = json.loads((tmp_path / "kept" / "report.json").read_text())
    assert kept.num_samples == 6
    assert [(one["row"], Path(one["like"]).name) for one in report["benchmark_overlap"]["first"]] == [
        (2, "two.jpg"),
        (4, "bench-00000000.0.png"),
    ]
    options = PackOptions(out=tmp_path / "dropped", overlap_with=tuple(benchmarks), drop_overlap=True, workers=2)
    dropped = pack(raw, options)
    assert (dropped.num_samples, dropped.extra["skipped"]) == (4, {"benchmark_overlap": 2})
    assert dropped.extra["benchmark_overlap"]["samples"] == 2
    print_yield(dropped)
    assert "samples with an image that resembles one of a benchmark: 2 (skipped)" in capsys.readouterr().out


def test_a_folder_that_holds_no_benchmark_is_named(raw, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"--overlap-with: .*empty holds no dataset and no images"):
        read_benchmark_images([tmp_path / "empty"], tmp_path)
    with pytest.raises(DataError, match=r"--overlap-with: there is no folder .*absent"):
        pack(raw, PackOptions(out=tmp_path / "set", overlap_with=(tmp_path / "absent",)))
