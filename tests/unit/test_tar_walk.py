"""A tar header by header: long names of both formats, and headers that would send a walk astray."""

import io
import tarfile
from pathlib import Path

import pytest

from datamodules.shards.tar_walk import Damage, Member, walk


def write(path: Path, *names: str, form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"data"))
    return path


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, form):
    """A member begins at the header that carries its long name."""
    names = ["a.txt", "imgs/" + "a" * 150 + "/" + "b" * 120 + ".png", "z.txt"]
    path = write(tmp_path / "a.tar", *names, form=form)
    members = list(walk(path))
    assert all(isinstance(member, Member) for member in members), members
    assert [member.name for member in members] == names
    # Nothing lies between two members.
    assert [member.begin for member in members] == [0, *(member.end for member in members[:-1])]
    content = path.read_bytes()
    assert all(content[member.data_offset :][: member.size] == b"data" for member in members)


def test_a_member_of_negative_size_ends_the_walk(tmp_path):
    path = write(tmp_path / "a.tar", "a.txt", "b.txt")
    with path.open("r+b") as file:
        info = tarfile.TarInfo("b.txt")
        info.size = -1024  # back to the header of a.txt, and for ever
        file.seek(1024)
        file.write(info.tobuf(tarfile.GNU_FORMAT))
    first, second = walk(path)
    assert isinstance(first, Member) and isinstance(second, Damage)
    assert (second.kind, second.offset, second.member) == ("bad_header", 1024, "a.txt")
    assert "a member of -1024 bytes" in second.message
