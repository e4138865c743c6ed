"""Fetching from a real server: retries, wrong bytes, killed and simultaneous downloads, a full disk."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from alignvlm_pl.errors import DataError
from datamodules.storage import fetching
from datamodules.storage.fetching import Expected, MissingFileError, Policy, cache_path, fetch, fetch_small

ROOT = Path(__file__).resolve().parents[2]
BODY = b"".join(number.to_bytes(4, "big") for number in range(100_000))
SHA = hashlib.sha256(BODY).hexdigest()
QUICK = Policy(retries=3, timeout_s=5, backoff_s=0.01)
Respond = Callable[[BaseHTTPRequestHandler], None]


def reply(status: int = 200, body: bytes = BODY, length: int | None = None) -> Respond:
    """Send a status and a body, possibly announcing another length."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return respond


def unsized(body: bytes) -> Respond:
    """Send a body whose end is the end of the connection."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)

    return respond


class Server:
    """A web server on this machine: for each path its responses in order; the last one repeats."""

    def __init__(self) -> None:
        self.responses: dict[str, list[Respond]] = {}
        self.requested: list[str] = []
        self.blocked = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requested.append(self.path)
                responses = site.responses.get(self.path.partition("?")[0], [reply(404, b"none")])
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    (responses.pop(0) if len(responses) > 1 else responses[0])(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}{path}"

    def half(self, handler: BaseHTTPRequestHandler) -> None:
        """Send the first half, and the rest once `blocked` is set."""
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(BODY)))
        handler.end_headers()
        handler.wfile.write(BODY[: len(BODY) // 2])
        handler.wfile.flush()
        self.blocked.wait(60)
        handler.wfile.write(BODY[len(BODY) // 2 :])

    def close(self) -> None:
        self.blocked.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    site = Server()
    yield site
    site.close()


def files(cache: Path) -> list[str]:
    """Whatever lies in the cache, without locks."""
    return sorted(path.name for path in cache.glob("*/*") if path.name != ".lock")


def program(cache: Path, url: str, *, timeout_s: float = 60) -> list[str]:
    """A process of its own that fetches."""
    code = (
        "import sys; from pathlib import Path; from datamodules.storage.fetching import Expected, Policy, fetch\n"
        f"path = fetch({url!r}, cache=Path({str(cache)!r}), expected=Expected(bytes={len(BODY)}, sha256={SHA!r}),"
        f" policy=Policy(retries=0, timeout_s={timeout_s}))\nprint(path)"
    )
    return [sys.executable, "-c", code]


def test_a_file_is_fetched_once_and_then_found(server, tmp_path):
    server.responses["/set/a.tar"] = [reply()]
    url = server.url("/set/a.tar")
    path = fetch(url, cache=tmp_path, expected=Expected(bytes=len(BODY), sha256=SHA))
    assert path == tmp_path / hashlib.sha256(f"{url}\n{SHA}\n".encode()).hexdigest() / "a.tar"
    assert path.read_bytes() == BODY
    assert fetch(url, cache=tmp_path, expected=Expected(bytes=len(BODY), sha256=SHA)) == path
    assert server.requested == ["/set/a.tar"]
    assert files(tmp_path) == ["a.tar"]


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_passing_errors_are_tried_again(server, tmp_path, status):
    server.responses["/a.tar"] = [reply(status, b"busy"), reply(status, b"busy"), reply()]
    assert fetch(server.url("/a.tar"), cache=tmp_path, policy=QUICK).read_bytes() == BODY
    assert len(server.requested) == 3


def test_errors_that_stay_are_named_with_url_attempts_and_reason(server, tmp_path):
    server.responses["/a.tar"] = [reply(500, b"broken")]
    with pytest.raises(DataError, match=r"http://127.*/a\.tar could not be fetched in 4 attempts, the last: .*500"):
        fetch(server.url("/a.tar"), cache=tmp_path, policy=QUICK)
    assert len(server.requested) == 4
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "there is no such file"), (403, "refuses it .*403"), (401, "refuses it .*401")],
)
def test_a_refusal_is_not_tried_again(server, tmp_path, status, message):
    server.responses["/a.tar"] = [reply(status, b"no")]
    with pytest.raises(DataError, match=message) as caught:
        fetch(server.url("/a.tar"), cache=tmp_path, policy=QUICK)
    assert isinstance(caught.value, MissingFileError) == (status == 404)
    assert len(server.requested) == 1
    assert files(tmp_path) == []


def test_a_server_that_is_not_there(server, tmp_path):
    url = server.url("/a.tar")
    server.close()
    with pytest.raises(DataError, match=r"could not be fetched in 2 attempts, the last: .*Connect"):
        fetch(url, cache=tmp_path, policy=Policy(retries=1, backoff_s=0.01))


@pytest.mark.parametrize("cut", [reply(body=BODY[:1000], length=len(BODY)), unsized(BODY[:1000])])
def test_a_short_body_is_retried_and_never_kept(server, tmp_path, cut):
    server.responses["/a.tar"] = [cut, reply()]
    wanted = {"cache": tmp_path, "expected": Expected(bytes=len(BODY)), "policy": QUICK}
    assert fetch(server.url("/a.tar"), **wanted).read_bytes() == BODY
    server.responses["/b.tar"] = [cut]
    with pytest.raises(DataError, match="in 4 attempts, the last: "):
        fetch(server.url("/b.tar"), **wanted)
    assert files(tmp_path) == ["a.tar"]


def test_changed_bytes_are_refused_at_once(server, tmp_path):
    server.responses["/a.tar"] = [reply(body=b"x" + BODY[1:])]
    with pytest.raises(DataError, match=rf"another file: expected sha256 {SHA[:16]}…, found"):
        fetch(server.url("/a.tar"), cache=tmp_path, expected=Expected(bytes=len(BODY), sha256=SHA), policy=QUICK)
    assert len(server.requested) == 1
    assert files(tmp_path) == []


def test_more_than_the_expected_bytes_are_not_even_read(server, tmp_path):
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(1 << 20))

    server.responses["/a.tar"] = [endless]
    with pytest.raises(DataError, match="has more than the expected 1000 bytes"):
        fetch(server.url("/a.tar"), cache=tmp_path, expected=Expected(bytes=1000), policy=QUICK)
    with pytest.raises(DataError, match="has more than the expected 2000 bytes"):
        fetch_small(server.url("/a.tar"), max_bytes=2000, policy=QUICK)
    assert files(tmp_path) == []


def test_a_server_that_falls_silent_is_left(server, tmp_path):
    server.responses["/a.tar"] = [server.half, reply()]
    start = time.monotonic()
    path = fetch(server.url("/a.tar"), cache=tmp_path, policy=Policy(timeout_s=0.5, backoff_s=0.01))
    assert path.read_bytes() == BODY
    assert 0.5 <= time.monotonic() - start < 10
    assert len(server.requested) == 2


def test_a_server_that_drips_is_left(server, tmp_path):
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not server.blocked.wait(0.05):
            handler.wfile.write(b"0123456789")

    server.responses["/a.tar"] = [drip]
    policy = Policy(retries=1, timeout_s=0.5, backoff_s=0.01)
    with pytest.raises(
        DataError,
        match=r"in 2 attempts, the last: received \d+ bytes in \d+ s, expected at least 1024 a second",
    ):
        fetch(server.url("/a.tar"), cache=tmp_path, policy=policy)


def test_a_copy_of_another_version_is_fetched_again(server, tmp_path):
    server.responses["/a.tar"] = [reply(body=b"old" + BODY[3:]), reply()]
    url = server.url("/a.tar")
    old = fetch(url, cache=tmp_path, expected=Expected(bytes=len(BODY)))
    assert old.read_bytes()[:3] == b"old"
    assert fetch(url, cache=tmp_path, expected=Expected(bytes=len(BODY), sha256=SHA)).read_bytes() == BODY
    fetch(url, cache=tmp_path, expected=Expected(tag="a later set"))
    assert len(server.requested) == 3


def test_a_copy_that_was_cut_on_the_disk_is_fetched_again(server, tmp_path):
    server.responses["/a.tar"] = [reply()]
    expected = Expected(bytes=len(BODY))
    path = fetch(server.url("/a.tar"), cache=tmp_path, expected=expected)
    os.truncate(path, 1000)
    assert fetch(server.url("/a.tar"), cache=tmp_path, expected=expected).read_bytes() == BODY


def test_equal_base_names_do_not_meet(server, tmp_path):
    server.responses |= {"/x/train-0000.tar": [reply()], "/y/train-0000.tar": [reply(body=BODY[::-1])]}
    one, other = (fetch(server.url(f"/{name}/train-0000.tar"), cache=tmp_path) for name in "xy")
    assert one.name == other.name
    assert (one.read_bytes(), other.read_bytes()) == (BODY, BODY[::-1])
    signed = fetch(server.url("/x/train-0000.tar?version=2"), cache=tmp_path)
    assert signed not in (one, other)


@pytest.mark.parametrize("name", ["..", ".lock", "%2e%2e%2f%2e%2e%2fetc", "a%00b", "n" * 300])
def test_no_url_names_a_file_outside_of_its_folder(name, tmp_path):
    url = f"http://host/{name}"
    path = cache_path(url, cache=tmp_path, expected=Expected())
    assert path.parent == tmp_path / hashlib.sha256(f"{url}\n\n".encode()).hexdigest()
    assert path.name.strip("._") == path.name.lstrip("._")
    assert not path.name.startswith(".")
    assert len(path.name) <= 200


def test_passwords_and_signatures_are_not_shown(server, tmp_path):
    url = server.url("/a.tar?signature=secret").replace("//", "//user:pass@")
    with pytest.raises(DataError) as caught:
        fetch(url, cache=tmp_path, policy=QUICK)
    assert "secret" not in str(caught.value)
    assert "pass@" not in str(caught.value)
    assert "/a.tar?…" in str(caught.value)


def test_two_processes_fetch_one_file_once(server, tmp_path):
    server.responses["/a.tar"] = [server.half]
    url = server.url("/a.tar")
    runs = [subprocess.Popen(program(tmp_path, url), cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    wait_for(lambda: server.requested)
    time.sleep(1.5)  # the other one has long come to the lock
    server.blocked.set()
    paths = [run.communicate(timeout=60)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert paths[0] == paths[1]
    assert Path(paths[0]).read_bytes() == BODY
    assert server.requested == ["/a.tar"]


def test_a_killed_download_leaves_no_file_that_passes_for_complete(server, tmp_path):
    server.responses["/a.tar"] = [server.half, reply()]
    url = server.url("/a.tar")
    run = subprocess.Popen(program(tmp_path, url), cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("*/.*.partial")))
    run.send_signal(signal.SIGKILL)
    run.wait()
    expected = Expected(bytes=len(BODY), sha256=SHA)
    target = cache_path(url, cache=tmp_path, expected=expected)
    assert not target.exists()
    assert len(files(tmp_path)) == 1
    assert files(tmp_path)[0].endswith(".partial")
    # Its lock does not outlive it, and what it left is removed.
    assert fetch(url, cache=tmp_path, expected=expected, policy=QUICK).read_bytes() == BODY
    assert files(tmp_path) == ["a.tar"]


def test_a_full_disk_is_named_and_nothing_is_left(server, tmp_path, monkeypatch):
    # What is written to this device meets a real ENOSPC.
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    server.responses["/a.tar"] = [reply()]

    def full(folder: Path) -> Path:
        path = folder / ".full.partial"
        path.symlink_to("/dev/full")
        return path

    monkeypatch.setattr(fetching, "_partial_path", full)
    with pytest.raises(DataError, match=r"cannot be stored in .*: the disk is full, No space left on device"):
        fetch(server.url("/a.tar"), cache=tmp_path, policy=QUICK)
    assert len(server.requested) == 1
    assert files(tmp_path) == []


def test_a_shard_larger_than_the_disk_is_not_begun(server, tmp_path):
    with pytest.raises(DataError, match=r"has 1152921504606846976 bytes but .* free: the disk is full"):
        fetch(server.url("/a.tar"), cache=tmp_path, expected=Expected(bytes=1 << 60))
    assert server.requested == []


def test_a_cache_that_is_no_folder_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be stored in .*/file: .*choose another cache"):
        fetch(server.url("/a.tar"), cache=tmp_path / "file")


def test_a_forked_worker_fetches_after_its_parent_has(server, tmp_path):
    server.responses |= {"/a.tar": [reply()], "/b.tar": [reply()]}
    fetch(server.url("/a.tar"), cache=tmp_path)
    # A process of its own, because forking this one, which has threads, would warn.
    code = (
        "import multiprocessing, sys; from pathlib import Path; from datamodules.storage.fetching import fetch\n"
        f"get = lambda name: fetch({server.url('/')!r} + name, cache=Path({str(tmp_path / 'c')!r}))\n"
        "get('a.tar')\n"
        "run = multiprocessing.get_context('fork').Process(target=get, args=('b.tar',)); run.start(); run.join(30)\n"
        "sys.exit(run.exitcode)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True, timeout=60)
    assert files(tmp_path / "c") == ["a.tar", "b.tar"]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
