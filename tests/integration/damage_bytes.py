"""Kinds of damage of a shard's bytes: what is done to the file."""

import tarfile
from collections.abc import Callable
from pathlib import Path

from datamodules.shards.tar_walk import Member
from tests.integration.damage_kinds import HTML
from tests.integration.damage_world import TARGET, members

BLOCK = tarfile.BLOCKSIZE
FileDamage = Callable[[Path], None]


def target(path: Path) -> tuple[Member, Member]:
    """The json and the picture of the target, which is the second sample of its shard."""
    own, other = (member for member in members(path) if member.name.startswith(TARGET))
    return own, other


def last(path: Path) -> Member:
    return members(path)[-1]


def cut(where: Callable[[Path], int]) -> FileDamage:
    return lambda path: path.write_bytes(path.read_bytes()[: where(path)]) and None


def zero_from(where: Callable[[Path], int]) -> FileDamage:
    """What a copy leaves whose file was made in full size first, and that did not come to its end."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: where(path)] + bytes(len(data) - where(path)))

    return damage


def overwritten(where: Callable[[Path], int], new: bytes) -> FileDamage:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[where(path) : where(path) + len(new)] = new
        path.write_bytes(data)

    return damage


def with_size(number: int) -> FileDamage:
    """Another size in the header of the target's picture, whose checksum is right."""

    def damage(path: Path) -> None:
        at = target(path)[1].offset
        data = bytearray(path.read_bytes())
        data[at + 124 : at + 136] = tarfile.itn(number, 12, tarfile.GNU_FORMAT)
        data[at + 148 : at + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data[at : at + BLOCK]))[0]
        path.write_bytes(data)

    return damage


def html_of_the_same_size(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes((HTML * (size // len(HTML) + 1))[:size])


def other_shard(path: Path) -> None:
    """The content of the first shard; padded to records, they are of one size."""
    path.write_bytes(path.with_name("set-00000.tar").read_bytes())


FILES: dict[str, FileDamage] = {
    "cut in data": cut(lambda path: target(path)[1].data_offset + 7),
    "cut at a sample": cut(lambda path: target(path)[0].offset),
    "cut at a member": cut(lambda path: target(path)[1].offset),
    "cut in a header": cut(lambda path: target(path)[1].offset + 100),
    "cut before the end mark": cut(lambda path: last(path).end),
    "cut in the end mark": cut(lambda path: last(path).end + BLOCK),
    "cut to nothing": cut(lambda path: 0),
    "zeros from a sample on": zero_from(lambda path: target(path)[0].offset),
    "zeros from a member on": zero_from(lambda path: target(path)[1].offset),
    "zeros in the last picture": zero_from(lambda path: last(path).data_offset + 40),
    "zeroed header": overwritten(lambda path: target(path)[0].offset, bytes(BLOCK)),
    "zeroed header of the last member": overwritten(lambda path: last(path).offset, bytes(BLOCK)),
    "garbage header": overwritten(lambda path: target(path)[0].offset, b"\xa5" * BLOCK),
    "garbage first header": overwritten(lambda path: 0, b"\xa5" * BLOCK),
    "size below zero": with_size(-BLOCK),
    "size of no bytes": with_size(0),
    "size beyond the file": with_size(1 << 40),
    "HTML page": lambda path: path.write_bytes(HTML) and None,
    "HTML page of the same size": html_of_the_same_size,
    "deleted": Path.unlink,
    "grown": lambda path: path.write_bytes(path.read_bytes() + bytes(10240)) and None,
    "content of another shard": other_shard,
    "json overwritten": overwritten(lambda path: target(path)[0].data_offset, b"\xff\xfe{{"),
    "picture overwritten": overwritten(lambda path: target(path)[1].data_offset, bytes(64)),
}
