"""PDFs made for tests: whole, and as they should not be."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image


def grey_of(number: int) -> int:
    """The grey of a page, counted from 1."""
    return 20 + number * 7 % 200


def write_pdf(path: Path, pages: int, *, size: tuple[int, int] = (60, 80), points_per_pixel: float = 1.0) -> Path:
    """Write a PDF of grey pages, each of its own grey and with a black corner, `size` pixels of the image large."""

    def page(number: int) -> Image.Image:
        image = Image.new("RGB", size, (grey_of(number),) * 3)
        image.paste("black", (0, 0, size[0] // 4, size[1] // 4))
        return image

    others: Iterator[Image.Image] = (page(number) for number in range(2, pages + 1))
    page(1).save(path, save_all=True, append_images=others, resolution=72 / points_per_pixel)
    return path


def encrypted_pdf() -> bytes:
    """A PDF whose password is none that anybody knows: its checksums are zeros."""
    lock = b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"00" * 32 + b">/U<" + b"00" * 32 + b">>>"
    parts = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[]/Count 0>>", lock]
    return _joined(parts, trailer=b"/Encrypt 3 0 R/ID[<00><00>]")


def filled_form_pdf() -> bytes:
    """A PDF of one empty page, 100 points wide and high, with a form field that is filled in: a black square."""
    square = b"0 0 50 50 re f"
    field = b"<</Type/Annot/Subtype/Widget/FT/Tx/T(a)/V(x)/F 4/Rect[25 25 75 75]/P 3 0 R/AP<</N 5 0 R>>>>"
    return _joined(
        [
            b"<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[4 0 R]>>>>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]/Annots[4 0 R]>>",
            field,
            b"<</Type/XObject/Subtype/Form/BBox[0 0 50 50]/Length %d>>stream\n%b\nendstream" % (len(square), square),
        ]
    )


def _joined(parts: list[bytes], *, trailer: bytes = b"") -> bytes:
    body, starts = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, start=1):
        starts.append(len(body))
        body += b"%d 0 obj\n%b\nendobj\n" % (number, part)
    size = len(parts) + 1
    table = b"xref\n0 %d\n0000000000 65535 f \n" % size + b"".join(b"%010d 00000 n \n" % start for start in starts)
    end = b"trailer\n<</Size %d/Root 1 0 R%b>>\nstartxref\n%d\n%%%%EOF\n" % (size, trailer, len(body))
    return body + table + end
