"""A set of the hub through huggingface_hub's own client: a server on this machine answers as the hub does.

The client reads its address when it is imported, so the command runs in a process of its own.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from datamodules.decode import Decoder
from datamodules.manifest import load_manifest
from datamodules.sample import message_text
from datamodules.shards import read_range

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("huggingface_hub")
COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder as one data set."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.asked: list[tuple[str, str | None]] = []
        self.failing = 0  # requests for files that are refused before one is answered


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path, given = unquote(urlsplit(self.path).path), self.headers.get("Range")
        self.server.asked.append((path, given))
        if re.fullmatch(r"/api/datasets/[^/]+/[^/]+", path):
            self._json({"id": "owner/set", "sha": COMMIT, "private": False, "siblings": []})
        elif path.startswith("/api/datasets/owner/set/tree/main"):
            files = sorted(file for file in self.server.root.rglob("*") if file.is_file())
            self._json(
                [
                    {
                        "type": "file",
                        "oid": "c" * 40,
                        "size": file.stat().st_size,
                        "path": file.relative_to(self.server.root).as_posix(),
                    }
                    for file in files
                ]
            )
        elif match := re.fullmatch(r"/datasets/owner/set/resolve/main/(.+)", path):
            if self.server.failing:
                self.server.failing -= 1
                self._send(503, b"", {})
                return
            data = (self.server.root / match[1]).read_bytes()
            bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", given or "")
            begin, end = (
                (int(bounds[1]), min(int(bounds[2]), len(data) - 1)) if bounds else (0, len(data) - 1)
            )
            place = {
                "Content-Range": f"bytes {begin}-{end}/{len(data)}",
                "X-Repo-Commit": COMMIT,
                "ETag": '"c"',
            }
            self._send(206, data[begin : end + 1], place)
        else:
            self._send(404, b"{}", {})

    def log_message(self, *_: Any) -> None:
        pass

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def write(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.frombytes("RGB", (200, 200), os.urandom(120_000)).save(buffer, "PNG")
        picture = {"bytes": buffer.getvalue(), "path": None}
        rows.append(
            {"sample_id": f"{path.stem}/{number}", "image": picture, "query": ["q"], "annotations": ["a"]}
        )
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=count // 2)


def prepare(hub: Hub, out: Path, *words: str, kind: str = "bigdocs") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(out.parent / "cache"),
        "NO_PROXY": "127.0.0.1",
    }
    command = [
        sys.executable,
        "cli.py",
        "prepare",
        kind,
        "owner/set",
        str(out),
        "--workers",
        "1",
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_config_of_a_hub_set_is_read_in_pieces_and_nothing_is_kept(tmp_path, hub):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "val-00000-of-00001"):
        write(hub.root / f"ArxivTableCap/{name}.parquet", 40)
    write(hub.root / "ArxivOCR/train-00000-of-00001.parquet", 2)
    done = prepare(hub, tmp_path / "out", "--config", "ArxivTableCap")
    assert done.returncode == 0, done.stderr
    assert load_manifest(tmp_path / "out").sources == {"bigdocs/ArxivTableCap": 80}
    fetched = [(path, given) for path, given in hub.asked if "/resolve/" in path]
    assert {path.rpartition("/")[2] for path, _ in fetched} == {
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet",
    }  # fmt: skip
    assert all(given for _, given in fetched)  # never a file as a whole
    assert not [
        file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.stat().st_size > 10_000
    ]


def test_tars_of_a_hub_set_are_read_in_pieces_through_a_failing_request(tmp_path, hub):
    (hub.root / "data").mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(hub.root / f"data/cc12m-train-{shard:04d}.tar", "w") as tar:
            for key in range(30):
                buffer = io.BytesIO()
                Image.frombytes("RGB", (200, 200), os.urandom(120_000)).save(buffer, "PNG")
                for ending, data in (("png", buffer.getvalue()), ("txt", f"{shard}/{key}".encode())):
                    info = tarfile.TarInfo(f"{key:09d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    hub.failing = 1
    done = prepare(hub, tmp_path / "out", kind="cc12m")
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.num_samples, manifest.extra["skipped"], hub.failing) == (60, {}, 0)
    answers = {message_text(Decoder()(raw).messages[-1]) for raw in read_range(manifest, 0, 60)}
    assert answers == {f"{shard}/{key}" for shard in range(2) for key in range(30)}
    fetched = [(path, given) for path, given in hub.asked if "/resolve/" in path]
    assert {path.rpartition("/")[2] for path, _ in fetched} == {
        "cc12m-train-0000.tar",
        "cc12m-train-0001.tar",
    }
    assert all(given for _, given in fetched)  # never a file as a whole
    assert not [
        file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.stat().st_size > 10_000
    ]


def test_what_a_hub_set_lacks_is_said(tmp_path, hub):
    write(hub.root / "ArxivTableCap/val-00000-of-00001.parquet", 2)
    write(hub.root / "ArxivOCR/train-00000-of-00001.parquet", 2)
    done = prepare(hub, tmp_path / "out", "--config", "ArxivTableCap")
    assert done.returncode != 0
    assert "no files of split 'train'" in done.stderr
    assert "Traceback" not in done.stderr
