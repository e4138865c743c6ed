"""Pictures that look like those of benchmarks, also where they were scaled or compressed again.

A picture is described by 64 signs: of its grey values at 32 x 32 pixels the 8 x 8 lowest cosine frequencies, and
whether each is above their median (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from alignvlm_pl.errors import DataError
from alignvlm_pl.imaging import load_image

from ..manifest import MANIFEST_NAME, file_sha256, load_manifest
from ..shard_file import EXTENSIONS
from ..tar_walk import Damage, walk

MAX_DISTANCE = 2
"""Signs that may differ: those of a picture that was scaled or compressed again do in a few (test_pack_overlap.py)."""
_SIDE = 32
_LOW = 8
_FLAT = 2.0
"""Deviation of the grey values below which a picture shows nothing: all empty pages are alike."""
_ONES = np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)
_angles = (2 * np.arange(_SIDE)[None, :] + 1) * np.arange(_LOW)[:, None] * np.pi / (2 * _SIDE)
_COSINES = np.cos(_angles)


def perceptual_hash(image: Image.Image) -> int | None:
    """Return the 64 signs of a picture as a number; None for one that shows nothing."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float64)
    if grey.std() < _FLAT:
        return None
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownPictures:
    """The pictures of benchmarks.

    Attributes:
        hashes: (n) uint64, their signs.
        names: (n) what reports call them.
    """

    hashes: np.ndarray = field(repr=False)
    names: tuple[str, ...] = field(repr=False)

    def find_any(self, pictures: Sequence[bytes]) -> str | None:
        """Return the name of the picture that the first match looks like; None where no picture does."""
        for data in pictures:
            try:
                signs = perceptual_hash(load_image(data))
            except DataError:  # the sample is checked elsewhere
                continue
            if signs is not None and (match := self._find(signs)) is not None:
                return match
        return None

    def _find(self, signs: int) -> str | None:
        if not len(self.hashes):
            return None
        differing = self.hashes ^ np.uint64(signs)
        distance = _ONES[differing.view(np.uint16)].reshape(-1, 4).sum(axis=1)
        nearest = int(distance.argmin())
        return self.names[nearest] if distance[nearest] <= MAX_DISTANCE else None


def describe_folder(folder: Path) -> str:
    """Return what tells whether the pictures of a benchmark are still the same.

    Raises:
        DataError: There is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"--overlap-with: there is no folder {folder}")
    if (folder / MANIFEST_NAME).is_file():
        return f"{folder.resolve()} {file_sha256(folder / MANIFEST_NAME)}"
    digest = hashlib.sha256()
    for path in _picture_files(folder):
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return f"{folder.resolve()} {digest.hexdigest()}"


def read_known(folders: Sequence[Path]) -> KnownPictures:
    """Read all pictures of benchmarks: of a set of shards, or those below a folder.

    Raises:
        DataError: A folder holds no picture, or one that does not decode.
    """
    found: dict[int, str] = {}
    for folder in folders:
        number = 0
        for name, data in tqdm(_pictures(folder), unit="picture", desc=f"pictures of {folder.name}"):
            number += 1
            signs = perceptual_hash(load_image(data, name=name))
            if signs is not None:
                found.setdefault(signs, name)
        if not number:
            raise DataError(f"--overlap-with: {folder} holds no set of shards and no pictures")
    return KnownPictures(hashes=np.array(list(found), dtype="<u8"), names=tuple(found.values()))


def _pictures(folder: Path) -> Iterator[tuple[str, bytes]]:
    if not (folder / MANIFEST_NAME).is_file():
        for path in _picture_files(folder):
            yield str(path), path.read_bytes()
        return
    manifest = load_manifest(folder)
    for shard in manifest.shards:
        path = manifest.shard_path(shard)
        with path.open("rb") as stream:
            for member in walk(path):
                if isinstance(member, Damage):
                    raise DataError(f"{folder}/{member}; see `shards verify`")
                if _is_picture(member.name):
                    stream.seek(member.data_offset)
                    yield f"{path}/{member.name}", stream.read(member.size)


def _picture_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_picture(path.name) and path.is_file())


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS
