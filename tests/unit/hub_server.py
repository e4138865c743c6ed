"""A server on this machine that responds as the hub does, and `prepare` against it.

The hub's client reads its address when it is imported, so the command runs in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder as one dataset."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.requested: list[tuple[str, str | None]] = []
        self.failing = 0  # requests for files that are refused before one succeeds


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path, given = unquote(urlsplit(self.path).path), self.headers.get("Range")
        self.server.requested.append((path, given))
        if re.fullmatch(r"/api/datasets/[^/]+/[^/]+(/revision/main)?", path):
            self._json({"id": "owner/set", "sha": COMMIT, "private": False, "siblings": []})
        elif path.startswith("/api/datasets/owner/set/tree/main"):
            deep = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
            folder = self.server.root / path.removeprefix("/api/datasets/owner/set/tree/main").strip("/")
            inside = folder.rglob("*") if deep else folder.glob("*")
            files = sorted(file for file in inside if file.is_file())
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
            begin, end = (int(bounds[1]), min(int(bounds[2]), len(data) - 1)) if bounds else (0, len(data) - 1)
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


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serve a folder as the dataset `owner/set`."""
    server = Hub(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def prepare(
    hub: Hub, out: Path, *words: str, kind: str = "bigdocs", place: str = "owner/set"
) -> subprocess.CompletedProcess[str]:
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
        place,
        str(out),
        "--workers",
        "1",
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
