"""Locations of datasets, datasets on real servers, and what an untrusted manifest cannot do."""

import functools
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from datamodules.shards.info import collect
from datamodules.shards.manifest import Manifest, load_manifest, read_manifest
from datamodules.shards.reader import read_answers, read_range
from datamodules.shards.writer import ShardWriter
from datamodules.storage.fetching import MissingFileError, Policy
from datamodules.storage.location import Storage, file_url

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "PNG")
    question = {"role": "user", "content": [{"type": "image", "index": 0}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    path = tmp_path / "site/my set"
    with ShardWriter(path, name="set", source="made", license="CC0-1.0", samples_per_shard=2) as out:
        for _ in range(6):
            out.add({"messages": [question, answer]}, [buffer.getvalue()], ["png"])
    return path


@pytest.fixture
def site(folder: Path, monkeypatch) -> Iterator[types.SimpleNamespace]:
    """The folder above the dataset, on a web server; `requested` lists the requested files."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    requested: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_: object) -> None:
            requested.append(self.path.rpartition("/")[2])

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield types.SimpleNamespace(url=f"http://127.0.0.1:{server.server_address[1]}/my%20set", requested=requested)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(cache=tmp_path / "cache", policy=Policy(retries=1, backoff_s=0.01))


def keys(manifest: Manifest) -> list[str]:
    return [sample["__key__"] for sample in read_range(manifest, 0, manifest.num_samples)]


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_dataset_at_a_url_is_read_like_a_folder_and_shards_come_on_first_use(folder, site, storage):
    manifest = load_manifest(site.url, storage=storage)
    assert manifest.is_remote
    assert site.requested == ["manifest.json"]
    assert next(iter(read_range(manifest, 2, 3)))["__key__"] == "set-00000002"
    assert site.requested == ["manifest.json", "set-00001.index.safetensors", "set-00001.tar"]
    assert keys(manifest) == keys(load_manifest(folder))
    assert keys(load_manifest(site.url + "/", storage=storage)) == keys(manifest)
    assert site.requested.count("set-00001.tar") == 1
    assert manifest.sha256 == load_manifest(folder).sha256 != ""
    # Worker processes get it by pickle.
    assert keys(pickle.loads(pickle.dumps(manifest))) == keys(manifest)


def test_commands_that_give_a_path_take_a_url(folder, site, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "mine"))
    assert str(Path(site.url)).startswith("http:/1")  # a Path has lost a slash
    assert read_answers(Path(site.url)) == read_answers(folder)
    assert collect(Path(site.url)) == collect(folder)
    assert len(list((tmp_path / "mine/shards").glob("*/*.tar"))) == 3


def test_a_remote_shard_that_was_cut_is_found_when_it_is_fetched(folder, site, storage):
    shard = folder / "set-00001.tar"
    shard.write_bytes(shard.read_bytes()[:1024])
    manifest = load_manifest(site.url, storage=storage)
    with pytest.raises(DataError, match=r"my%20set/set-00001\.tar could not be fetched .*bytes, received 1024"):
        keys(manifest)
    with pytest.raises(DataError, match=r"set-00001\.tar could not be fetched"):
        manifest.shard_path(manifest.shards[1])


def test_a_url_without_a_manifest_is_no_dataset(folder, site, storage):
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"my%20set is not a complete dataset: no manifest\.json in it"):
        load_manifest(site.url, storage=storage)


def test_the_sample_index_comes_without_its_shard(folder, site, storage):
    (folder / "set-00000.index.safetensors").unlink()
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    edit(folder, shards=[shard | {"index_sha256": ""} for shard in shards])
    manifest = load_manifest(site.url, storage=storage)
    with pytest.raises(MissingFileError, match=r"set-00000\.index\.safetensors: there is no such file"):
        manifest.index_path(manifest.shards[0])
    (folder / "set-00000.index.safetensors").write_text("{}")
    assert manifest.index_path(manifest.shards[0]).read_text() == "{}"
    assert "set-00000.tar" not in site.requested
    local = load_manifest(folder)
    assert local.index_path(local.shards[0]) == folder / "set-00000.index.safetensors"


def test_an_index_of_other_bytes_than_the_manifest_means_is_refused(folder, site, storage):
    (folder / "set-00000.index.safetensors").write_text("{}")
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    edit(folder, shards=[shards[0] | {"index_sha256": "0" * 64}, *shards[1:]])
    manifest = load_manifest(site.url, storage=storage)
    with pytest.raises(DataError, match=r"index\.safetensors is damaged or another file: expected sha256 0000"):
        manifest.index_path(manifest.shards[0])


def test_an_index_that_is_too_large_is_not_stored(folder, site, storage, monkeypatch):
    monkeypatch.setattr("datamodules.shards.manifest.MAX_INDEX_BYTES", 10)
    (folder / "set-00000.index.safetensors").write_text(" " * 11)
    manifest = load_manifest(site.url, storage=storage)
    with pytest.raises(DataError, match=r"index\.safetensors has more than the expected 10 bytes"):
        manifest.index_path(manifest.shards[0])


@pytest.mark.parametrize(
    "folder",
    [
        "pipe:cat set/{name}",
        "ftp://host/set",
        "file:///data/set",
        "file:/data/set",
        "sftp://host/set",
        "gcs://bucket/set",
        "data:text/plain,x",
        "http:host/set",
        "filecache::https://host/set",
        Path("ftp://host/set"),
    ],
)
def test_other_schemes_are_refused_with_the_accepted_ones(folder):
    with pytest.raises(ConfigError, match=r"expected a folder or a URL with http://, https://, s3://, gs://, hf://"):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https:///set", "expected a host"),
        ("https://host/a set", "no blank"),
        ("https://host/set#part", "no blank or #"),
        ("hf://org/name/set", "expected hf://datasets/ORGANISATION/NAME"),
        ("hf://datasets/name", "expected hf://datasets/ORGANISATION/NAME"),
    ],
)
def test_malformed_urls_are_refused(url, message):
    with pytest.raises(ConfigError, match=message):
        load_manifest(url)


def test_local_folders_with_a_colon_are_folders(tmp_path):
    (tmp_path / "run:1").mkdir()
    os.chdir(tmp_path)
    assert Storage().locate("run:1") == Path("run:1")
    assert Storage().locate("C:/data") == Path("C:/data")
    assert Storage().locate("data/set") == Path("data/set")


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [
        ("s3://bucket/set", "s3fs", "s3fs"),
        ("gs://bucket/set", "gcsfs", "gcsfs"),
    ],
)
def test_a_missing_package_is_named_with_its_command(url, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package} \(.*\); install it: pip install {package}$"):
        load_manifest(url)


def test_buckets_are_read_through_the_file_system_of_their_package(folder, storage, monkeypatch):
    class S3FileSystem(MemoryFileSystem):
        protocol = "s3"
        store: dict = {}
        pseudo_dirs = [""]

    # The package itself is not needed here: fsspec finds its class in a module of that name.
    monkeypatch.setitem(sys.modules, "s3fs", types.SimpleNamespace(S3FileSystem=S3FileSystem, __version__="9999.1"))
    monkeypatch.delitem(_registry, "s3", raising=False)
    try:
        for path in folder.iterdir():
            S3FileSystem().pipe_file(f"bucket/sets/{path.name}", path.read_bytes())
        assert keys(load_manifest("s3://bucket/sets", storage=storage)) == keys(load_manifest(folder))
        with pytest.raises(DataError, match=r"s3://bucket/other is not a complete dataset"):
            load_manifest("s3://bucket/other", storage=storage)
    finally:
        _registry.pop("s3", None)


FAKE_HUB = """
import json, os, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

folder, cache = map(Path, __import__("sys").argv[1:])

class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        if "/resolve/" in self.path:
            body = (folder / self.path.rpartition("/")[2]).read_bytes()
            first, last = self.headers["Range"].split("=")[1].split("-")
            self.reply(206, body[int(first) : int(last) + 1])
        elif "/tree/" in self.path:
            listing = [("set/" + p.name, p.stat().st_size) for p in folder.iterdir()]
            files = [{"type": "file", "path": path, "oid": "0" * 40, "size": size} for path, size in listing]
            self.reply(200, json.dumps(files).encode())
        else:
            self.reply(200, json.dumps({"id": "org/name", "sha": "a" * 40, "siblings": []}).encode())

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_): pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_OFFLINE": "0"}
from datamodules.shards.manifest import load_manifest
from datamodules.shards.reader import read_range
from datamodules.storage.location import Storage
manifest = load_manifest("hf://datasets/org/name/set", storage=Storage(cache=cache))
print([sample["__key__"] for sample in read_range(manifest, 0, 6)])
"""


@pytest.mark.slow
def test_a_dataset_on_a_hub_is_read_with_the_hubs_own_client(folder, tmp_path):
    command = [sys.executable, "-c", FAKE_HUB, str(folder), str(tmp_path / "cache")]
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(keys(load_manifest(folder)))


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../other/set-00000.tar",
        "a/../../b.tar",
        "a/./b.tar",
        "a//b.tar",
        "..",
        "",
        "http://host/a.tar",
        "pipe:touch ran",
        "file:/etc/passwd",
        "a\\b.tar",
        "a\nb.tar",
        "a\0.tar",
        "a" * 2000,
        7,
        None,
        ["a.tar"],
    ],
)
def test_a_manifest_names_only_files_of_its_own_folder(folder, name):
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    edit(folder, shards=[shards[0] | {"path": name}, *shards[1:]])
    with pytest.raises(DataError, match=r"manifest\.json: expected the name of a file in the folder of the dataset"):
        read_manifest(folder)


def test_names_are_quoted_in_urls_and_queries_stay():
    assert file_url("https://host/set?sig=a%2Fb", "x y#1?%.tar") == "https://host/set/x%20y%231%3F%25.tar?sig=a%2Fb"
    assert file_url("s3://bucket/set/", "deep/x y#1.tar") == "s3://bucket/set/deep/x y#1.tar"


def test_a_manifest_that_is_too_large_is_not_read(folder, site, storage, monkeypatch):
    monkeypatch.setattr("datamodules.shards.manifest.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(DataError, match=r"manifest\.json: expected at most 100 bytes"):
        load_manifest(folder)
    with pytest.raises(DataError, match=r"manifest\.json has more than the expected 100 bytes"):
        load_manifest(site.url, storage=storage)


def test_local_datasets_need_no_network_library():
    heavy = ("torch", "fsspec", "aiohttp", "filelock", "huggingface_hub")
    program = f"import sys, datamodules.shards.manifest; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
