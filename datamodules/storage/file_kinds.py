"""Files by name and by their first bytes: companions without data, compressed archives, odd names (no torch here)."""

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath
from unicodedata import normalize

# Formats without a mark of their own, and those that cannot be read, are known by their ending alone.
IMAGE_ENDINGS = (
    *("jpg", "jpeg", "png", "webp", "jpe", "jfif", "gif", "tif", "tiff", "bmp", "jp2", "avif"),
    *("ppm", "pgm", "pbm", "pnm", "tga", "pcx", "heic", "heif"),
)
_COMPANION_FOLDERS = ("__MACOSX", "@eaDir")
_COMPANION_FILES = ("thumbs.db", "desktop.ini")
_COMPRESSIONS = {
    "gzip": ("gz", "tgz"),
    "bzip2": ("bz2", "tbz2", "tbz"),
    "xz": ("xz", "txz"),
    "zstd": ("zst", "tzst"),
    "lz4": ("lz4",),
    "compress (.Z)": ("z",),
}
_COMPRESSED_ENDINGS = {ending: kind for kind, endings in _COMPRESSIONS.items() for ending in endings}
_ARCHIVES = ("zip", "7z", "rar")


def is_companion(path: str) -> bool:
    """Return whether a file is one that systems put beside data: ``._a.jpg``, ``.DS_Store``, ``Thumbs.db``, ``.nfs…``.

    Args:
        path: Path with ``/``, relative to the dataset; its folders count too: ``.ipynb_checkpoints``, ``__MACOSX``.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    hidden = any(part.startswith(".") or part in _COMPANION_FOLDERS for part in parts)
    return hidden or path.rpartition("/")[2].lower() in _COMPANION_FILES


def path_text(path: str | PurePath) -> str:
    r"""Return a path as text that has an encoding; bytes that are no UTF-8 are spelled out as in tars, ``caf\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def existing_file(folder: Path, name: str | PurePath) -> Path | None:
    """Return the file of a name below a folder, also where one has composed accents and the other decomposed ones."""
    text = str(name)
    forms = (text,) if text.isascii() else (text, normalize("NFC", text), normalize("NFD", text))
    return next((folder / form for form in forms if os.path.isfile(folder / form)), None)


def file_in_any_case(folder: Path, name: str) -> Path | None:
    """Return the file of a name in a folder as `existing_file`; the case of letters after the first dot is ignored."""
    plain = _plain(name)
    found = existing_file(folder, name) or existing_file(folder, plain)
    if found or not folder.is_dir():
        return found
    other = _odd_names(folder, folder.stat().st_mtime_ns).get(normalize("NFC", plain))
    return folder / other if other else None


@lru_cache(maxsize=8)
def _odd_names(folder: Path, changed_ns: int) -> dict[str, str]:
    """Return plain, composed name -> name of the files of a folder that are not called by their plain name."""
    del changed_ns  # a folder that has changed is read again
    names = sorted(entry.name for entry in os.scandir(folder) if entry.name != _plain(entry.name) and entry.is_file())
    return {normalize("NFC", _plain(name)): name for name in reversed(names)}


def _plain(name: str) -> str:
    stem, dot, endings = name.partition(".")
    return stem + dot + endings.lower()


def compressed_name(names: Iterable[str], ending: str) -> str:
    """Describe the first file called as one with an `ending` that was compressed, ``a.tar.gz is gzip``; else empty.

    A single file and archives of any kind are described too.
    """
    names = list(names)
    for name in names:
        stem, _, last = PurePosixPath(name).name.lower().rpartition(".")
        kind = last if last in _ARCHIVES else _COMPRESSED_ENDINGS.get(last, "")
        named = stem.endswith(ending) or (ending == ".tar" and last.startswith("t"))
        if kind and (named or kind in _ARCHIVES or len(names) == 1):
            return f"{name} is {kind}; unpack it first"
    return ""
