"""A dataset behind a real server that fails: in training, evaluation and verification; see test_damage.py."""

import functools
import http.server
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignvlm_pl.cli import main
from alignvlm_pl.errors import DataError
from alignvlm_pl.models.processing import AlignVLMProcessor
from alignvlm_pl.models.tiny import TILE_PX, TOKENS_PER_TILE, tiny_tokenizer
from tests.integration.damage_world import KEYS, SHARD, evaluate, train_epoch, verify, whole_set

pytestmark = pytest.mark.timeout(60)
INDEX = SHARD.replace(".tar", ".index.safetensors")
CUT = "cut"
"""In place of a status: the connection is closed in the middle."""


@pytest.fixture(scope="session")
def processor() -> AlignVLMProcessor:
    tiling = {"tile_height": TILE_PX, "tile_width": TILE_PX, "max_tiles": 4}
    return AlignVLMProcessor(tiny_tokenizer(), tiling=tiling, tokens_per_tile=TOKENS_PER_TILE, chat_template="chatml")


@pytest.fixture
def site(tmp_path: Path, monkeypatch) -> Iterator[SimpleNamespace]:
    """A server of a complete dataset; `responses` of a file are sent first, in order, before the file itself."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "verified"))
    monkeypatch.setattr("datamodules.storage.fetching.MAX_BACKOFF_S", 0.01)
    responses: dict[str, list[int | str]] = {}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            response = responses[name].pop(0) if responses.get(name) else 200
            if response == CUT:
                data = (Path(self.directory) / name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif response != 200:
                self.send_error(int(response))
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(whole_set(tmp_path / "site")))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_address[1]}", responses=responses)
    server.shutdown()
    thread.join()
    server.server_close()


# Each use fetches the whole dataset anew, which takes seconds: two workers only where a worker's own fetch fails.
FOR_A_WHILE = [
    (SHARD, [500], (0, 2)),
    (SHARD, [429, 503, CUT], (0,)),
    (INDEX, [CUT], (0,)),
    ("manifest.json", [500], (0,)),
]


@pytest.mark.parametrize(("name", "responses", "num_workers"), FOR_A_WHILE, ids=str)
def test_a_server_that_fails_for_a_while(site, tmp_path, processor, capsys, name, responses, num_workers):
    for number, workers in enumerate(num_workers):
        for use in (train_epoch, evaluate):
            site.responses[name] = list(responses)
            cache = tmp_path / f"cache-{use.__name__}-{number}"
            options = {"cache": cache, "num_workers": workers, "fetch_retries": 3}
            keys, skipped = use(site.url, processor, **options)
            assert (keys, skipped) == (Counter(KEYS), type(skipped)())
            assert site.responses[name] == []
    site.responses[name] = list(responses)
    assert verify(site.url, capsys) == []
    assert site.responses[name] == []


GONE = r"http://127\.0\.0\.1:\d+/{}"
FOR_EVER = {
    (SHARD, 500): (GONE + r" could not be fetched in 2 attempts, the last: .*500", ["not_fetched"]),
    (SHARD, CUT): (GONE + r" could not be fetched in 2 attempts, the last: ", ["not_fetched"]),
    (SHARD, 404): (GONE + r": there is no such file \(", ["missing"]),
    (SHARD, 403): (GONE + r": the server refuses it \(.*403", ["not_fetched"]),
    (INDEX, 500): (GONE + r" could not be fetched in 2 attempts, the last: .*500", ["wrong_index"]),
    (INDEX, 404): (r"there is no sample index " + GONE + r" \(", ["missing_index"]),
}


@pytest.mark.parametrize("where", FOR_EVER, ids=str)
def test_a_server_that_fails_for_ever(site, tmp_path, processor, capsys, where):
    name, response = where
    message, kinds = FOR_EVER[where]
    site.responses[name] = [response] * 1000
    for workers in (0, 2) if where == (SHARD, 404) else (0,):
        for use in (train_epoch, evaluate):
            options = {"cache": tmp_path / "cache", "num_workers": workers, "fetch_retries": 1}
            with pytest.raises(DataError, match=message.format(name.replace(".", r"\."))):
                use(site.url, processor, **options)
    assert verify(site.url, capsys) == kinds


def test_a_url_without_a_manifest(site, tmp_path, processor, capsys):
    site.responses["manifest.json"] = [404] * 1000
    message = r"http://127\.0\.0\.1:\d+ is not a complete dataset: no manifest\.json in it"
    for use in (train_epoch, evaluate):
        with pytest.raises(DataError, match=message):
            use(site.url, processor, cache=tmp_path / "cache", num_workers=0)
    assert main(["shards", "verify", site.url]) == 1
    assert "is not a complete dataset: no manifest.json in it" in capsys.readouterr().err
