"""Two runs never write into one run folder.

Sources: Lightning-AI/pytorch-lightning#12369, #11379, #5030, broadinstitute/CellBender#241.
"""

import json
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from alignvlm_pl.cli.slurm import is_first_rank
from alignvlm_pl.errors import ConfigError
from alignvlm_pl.utils.run_owner import owned
from tests.integration.checkpoint_files import error_of


def write(path: Path, **changes: Any) -> Path:
    """An owner's file, by default of a process that has ended."""
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    owner = {"host": socket.gethostname(), "pid": child, "start": 1, "since": "2025-01-31T12:00:00+00:00"}
    path.write_text(json.dumps(owner | {"job": None, "restarts": 0} | changes))
    return path


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_fit_is_refused_before_anything_is_written(world, tmp_path, capsys):
    with owned(tmp_path / "owner.json"):
        before = listing(tmp_path)
        error = error_of(capsys, world.run("fit", "--run_dir", tmp_path))
        assert listing(tmp_path) == before
    assert f"another run is writing into {tmp_path} (host {socket.gethostname()}, pid {os.getpid()}, since 2" in error
    assert "0 min ago" in error
    assert listing(tmp_path) == {}


def test_an_evaluation_may_run_beside_a_fit_but_not_beside_another(world, tmp_path, capsys):
    options = ["--run_dir", tmp_path, "--trainer.limit_test_batches=1"]
    with owned(tmp_path / "owner.json"):
        assert world.run("test", *options) == 0
    capsys.readouterr()
    with owned(tmp_path / "owner-evaluation.json"):
        assert "another run is writing" in error_of(capsys, world.run("predict", *options))


def test_the_file_of_a_dead_process_is_taken_over_and_removed(tmp_path):
    for changes in ({}, {"pid": os.getpid()}, {"pid": 2**22 + 1}):  # the second: its number was given again
        path = write(tmp_path / "owner.json", **changes)
        with owned(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not path.exists()


@pytest.mark.parametrize("content", ["", '{"host": "a', "[]"])
def test_a_file_that_was_cut_is_nobody_s(tmp_path, content):
    (tmp_path / "owner.json").write_text(content)
    with owned(tmp_path / "owner.json"):
        pass


def test_an_owner_of_another_host_is_named_with_its_age(tmp_path):
    path = write(tmp_path / "owner.json", host="node7", job="41")
    content = path.read_text()
    with pytest.raises(ConfigError, match=rf"host node7, pid \d+, since 2025-.* h ago.* remove {path}"), owned(path):
        pass
    assert path.read_text() == content


@pytest.mark.parametrize(("job", "restarts", "taken"), [("41", 1, True), ("41", 0, False), ("42", 1, False)])
def test_a_requeued_job_takes_over_from_the_node_that_was_lost(tmp_path, job, restarts, taken):
    path = write(tmp_path / "owner.json", host="node7", job="41")
    with ExitStack() as stack:
        if not taken:
            stack.enter_context(pytest.raises(ConfigError, match="node7"))
        stack.enter_context(owned(path, job=job, restarts=restarts))


def test_of_several_at_once_one_wins(tmp_path):
    path = write(tmp_path / "owner.json")  # all find the file of a dead process
    start, end, done = os.pipe(), os.pipe(), os.pipe()  # one to end by: the winner must not read another's start
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            try:
                os.read(start[0], 1)
                with owned(path):
                    os.write(done[1], b"1")
                    os.read(end[0], 1)
            except ConfigError:
                os.write(done[1], b"0")
            finally:
                os._exit(0)
        children.append(child)
    os.write(start[1], b"gggg")
    answers = b"".join(os.read(done[0], 1) for _ in children)
    os.write(end[1], b"e")
    for child in children:
        os.waitpid(child, 0)
    assert sorted(answers) == sorted(b"0001")
    assert not path.exists()


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),  # started by Lightning
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "RANK": "8", "TORCHELASTIC_RUN_ID": "a"}, False),  # torchrun
        ({"OMPI_COMM_WORLD_RANK": "1"}, False),  # mpirun
        ({"PMI_RANK": "1"}, False),  # MPICH
        ({"JSM_NAMESPACE_RANK": "1"}, False),  # jsrun
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "LOCAL_RANK": "0"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, True),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "bash"}, True),
    ],
)
def test_the_first_rank_owns_the_folder_for_all(environment, first):
    assert is_first_rank(environment) == first


@pytest.mark.parametrize("since", ["garbage", None, 3, "2025-01-31T12:00:00"])
def test_an_owner_edited_by_hand_is_answered_in_one_line(tmp_path, since):
    path = write(tmp_path / "owner.json", host="other", since=since)
    with pytest.raises(ConfigError, match=r"\(host other, pid \d+, since .*, an unknown time ago\)"), owned(path):
        pass


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_is_no_file_in_the_owner_s_place_is_named(tmp_path, kind):
    path = tmp_path / "owner.json"
    path.mkdir() if kind == "folder" else path.symlink_to(tmp_path / "gone" / "file")
    message = r"owner\.json cannot be written \(.*\): expected a file of a run; remove it"
    with pytest.raises(ConfigError, match=message), owned(path):
        pass


def test_a_run_folder_that_is_no_utf8_is_refused_by_its_name(world, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for command in ("fit", "test"):
        error = error_of(capsys, world.run(command, "--run_dir", folder))
        assert r"caf\udce9: expected a name in UTF-8" in error
    assert not list(tmp_path.iterdir())
