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
    parts = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[]/Count 0>>",
        b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"00" * 32 + b">/U<" + b"00" * 32 + b">>>",
    ]
    body, starts = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, start=1):
        starts.append(len(body))
        body += b"%d 0 obj\n%b\nendobj\n" % (number, part)
    table = b"xref\n0 4\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % start for start in starts)
    trailer = b"trailer\n<</Size 4/Root 1 0 R/Encrypt 3 0 R/ID[<00><00>]>>\nstartxref\n%d\n%%%%EOF\n"
    return body + table + trailer % len(body)
