"""A tar read header by header, so that every damage is found and has an offset (no torch here).

tarfile and webdataset take a broken header after the first member for the end of the archive and stop without an error.
"""

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from alignvlm_pl.utils.text_files import compression, content_kind

from ..storage.file_kinds import IMAGE_ENDINGS, is_companion

_BLOCK = tarfile.BLOCKSIZE
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)
_BEFORE_A_MEMBER = (*_LONG_NAMES, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
# Names that are no UTF-8 are spelled out: half a surrogate pair could be neither printed nor written down.
_NAMES = "backslashreplace"
_NOTES = ("readme", "license", "licence")
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file of a tar: its path, the bytes at which its header and its content begin, and the size of the content.

    `begin` is the byte of its first header: one that only carries its long name, or `offset`.
    """

    name: str
    offset: int
    data_offset: int
    size: int
    begin: int

    @property
    def end(self) -> int:
        """Byte after its content, padded to whole blocks."""
        return self.data_offset + -(-self.size // _BLOCK) * _BLOCK


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """Something wrong with a shard: a short kind, such as ``cut_in_header``, and what it is in words.

    `member` is the one at or before it, empty where there is none; `offset` a byte of the shard, -1 where it has none.
    """

    shard: str
    kind: str
    message: str
    member: str = ""
    offset: int = -1

    def with_advice(self, advice: str) -> str:
        """Return its text and what to do; a compressed tar says that itself."""
        return str(self) if self.kind == "compressed" else f"{self}; {advice}"

    def __str__(self) -> str:
        offset = f" at byte {self.offset}" if self.offset >= 0 else ""
        member = f", member {self.member}" if self.member else ""
        return f"{self.shard}{offset}{member}: {self.message} ({self.kind})"


def walk(path: Path) -> Iterator[Member | Damage]:
    """Yield the members of a tar as `walk_range`, and last the damage of its structure, if there is any."""
    with path.open("rb") as stream:
        yield from walk_range(stream, path.name, 0, path.stat().st_size)


def walk_range(stream: IO[bytes], shard: str, start: int, size: int) -> Iterator[Member | Damage]:
    """Yield the members that begin between two bytes of a tar, as if the tar ended at the second.

    Companions (``._a.jpg``, ``.DS_Store``) can belong to no sample: they are ignored, as folders and links are. A
    header begins at `start`, the end-of-archive mark is expected at `size`; `shard` is the name of the tar in damages.
    """
    offset, before, long_name, begin = start, "", "", -1
    while True:
        header = _read_at(stream, offset, max(min(_BLOCK, size - offset), 0))  # 0: it ends inside the padding before
        if header == bytes(_BLOCK):
            yield from _end(stream, shard, before, offset)
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", _NAMES)
            if info.size < 0:  # a walk would go back, and for ever
                raise tarfile.HeaderError(f"a member of {info.size} bytes")
        except tarfile.HeaderError as error:
            yield _broken(shard, before, offset, size, header, error)
            return
        content = info.size if info.isreg() or info.type in _BEFORE_A_MEMBER else 0
        if content and offset + _BLOCK + content > size:
            message = f"the file ends inside this member, which has {content} bytes"
            name = long_name or info.name
            yield Damage(shard=shard, kind="cut_in_data", message=message, member=name, offset=size)
            return
        if info.type in _LONG_NAMES:
            long_name = _long_name(info, _read_at(stream, offset + _BLOCK, info.size)) or long_name
            begin = offset if begin < 0 else begin
        elif info.isreg():
            before = long_name or info.name
            if not is_companion(before):
                first = offset if begin < 0 else begin
                yield Member(name=before, offset=offset, data_offset=offset + _BLOCK, size=info.size, begin=first)
        if info.type not in _BEFORE_A_MEMBER:
            long_name, begin = "", -1
        offset += _BLOCK + -(-content // _BLOCK) * _BLOCK


def tar_paths(folder: Path) -> list[Path]:
    """Return the tars directly in a folder, sorted; letter case does not matter, companions are none."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() == ".tar" and not is_companion(path.name))


def require_members(walked: Iterable[Member | Damage], error: Callable[[Damage], Exception]) -> Iterator[Member]:
    """Yield the members of a walk; raise `error` of the first damage."""
    for found in walked:
        if isinstance(found, Damage):
            raise error(found)
        yield found


def sample_groups(members: Iterable[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Group members into samples by webdataset's rule: runs of the same path up to the first dot of the file's name."""
    for key, group in groupby(sample_members(members), key=_sample_key):
        yield key, list(group)


def sample_members(members: Iterable[Member]) -> Iterator[Member]:
    """Yield the members that belong to samples.

    Members without a dot, those called `__…__`, and groups without json, text or image (``README.md``,
    ``LICENSE.txt``) do not, also where they stand between the members of a sample.
    """
    named = (m for m in members if "." in m.name.rpartition("/")[2] and not _META.match(m.name))
    for _, group in groupby(named, key=_sample_key):
        held: list[Member] = []
        content = False
        for member in group:
            held.append(member)
            content = content or _is_content(member.name.rpartition("/")[2].lower())
            if content:  # at once, so that a reader goes forward
                yield from held
                held.clear()


def _is_content(name: str) -> bool:
    ending = name.rpartition(".")[2]
    return ending == "json" or ending in IMAGE_ENDINGS or (ending == "txt" and not name.startswith(_NOTES))


class SeenKeys:
    """Keys of a tar so far; finds samples and members that are there twice, and samples whose members stand apart.

    Every reader of a tar from elsewhere asks it about each group. `shard` is the name of the tar in damages.
    """

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._fields: dict[str, set[str]] = {}

    def __len__(self) -> int:
        """Number of keys so far."""
        return len(self._fields)

    def add(self, key: str, members: Sequence[Member]) -> Damage | None:
        """Add a group of `sample_groups`, and return its damage; a group with a field of an earlier one repeats it."""
        fields: set[str] = set()
        before = self._fields.setdefault(key, set())
        first, kind, message = members[0], "", ""
        for member in members:
            if _field(member) in fields and not kind:
                first, kind, message = member, "repeated_member", f"has the member {member.name} twice, again"
            fields.add(_field(member))
        if before & fields:
            kind, message = "repeated_key", "is there twice, again"
        if kind:
            message = f"sample {key!r} {message} at byte {first.offset}; rebuild the shard"
        elif before:
            kind = "members_apart"
            message = (
                f"members of sample {key!r} stand apart ({', '.join(sorted(before))}, and {', '.join(sorted(fields))} "
                f"at byte {members[0].begin}): pack the tar again in the order of names (tar --sort=name)"
            )
        before |= fields
        if not kind:
            return None
        return Damage(shard=self._shard, kind=kind, message=message, member=first.name, offset=first.offset)


def read_sample(stream: IO[bytes], key: str, members: Iterable[Member], *, url: str) -> dict[str, Any]:
    """Return the members of one sample by field, as their names end in lower case, with ``__key__`` and ``__url__``."""
    content = {_field(member): _read_at(stream, member.data_offset, member.size) for member in members}
    return {"__key__": key, "__url__": url} | content


def _field(member: Member) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _sample_key(member: Member) -> str:
    folder, slash, name = member.name.rpartition("/")
    return f"{folder}{slash}{name.split('.', 1)[0]}"


def _broken(shard: str, before: str, offset: int, size: int, header: bytes, error: Exception) -> Damage:
    """Describe what is in the place of a header."""
    compressed = compression(header) if offset == 0 else ""
    why = (content_kind(header) if offset == 0 else "") or str(error)
    if compressed:
        message = f"it is {compressed}, expected a plain tar: unpack it first"
        return Damage(shard=shard, kind="compressed", message=message)
    if offset >= size:
        after = "after this member without an end-of-archive mark" if before else "before its first member"
        kind, message = "cut_at_member", f"the file ends {after}"
    elif offset + _BLOCK > size:
        of = "after this member" if before else "of its first member"
        kind, message = "cut_in_header", f"the file ends inside the header {of} ({why})"
    else:
        where = "after this member" if before else "here" if offset else "at its begin: it is no tar"
        kind, message = "bad_header", f"broken header {where} ({why})"
    return Damage(shard=shard, kind=kind, message=message, member=before, offset=min(offset, size))


def _end(stream: IO[bytes], shard: str, before: str, offset: int) -> Iterator[Damage]:
    """Check that an archive ends with two blocks of zeros and has nothing but zeros after them."""
    end = offset + _BLOCK  # where reading its first block has left the stream
    while block := stream.read(_BLOCK):
        if block.strip(b"\0"):
            message = "a header of zeros in the middle: readers stop here, and the rest is lost"
            yield Damage(shard=shard, kind="zeroed_header", message=message, member=before, offset=offset)
            return
        end += len(block)
    if end < offset + 2 * _BLOCK:
        message = "the end-of-archive mark after this member is cut"
        yield Damage(shard=shard, kind="cut_at_end", message=message, member=before, offset=end)


def _read_at(stream: IO[bytes], offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


def _long_name(info: tarfile.TarInfo, data: bytes) -> str:
    """Return the name of the next member, where a header holds nothing else."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", _NAMES)
    records = (line.partition(b" ")[2] for line in data.split(b"\n"))
    return next((line[5:].decode("utf-8", _NAMES) for line in records if line.startswith(b"path=")), "")
