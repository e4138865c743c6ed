"""Files, links and folders appear complete or not at all; an error leaves what was there."""

import os

import pytest

from alignvlm_pl.utils.atomic_files import atomic_path, partial_path


def write(path, text):
    with atomic_path(path) as partial:
        partial.write_text(text)


def write_folder(path, text):
    with atomic_path(path) as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner/file").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_at_the_end_of_the_block_and_replaces_the_former_one(tmp_path):
    for text in ("one", "two"):
        with atomic_path(tmp_path / "file") as partial:
            partial.write_text(text)
            assert not (tmp_path / "file").exists() or (tmp_path / "file").read_text() == "one"
        assert (tmp_path / "file").read_text() == text
    assert names(tmp_path) == ["file"]


def test_a_folder_replaces_a_folder_or_a_file_and_a_file_a_folder(tmp_path):
    for text in ("one", "two"):
        write_folder(tmp_path / "path", text)
        assert (tmp_path / "path/inner/file").read_text() == text
    write(tmp_path / "path", "file")
    assert (tmp_path / "path").read_text() == "file"
    write_folder(tmp_path / "path", "three")
    assert (tmp_path / "path/inner/file").read_text() == "three"
    assert names(tmp_path) == ["path"]


@pytest.mark.parametrize("kind", [write, write_folder])
def test_an_error_leaves_the_former_one_and_nothing_else(tmp_path, monkeypatch, kind):
    kind(tmp_path / "path", "one")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        kind(tmp_path / "path", "two")
    assert names(tmp_path) == ["path"]
    found = tmp_path / "path" if kind is write else tmp_path / "path/inner/file"
    assert found.read_text() == "one"


def test_everything_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr("os.replace", lambda *paths: synced.append("replaced"))
    write_folder(tmp_path / "path", "text")
    assert synced == ["file", "inner", "path.partial", "replaced"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    partial_path(tmp_path / "path").mkdir()
    (partial_path(tmp_path / "path") / "half").write_text("")
    write(tmp_path / "path", "text")
    assert names(tmp_path) == ["path"]


def test_a_link_is_moved_and_not_followed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with atomic_path(tmp_path / "last") as partial:
            partial.symlink_to(name)
        assert os.readlink(tmp_path / "last") == name
    assert names(tmp_path) == ["a", "b", "last"]
