"""Pages of files: PDFs, TIFFs with several pages, and images; one page is in memory at a time. Loads no torch."""

import glob
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from PIL import Image

from ..errors import ConfigError, DataError
from ..preprocessing.imaging import MAX_PIXELS, load_image
from ..utils.text_files import content_kind, read_head

SUFFIXES = tuple(".pdf .png .jpg .jpeg .webp .gif .tif .tiff .bmp .ppm .pgm .pbm .jp2 .avif .tga .pcx".split())
"""Endings of the files that are looked for in folders; what a file is, its content says."""
POINTS_PER_INCH = 72
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PDF_MARK = b"%PDF-"


@dataclass(frozen=True, slots=True)
class PageRange:
    """Pages that are asked for, counted from 1: spans of a first and a last page, which is None for an open end."""

    text: str
    spans: tuple[tuple[int, int | None], ...]

    @classmethod
    def parse(cls, text: str) -> "PageRange":
        """Read a text such as ``1-5,9`` or ``3-``, to the last page.

        Raises:
            ConfigError: It has another form, a page 0, or a span that ends before it begins.
        """
        spans: list[tuple[int, int | None]] = []
        for part in text.split(","):
            found = re.fullmatch(r"\s*([0-9]{1,9})\s*(-\s*([0-9]{1,9})?)?\s*", part)
            first = int(found[1]) if found else 0
            last = first if found and not found[2] else int(found[3]) if found and found[3] else None
            if first < 1 or (last is not None and last < first):
                raise ConfigError(
                    f"--pages {text}: {part.strip()!r} is no page or span of pages; expected such as 1-5,9 or 3-, "
                    "counted from 1"
                )
            spans.append((first, last))
        return cls(text, tuple(spans))

    def numbers(self, count: int) -> list[int]:
        """Return the pages asked for that a document of `count` pages has, in ascending order, each once."""
        spans = (range(first, min(count if last is None else last, count) + 1) for first, last in self.spans)
        return sorted({number for span in spans for number in span})

    def first_missing(self, count: int) -> int | None:
        """Return the first page asked for that a document of `count` pages does not have; None where it has all."""
        missing = [max(first, count + 1) for first, last in self.spans if (first if last is None else last) > count]
        return min(missing, default=None)


class Document(AbstractContextManager["Document"]):
    """The pages of a file; `with` closes it. This one is an image, and so has one page."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def page(self, number: int) -> Image.Image:
        """Return a page, counted from 1, as an upright RGB image.

        Raises:
            DataError: The page is damaged, or has more pixels than `imaging.load_image` accepts.
        """
        return load_image(self.path)

    def close(self) -> None:
        """Close the file."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Tiff(Document):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._image = Image.open(path, formats=("TIFF",))
                self._count = int(getattr(self._image, "n_frames", 1))
        except Exception as error:  # decoders raise undocumented exceptions on hostile bytes
            raise DataError(f"{path}: not a TIFF that can be read ({error}); write the file again") from error

    def __len__(self) -> int:
        return self._count

    def page(self, number: int) -> Image.Image:
        if self._count == 1:
            return super().page(number)
        name = f"{self.path}: page {number}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._image.seek(number - 1)
        except Exception as error:  # as in __init__
            raise DataError(f"{name} does not decode ({error}); the file is truncated or damaged") from error
        # A copy: the next page takes the place of this one in the open file.
        return load_image(self._image, name=name).copy()

    def close(self) -> None:
        self._image.close()


class _Pdf(Document):
    """Pages are rendered on white; pdfium knows no threads, so a document stays in the one that opened it."""

    def __init__(self, path: Path, dpi: int) -> None:
        super().__init__(path)
        self._dpi = dpi
        try:
            import pypdfium2
        except ImportError as error:
            raise ConfigError(
                f"{path}: PDFs need the package pypdfium2; pip install 'alignvlm_pl[serve]', or give images of pages"
            ) from error
        self._error = pypdfium2.PdfiumError
        try:
            self._pdf = pypdfium2.PdfDocument(path)
        except (self._error, OSError, ValueError) as error:  # ValueError: a name that is no UTF-8
            if isinstance(error, self._error) and "password" in str(error):
                raise DataError(
                    f"{path}: the PDF is encrypted; give a copy of it that opens without a password"
                ) from error
            reason = str(error).removeprefix("Failed to load document ")
            raise DataError(
                f"{path}: not a PDF that can be read ({reason.strip('().')}); write the file again"
            ) from error
        with warnings.catch_warnings(), suppress(self._error):
            warnings.simplefilter("ignore")  # of XFA, which is not drawn
            self._pdf.init_forms()  # without it what was filled into a form is not drawn

    def __len__(self) -> int:
        return len(self._pdf)

    def page(self, number: int) -> Image.Image:
        scale = self._dpi / POINTS_PER_INCH
        try:
            page = self._pdf[number - 1]
            try:
                width, height = (max(1, round(side * scale)) for side in page.get_size())
                if width * height > MAX_PIXELS:
                    raise DataError(
                        f"{self.path}: page {number} has {width}x{height} pixels at {self._dpi} dpi, expected at most "
                        f"{MAX_PIXELS} in all; lower --dpi"
                    )
                bitmap = page.render(scale=scale, rev_byteorder=True)
                image = bitmap.to_pil().convert("RGB").copy()  # the pixels are pdfium's until then
                bitmap.close()
            finally:
                page.close()
        except self._error as error:
            raise DataError(f"{self.path}: page {number} cannot be rendered ({error}); the PDF is damaged") from error
        return load_image(image, name=f"{self.path}: page {number}")

    def close(self) -> None:
        self._pdf.close()


def open_document(path: Path, *, dpi: int) -> Document:
    """Open a file as what its content says it is: a PDF, rendered at `dpi`, a TIFF, or an image.

    Raises:
        DataError: It cannot be read, is damaged or encrypted. Of an image only `Document.page` says so.
        ConfigError: It is a PDF, and the package for it is not installed.
    """
    try:
        head = read_head(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); check the path") from error
    if _PDF_MARK in head or (path.suffix.lower() == ".pdf" and not content_kind(head)):
        return _Pdf(path, dpi)
    return _Tiff(path) if head.startswith(_TIFF_HEADS) else Document(path)


def find_files(words: Iterable[str], *, listed: IO[str] | None = None) -> list[Path]:
    """Return the files that words of a command line name, each once.

    A word is a file, a folder, of which all files with `SUFFIXES` are taken, those of inner folders too, in the order
    of their names, a glob, or ``-`` for the lines of `listed`, files and folders. A file need not exist.

    Raises:
        DataError: A folder or glob has no such file, or the words name none.
    """
    found: dict[Path, None] = {}
    for word in words:
        if word == "-":
            names = (line.strip("\r\n") for line in listed or ())
            found |= {path: None for name in names if name.strip() for path in _files_of(Path(name))}
        elif glob.has_magic(word) and not Path(word).exists():
            matches = sorted(glob.glob(word, recursive=True))
            if not matches:
                raise DataError(f"{word}: no file has such a name; check the pattern")
            found |= {path: None for name in matches for path in _files_of(Path(name))}
        else:
            found |= dict.fromkeys(_files_of(Path(word)))
    if not found:
        raise DataError("there is no file to read; the list on stdin is empty")
    return list(found)


def _files_of(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    inner = [one for one in sorted(path.rglob("*")) if one.suffix.lower() in SUFFIXES and one.is_file()]
    if not inner:
        raise DataError(f"{path}: no page in this folder; expected files that end with {', '.join(SUFFIXES)}")
    yield from inner


def count_pages(files: Iterable[Path], pages: PageRange | None, *, dpi: int) -> int:
    """Return how many pages of files are asked for; of those that cannot be opened none."""
    count = 0
    for path in files:
        with suppress(DataError), open_document(path, dpi=dpi) as document:
            count += len(document) if pages is None else len(pages.numbers(len(document)))
    return count
