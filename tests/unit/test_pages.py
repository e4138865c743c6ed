"""Pages of files: which are asked for, which files are found, and what PDFs, TIFFs and images show."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.serving import pages
from alignvlm_pl.serving.pages import PageRange, count_pages, find_files, open_document
from tests.unit.pdf_files import encrypted_pdf, filled_form_pdf, grey_of, write_pdf


@pytest.mark.parametrize(
    ("text", "count", "numbers", "missing"),
    [
        ("1-5,9", 12, [1, 2, 3, 4, 5, 9], None),
        ("9,1-5", 7, [1, 2, 3, 4, 5], 9),
        ("2-4, 3-5", 3, [2, 3], 4),
        ("1-3", 3, [1, 2, 3], None),
        ("3-", 5, [3, 4, 5], None),
        ("3-", 2, [], 3),
        ("7", 3, [], 7),
        ("1-999999999", 2, [1, 2], 3),
    ],
)
def test_a_range_of_pages(text, count, numbers, missing) -> None:
    pages = PageRange.parse(text)
    assert (pages.numbers(count), pages.first_missing(count)) == (numbers, missing)


@pytest.mark.parametrize("text", ["", "0", "5-3", "1,,2", "-3", "a", "1-2-3", "²"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no page or span of pages; expected such as 1-5,9 or 3-"):
        PageRange.parse(text)


def test_files_of_folders_globs_and_lists(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.PDF", "b/1.png", "b/inner/3.tif", "b/notes.txt", "x1.jpg", "x2.jpg", "y[1].jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()

    def names(*words: str, listed: str = "") -> list[str]:
        return [str(path) for path in find_files(words, listed=io.StringIO(listed))]

    assert names("b") == ["b/1.png", "b/2.PDF", "b/inner/3.tif"]
    assert names("x*.jpg", "x1.jpg", "gone.png") == ["x1.jpg", "x2.jpg", "gone.png"]  # each once; it need not exist
    assert names("y[1].jpg") == ["y[1].jpg"]  # a name comes before a pattern
    assert names("-", listed="x2.jpg\r\n\n a.png\nb/inner\n") == ["x2.jpg", " a.png", "b/inner/3.tif"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no page in this folder; expected files that end with .pdf"):
        names("empty")
    with pytest.raises(DataError, match=r"z\*: no file has such a name"):
        names("z*")
    with pytest.raises(DataError, match="the list on stdin is empty"):
        names("-")


def test_pages_of_a_pdf_are_rendered_at_a_resolution(tmp_path: Path) -> None:
    path = write_pdf(tmp_path / "a.pdf", 3)
    for dpi, size in ((72, (60, 80)), (144, (120, 160))):
        with open_document(path, dpi=dpi) as document:
            assert len(document) == 3
            for number in (3, 1):
                page = document.page(number)
                assert (page.mode, page.size) == ("RGB", size)
                assert page.getpixel((size[0] - 2, size[1] - 2)) == pytest.approx((grey_of(number),) * 3, abs=2)
                assert page.getpixel((3, 3)) == pytest.approx((0, 0, 0), abs=8)


def test_what_is_filled_into_a_form_is_seen(tmp_path: Path) -> None:
    (path := tmp_path / "form.pdf").write_bytes(filled_form_pdf())
    with open_document(path, dpi=72) as document:
        page = document.page(1)
    assert [page.getpixel(place) for place in ((50, 50), (10, 10))] == [(0, 0, 0), (255, 255, 255)]


def test_a_page_with_too_many_pixels_is_not_rendered(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pages, "MAX_PIXELS", 60 * 80)
    with open_document(write_pdf(tmp_path / "a.pdf", 2), dpi=72) as document:
        document.page(2)
    message = "page 2 has 61x81 pixels at 73 dpi, expected at most 4800 in all; lower --dpi"
    with open_document(tmp_path / "a.pdf", dpi=73) as document, pytest.raises(DataError, match=message):
        document.page(2)


def test_pdfs_that_do_not_open_are_named(tmp_path: Path) -> None:
    (encrypted := tmp_path / "e.pdf").write_bytes(encrypted_pdf())
    with pytest.raises(DataError, match=r"e.pdf: the PDF is encrypted; give a copy of it that opens without"):
        open_document(encrypted, dpi=72)
    (cut := tmp_path / "no-suffix").write_bytes(b"\n%PDF-1.4\n garbage")
    (text := tmp_path / "t.pdf").write_text("no PDF at all")
    for path in (cut, text):
        with pytest.raises(DataError, match=rf"{path.name}: not a PDF that can be read \(PDFium: Data format error\)"):
            open_document(path, dpi=72)
    with pytest.raises(DataError, match=r"gone.pdf: cannot be read \(No such file or directory\); check the path"):
        open_document(tmp_path / "gone.pdf", dpi=72)
    assert count_pages([encrypted, cut, write_pdf(tmp_path / "a.pdf", 4)], PageRange.parse("2-9"), dpi=72) == 3


def test_without_its_package_a_pdf_is_refused_in_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(ConfigError, match=r"PDFs need the package pypdfium2; pip install 'alignvlm_pl\[serve\]'"):
        open_document(write_pdf(tmp_path / "a.pdf", 1), dpi=72)


def test_pages_of_a_tiff_stay_as_they_were(tmp_path: Path) -> None:
    path, greys = tmp_path / "a.tif", (10, 120, 230)
    first, *others = (Image.new("RGB", (30 + grey, 20), (grey,) * 3) for grey in greys)
    first.save(path, save_all=True, append_images=others)
    with open_document(path, dpi=72) as document:
        found = [document.page(number) for number in range(1, len(document) + 1)]
    assert [page.size for page in found] == [(30 + grey, 20) for grey in greys]
    assert [page.getpixel((5, 5))[0] for page in found] == list(greys)


def test_a_damaged_page_of_a_tiff_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    noise = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (64, 64), dtype=np.uint8)) for n in range(2)]
    noise[0].save(path, save_all=True, append_images=noise[1:], compression="tiff_lzw")
    content = path.read_bytes()
    with Image.open(path) as image:
        image.seek(1)
        start, length = image.tag_v2[273][0], image.tag_v2[279][0]
    path.write_bytes(content[:start] + b"\xff" * length + content[start + length :])
    with open_document(path, dpi=72) as document:
        assert document.page(1).size == (64, 64)
        with pytest.raises(DataError, match=r"a.tif: page 2: TIFF image of 64x64 pixels does not decode"):
            document.page(2)


def test_an_image_has_one_page(tmp_path: Path) -> None:
    Image.new("L", (5, 4)).save(tmp_path / "a.png")
    with open_document(tmp_path / "a.png", dpi=72) as document:
        assert (len(document), document.page(1).mode) == (1, "RGB")


def test_pages_need_no_torch() -> None:
    program = "import sys, alignvlm_pl.serving.pages, alignvlm_pl.serving.records; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "False\n", done.stderr
