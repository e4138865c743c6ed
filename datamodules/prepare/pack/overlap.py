"""Find images that resemble those of benchmarks, also after scaling or recompression.

An image is described by 64 signs: of its grey values at 32 x 32 pixels the 8 x 8 lowest cosine frequencies, and
whether each is above their median (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010).
Forms of one kind have the same signs, so images whose signs are near are compared at 64 x 64 pixels as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.imaging import load_image

from ...shards.manifest import MANIFEST_NAME, load_manifest
from ...shards.reader import is_image, read_range
from ...storage.fetching import file_digest
from ..sources.images import image_paths
from .work_folder import files_digest, write_array

MAX_DISTANCE = 6
"""Signs that may differ. Of 60 receipts, copies at a quarter of the size or of quality 40 differ in 4 at the most."""
MIN_CORRELATION = 0.95
"""Of the grey values at 64 x 64 pixels. Those copies have 0.95 and more; receipts of one shop have 0.89 and less."""
_SIDE = 32
_LOW = 8
_FINE = 64
_FILES = ("known.hashes.npy", "known.greys.npy", "known.names.npy")
_FLAT = 2.0
"""Deviation of the grey values below which an image shows nothing: all empty pages are alike."""
_ONES = np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)
_COSINES = np.cos((2 * np.arange(_SIDE)[None, :] + 1) * np.arange(_LOW)[:, None] * np.pi / (2 * _SIDE))


def perceptual_hash(image: Image.Image) -> int | None:
    """Return the 64 signs of an image as a number; None for one that shows nothing."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float64)
    if grey.std() < _FLAT:
        return None
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def grey_values(image: Image.Image) -> np.ndarray:
    """Return an image as (64, 64) uint8."""
    return np.asarray(image.convert("L").resize((_FINE, _FINE), Image.Resampling.BOX), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkImages:
    """The images of benchmarks, in memory-mapped files of a folder that processes share."""

    folder: Path

    def find_any(self, images: Sequence[bytes]) -> str | None:
        """Return the name of the benchmark's image that the first match resembles, or None."""
        for data in images:
            try:
                match = self._find(load_image(data))
            except DataError:  # the sample is checked elsewhere
                continue
            if match is not None:
                return match
        return None

    def _find(self, image: Image.Image) -> str | None:
        signs = perceptual_hash(image)
        hashes, greys, names = _load(self.folder)
        if signs is None or not len(hashes):
            return None
        differing = hashes ^ np.uint64(signs)
        distance = _ONES[differing.view(np.uint16)].reshape(-1, 4).sum(axis=1)
        near = np.flatnonzero(distance <= MAX_DISTANCE)
        if not len(near):
            return None
        own = _normalised(grey_values(image)[None])
        correlation = (_normalised(greys[near]) * own).sum(axis=(1, 2))
        best = int(correlation.argmax())
        return str(names[near[best]]) if correlation[best] >= MIN_CORRELATION else None


@lru_cache(maxsize=2)
def _load(folder: Path) -> tuple[np.ndarray, ...]:
    """Return the signs (n), grey values (n, 64, 64) and names (n)."""
    return tuple(np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in _FILES)


def _normalised(greys: np.ndarray) -> np.ndarray:
    """Bring each (64, 64) of (n, 64, 64) to mean 0 and length 1."""
    values = greys.astype(np.float64)
    values -= values.mean(axis=(1, 2), keepdims=True)
    return values / np.maximum(np.sqrt((values**2).sum(axis=(1, 2), keepdims=True)), 1e-9)


def folder_identity(folder: Path) -> str:
    """Return a text that changes if the images of a benchmark change; raises DataError where there is no folder."""
    if not folder.is_dir():
        raise DataError(f"--overlap-with: there is no folder {folder}")
    if (folder / MANIFEST_NAME).is_file():
        return f"{folder.resolve()} {file_digest(folder / MANIFEST_NAME)}"
    return f"{folder.resolve()} {files_digest(folder / path for path in image_paths(folder))}"


def read_benchmark_images(folders: Sequence[Path], out: Path) -> BenchmarkImages:
    """Read all images of benchmarks (datasets or folders of images) into files in `out`, unless they are there.

    Raises:
        DataError: A folder holds no image, or one that does not decode.
    """
    if (out / _FILES[-1]).exists():
        return BenchmarkImages(folder=out)
    found: list[tuple[int, np.ndarray, str]] = []
    for folder in folders:
        number = 0
        for name, data in tqdm(_images(folder), unit="image", desc=f"images of {folder.name}"):
            number += 1
            image = load_image(data, name=name)
            signs = perceptual_hash(image)
            if signs is not None:
                found.append((signs, grey_values(image), name))
        if not number:
            raise DataError(f"--overlap-with: {folder} holds no dataset and no images")
    hashes, greys, names = zip(*found, strict=True) if found else ((), (), ())
    write_array(out / _FILES[0], np.array(hashes, dtype="<u8"))
    write_array(out / _FILES[1], np.array(greys, dtype=np.uint8).reshape(-1, _FINE, _FINE))
    write_array(out / _FILES[2], np.array(names, dtype=np.str_))
    _load.cache_clear()
    return BenchmarkImages(folder=out)


def _images(folder: Path) -> Iterator[tuple[str, bytes]]:
    if not (folder / MANIFEST_NAME).is_file():
        for path in image_paths(folder):
            yield str(folder / path), (folder / path).read_bytes()
        return
    for raw in read_range(load_manifest(folder), wanted=is_image):
        for name, data in raw.items():
            if is_image(name):
                yield f"{raw['__url__']}/{raw['__key__']}.{name}", data
