"""Nothing in a shard runs, names a file of the machine, or takes it down: code members, json bombs, odd names."""

import ast
import contextlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import DataError
from datamodules.shards.decode import Decoder
from datamodules.shards.index import IndexRow, index_path, write_index
from datamodules.shards.info import collect
from datamodules.shards.manifest import Manifest, Shard, load_manifest, write_manifest
from datamodules.shards.reader import read_answers, read_range
from datamodules.shards.sample import SampleError
from datamodules.shards.sample_formats import (
    MAX_JSON_BYTES,
    read_bigdocs,
    read_docdownstream,
    read_json,
    read_normal,
)
from datamodules.storage.fetching import file_digest

SOURCES = sorted((Path(__file__).resolve().parents[2] / "datamodules").rglob("*.py"))
# Modules that run code from data, or hand data to something that does.
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "runpy", "wids"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def normal(**changes: Any) -> dict[str, Any]:
    question = {"role": "user", "content": [{"type": "image", "index": 0}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "12.50"}]}
    return {"images": [{"file": "0.png", "w": 6, "h": 4}], "messages": [question, answer]} | changes


def write_set(folder: Path, members: list[tuple[str, bytes]], *, samples: int = 1) -> Path:
    """A set of one shard with exactly these members."""
    folder.mkdir(exist_ok=True)
    path = folder / "set-00000.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    end = sum(512 + -(-len(data) // 512) * 512 for _, data in members)
    write_index(index_path(path), [IndexRow(offset=0, key="s-0", source="x")], end=end)
    shard = Shard(path=path.name, num_samples=samples, bytes=path.stat().st_size, sha256=file_digest(path))
    write_manifest(
        Manifest(folder=folder, name="set", source="x", license="CC0-1.0", num_samples=samples, shards=(shard,))
    )
    return folder


class Trap:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_can_run_code_from_data(path):
    tree = ast.parse(path.read_text("utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert {name.split(".")[0] for name in imported} & FORBIDDEN_MODULES == set()
    # From webdataset only the grouping and the writer: its decoders load .pyd, .pth and .npy, its openers run pipes.
    taken = {name for name in imported if name.split(".")[0] == "webdataset"}
    assert all(name.split(".")[1] in ("tariterators", "writer") for name in taken), taken
    assert not any(name.split(".")[0] in ("subprocess", "pty") for name in imported)
    for name, call in calls(tree):
        assert name not in FORBIDDEN_NAMES, name
        assert not name.endswith((".system", ".popen", "torch.load", ".unsafe_load", "yaml.load")), name
        assert name.rpartition(".")[0] not in ("os",) or not name.startswith(("os.exec", "os.spawn")), name
        pickles = [ast.unparse(word.value) for word in call.keywords if word.arg == "allow_pickle"]
        assert pickles in ([], ["False"]), name
        assert not name.endswith(".extractall"), name


def test_the_search_finds_what_it_looks_for():
    source = "import pickle\nnp.load(f, allow_pickle=True)\neval(x)\ntorch.load(y)\n"
    names = [name for name, _ in calls(ast.parse(source))]
    assert names == ["np.load", "eval", "torch.load"]


def test_code_members_beside_a_sample_are_never_touched(tmp_path):
    trap = tmp_path / "sprung"
    loaded = pickle.dumps(Trap(trap))
    npy = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117)
        + b"\n"
        + loaded
    )
    url = f"pipe:mkdir {trap}".encode()
    members = [("s-0.json", json.dumps(normal()).encode()), ("s-0.0.png", png())]
    members += [(f"s-0.{kind}", loaded) for kind in ("pyd", "pth", "pt", "pickle", "pkl", "mp", "py", "cbor")]
    members += [("s-0.npy", npy), ("s-0.npz", npy), ("__url__", url), ("s-0.url", url)]
    folder = write_set(tmp_path / "set", members)
    samples = [Decoder()(raw) for raw in read_range(load_manifest(folder), 0, 1)]
    assert [(sample.key, sample.sizes, sample.references) for sample in samples] == [("s-0", [(6, 4)], ["12.50"])]
    assert [answer.references for answer in read_answers(folder)] == [("12.50",)]
    assert collect(folder)[0]["unknown"]["turns"] == [2]
    assert not trap.exists()
    pickle.loads(loaded)
    assert trap.exists()  # so it would have been seen


@pytest.mark.parametrize("member", ["s-0.__url__", "s-0.__key__", "s-0.__local_path__"])
def test_a_member_called_like_our_own_fields_replaces_none(tmp_path, member):
    members = [("s-0.json", json.dumps(normal()).encode()), ("s-0.0.png", png()), (member, b"pipe:id")]
    folder = write_set(tmp_path / "set", members)
    # webdataset takes some of them for repeated members: a damaged shard is as good.
    with contextlib.suppress(DataError):
        raw = next(iter(read_range(load_manifest(folder), 0, 1)))
        assert (raw["__key__"], raw["__url__"]) == ("s-0", str(folder / "set-00000.tar"))


@pytest.mark.parametrize("read", [read_normal, read_docdownstream, read_bigdocs])
@pytest.mark.parametrize("file", ["__key__", "__url__", "__local_path__"])
def test_a_sample_cannot_name_a_file_of_the_machine(tmp_path, read, file):
    # The key is a path of the tar's own choosing, and a picture given as text would be opened as a path.
    picture = tmp_path / "private"
    picture.write_bytes(png())
    raw = {
        "__key__": str(picture),
        "__url__": str(picture),
        "__local_path__": str(picture),
        "json": json.dumps(normal(images=[{"file": file}])).encode(),
    }
    with pytest.raises(DataError, match=rf"is partial: .* {file} is not in the shard"):
        Decoder(adapter=read)(raw)


def bomb(json_text: bytes) -> dict[str, Any]:
    return {"__key__": "s-0", "__url__": "set-00000.tar", "json": json_text}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "does not parse .*recursion"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "does not parse .*recursion"),
        (b'{"a": "' + b"x" * MAX_JSON_BYTES + b'"}', rf"has \d+ bytes, expected at most {MAX_JSON_BYTES}"),
        (b'{"a": ' + b"9" * 5000 + b"}", "does not parse"),
        (b'{"a": "\xff\xfe"}', "does not parse"),
        (b"", "does not parse"),
        (b"null", "NoneType, expected an object"),
    ],
)
def test_json_bombs_are_bad_samples(content, message):
    with pytest.raises(SampleError, match=message) as caught:
        read_json(bomb(content))
    assert caught.value.reason == "bad_json"


def test_a_json_of_the_largest_size_is_read():
    content = b'{"a": "' + b"x" * (MAX_JSON_BYTES - 9) + b'"}'
    assert len(content) == MAX_JSON_BYTES
    assert len(read_json(bomb(content))["a"]) == MAX_JSON_BYTES - 9


def test_json_bombs_do_not_crash_what_reads_json_alone(tmp_path):
    folder = write_set(tmp_path / "set", [("s-0.json", b"[" * 100_000)])
    with pytest.raises(DataError, match=r"s-0\.json"):
        read_answers(folder)
    with pytest.raises(DataError, match="sample 's-0'"):
        collect(folder)


def test_a_manifest_bomb_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match=r"manifest\.json is not JSON .*recursion"):
        load_manifest(tmp_path)


def test_an_image_member_with_an_endless_number_is_no_image(tmp_path):
    name = "9" * 5000 + ".png"
    raw = bomb(json.dumps({"sample_id": "a", "query": "q", "annotations": "a"}).encode()) | {name: png()}
    assert read_bigdocs(raw)[1:] == ([], [])
