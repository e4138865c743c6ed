"""The DataModules: batches over ranks and workers, epochs, damaged input, and use through a Trainer."""

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from datamodules import (
    BenchmarkDataModule,
    BigDocsDataModule,
    CC12MDataModule,
    DocDownstreamDataModule,
    WebDataModule,
)
from datamodules.loading import loader as loading
from datamodules.prepare.index import index_shards
from datamodules.shards.writer import ShardWriter
from tests.unit.light_processors import LetterProcessor, LongerProcessor

ROOT = Path(__file__).parents[2]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def make_set(folder: Path, questions: list[str], *, samples_per_shard: int = 4, **fields: Any) -> Path:
    with ShardWriter(
        folder, name=folder.name, source="made", license="CC0-1.0", samples_per_shard=samples_per_shard
    ) as out:
        for question in questions:
            turns = [("user", question), ("assistant", "yes")]
            messages = [{"role": r, "content": [{"type": "text", "text": text}]} for r, text in turns]
            messages[0]["content"].insert(0, {"type": "image", "index": 0})
            out.add({"messages": messages} | fields, [png()], ["png"])
    return folder


def numbered(count: int) -> list[str]:
    return [f"question {number}?" for number in range(count)]


def module(train: Path | None = None, *, rank: int = 0, world: int = 1, **options: Any) -> WebDataModule:
    options = {"batch_size": 2, "eval_batch_size": 3, "num_workers": 0, "shuffle_buffer": 4} | options
    data = WebDataModule(train=None if train is None else [train], **options)
    data.attach(LetterProcessor(), rank=rank, world_size=world)
    return data


def keys(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


@pytest.mark.parametrize(
    "kind", [WebDataModule, BenchmarkDataModule, BigDocsDataModule, CC12MDataModule, DocDownstreamDataModule]
)
def test_workers_get_an_adapter_whose_module_imports_no_lightning(kind):
    # A worker unpickles it; importing Lightning for it takes a second at each start (contract `workers` of setup.cfg).
    adapter = kind.adapter(SimpleNamespace(prompt=""))
    assert adapter.__module__.startswith("datamodules.shards.")


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Path:
    """24 samples in 6 shards."""
    return make_set(tmp_path_factory.mktemp("data") / "train", numbered(24))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """7 samples in one shard."""
    return make_set(tmp_path_factory.mktemp("data") / "small", numbered(7), samples_per_shard=100)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_pinned_where_the_trainer_runs_on_a_gpu(train, small, monkeypatch, device):
    seen = []
    monkeypatch.setattr(loading, "DataLoader", lambda *args, pin_memory, **kwargs: seen.append(pin_memory))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = module(train, val={"held": small}, benchmarks={"small": small})
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(
        strategy=strategy, overfit_batches=0, accumulate_grad_batches=1, lightning_module=None
    )
    data.train_dataloader()
    data.val_dataloader()
    assert seen == [device == "cuda"] * 3


def test_an_epoch_has_each_sample_once_and_the_next_is_another_order(train):
    loader = module(train).train_dataloader()
    assert len(loader) == 12
    first, second = keys(loader), keys(loader)
    assert Counter(first) == Counter(second) == Counter(f"train-{number:08d}" for number in range(24))
    assert first != second


def test_same_seed_same_batches(train):
    runs = [keys(module(train, seed=seed).train_dataloader()) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_a_length_window_pads_less_and_keeps_the_samples(train):
    def epoch(window: int) -> list[dict[str, Any]]:
        data = module(train, shuffle_buffer=24, length_window=window)
        return list(data.attach(LongerProcessor()).train_dataloader())

    alone, grouped = epoch(1), epoch(12)
    assert Counter(keys(alone)) == Counter(keys(grouped))
    padding = [sum(int((batch["input_ids"] == 0).sum()) for batch in batches) for batches in (alone, grouped)]
    assert padding[1] == 12 < padding[0]  # neighbours differ by one; random pairs by eight on average
    lengths = [batch["input_ids"].shape[1] for batch in grouped]
    assert lengths != sorted(lengths)
    assert keys(grouped) == keys(epoch(12))


def test_a_length_window_below_one_is_refused(train):
    with pytest.raises(ConfigError, match="length_window"):
        module(train, length_window=0)


def test_two_worker_processes_share_an_epoch_and_continue_in_the_next(train):
    data = module(train, num_workers=2)
    loader = data.train_dataloader()
    first, second = keys(loader), keys(loader)
    data.teardown()
    assert len(set(first)) == len(set(second)) == 24
    assert first != second
    again = module(train, num_workers=2)
    assert keys(again.train_dataloader()) == first
    again.teardown()


def test_ranks_take_equally_many_batches_and_share_the_samples(train):
    loaders = [module(train, rank=rank, world=3, batch_size=3).train_dataloader() for rank in range(3)]
    assert [len(loader) for loader in loaders] == [2, 2, 2]
    parts = [keys(loader) for loader in loaders]
    assert [len(part) for part in parts] == [6, 6, 6]
    assert len(set(itertools.chain(*parts))) == 18


def test_the_rank_in_the_environment_does_not_count(train, monkeypatch):
    expected = keys(module(train, rank=1, world=2).train_dataloader())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert keys(module(train, rank=1, world=2).train_dataloader()) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_validation_has_each_sample_once_on_any_number_of_ranks(small, world, num_workers):
    seen = []
    for rank in range(world):
        (loader,) = module(val={"held": small}, rank=rank, world=world, num_workers=num_workers).val_dataloader()
        for _ in range(2):  # evaluation starts afresh each time
            batches = list(loader)
            assert len(batches) == len(loader) == {1: 3, 2: 2}[world]
        seen += keys(batch for batch in batches if not batch["filler"])
    assert sorted(seen) == [f"small-{number:08d}" for number in range(7)]


def test_benchmarks_are_prompts_with_their_size_and_limit(small):
    data = module(benchmarks={"quick": small})
    assert (list(data.benchmarks), data.benchmark_size("quick")) == (["quick"], 7)
    batch = next(iter(data.benchmark_dataloader("quick")))
    assert batch["references"] == [["yes"]] * 3
    assert batch["questions"] == numbered(3)
    assert len(keys(data.benchmark_dataloader("quick", limit=4))) == 4
    assert data.benchmark_size("quick", limit=4) == 4
    with pytest.raises(ConfigError, match=r"benchmark 'qick' has no folder.*did you mean 'quick'"):
        data.benchmark_dataloader("qick")


def test_bad_training_samples_are_skipped_counted_and_limited(tmp_path):
    folder = make_set(tmp_path / "set", ["refuse", *numbered(7)])
    data = module(folder, max_skipped_share=1.0)
    loader = data.train_dataloader()
    assert "set-00000000" not in keys(loader)
    assert data.skipped == {"made": {"not_encodable": 1}}
    with pytest.raises(DataError, match="sample 'set-00000000' of made: refused"):
        list(module(folder, strict=True).train_dataloader())
    with pytest.raises(DataError, match=r"1 of \d+ samples were invalid \(not_encodable of made: 1\)"):
        list(module(folder, max_skipped_share=0.0).train_dataloader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_names_what_it_cannot_read(tmp_path, num_workers):
    folder = make_set(tmp_path / "set", [*["refuse"] * 3, *numbered(2), "refuse", "last 9?"])
    for loader in (
        module(val={"held": folder}, num_workers=num_workers).val_dataloader()[0],
        module(benchmarks={"held": folder}, num_workers=num_workers).benchmark_dataloader("held"),
    ):
        batches = list(loader)
        assert [batch["filler"] for batch in batches] == [True, False, False]
        assert [batch["positions"] for batch in batches] == [[], [3, 4], [6]]
        assert [[bad.key for bad in batch["skipped"]] for batch in batches] == [
            ["set-00000000", "set-00000001", "set-00000002"],
            ["set-00000005"],
            [],
        ]
        bad = batches[1]["skipped"][0]
        assert (bad.reason, bad.message) == ("not_encodable", "sample 'set-00000005' of made: refused")
        assert "references" in batches[0] or (batches[0]["labels"] == -100).all()


def test_an_error_in_a_worker_process_stays_short(tmp_path):
    folder = make_set(tmp_path / "set", numbered(8))
    data = module(folder, num_workers=2)
    loader = data.train_dataloader()
    (folder / "set-00001.tar").unlink()
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"shard {folder}/set-00001.tar is missing")
    assert "Traceback" not in str(caught.value)


def test_setup_finds_what_is_wrong_before_training(train, tmp_path):
    module(train, world=9, num_workers=2, batch_size=1).setup("fit")  # more workers than shards
    with pytest.raises(ConfigError, match=r"batch_size=25 on 1 ranks needs 25 samples per step.* have 24"):
        module(train, batch_size=25).setup("fit")
    with pytest.raises(DataError, match="not a complete dataset"):
        module(val={"held": tmp_path / "none"}).setup("validate")
    module(tmp_path / "none").setup("test")  # training sets are not needed to test
    with pytest.raises(DataError, match=r"no sample of source 'mode'; did you mean 'made'"):
        module(train, sources=["mode"]).setup("fit")


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"eval_batch_size": 0},
        {"num_workers": -1},
        {"max_skipped_share": 1.5},
        {"token_budget": -1},
        {"token_budget": 9, "length_window": 2},
        {"train": ["a"], "mixture": {"b": {"sets": ["c"]}}},
    ],
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=r"data\.init_args"):
        WebDataModule(**options)


def test_training_without_datasets_or_processor_says_so(train):
    with pytest.raises(ConfigError, match=r"train names no folder"):
        module().train_dataloader()
    with pytest.raises(ConfigError, match="has no processor"):
        WebDataModule(train=[train]).train_dataloader()


def test_sources_select_training_samples(tmp_path):
    folder = tmp_path / "set"
    with ShardWriter(folder, name="set", source="a", license="none") as out:
        for source in "aab":
            turn = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
            out.add({"messages": turn, "source": source}, [], [])
    data = module(folder, sources=["a"], batch_size=1)
    assert data.steps_per_epoch() == 2
    assert [batch["sources"] for batch in data.train_dataloader()] == [["a"], ["a"]]


def test_each_module_reads_the_format_of_its_source(tmp_path):
    def tar(folder: str, **members: bytes) -> Path:
        (tmp_path / folder).mkdir()
        with tarfile.open(tmp_path / folder / "0.tar", "w") as out:
            for name, data in members.items():
                info = tarfile.TarInfo("000." + name.replace("_", "."))
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
        index_shards(tmp_path / folder, name=folder, source=folder, license="none")
        return tmp_path / folder

    row = json.dumps({"sample_id": "a", "query": "Rows?", "annotations": "3"}).encode()
    cases = [
        (
            CC12MDataModule,
            tar("cc12m", png=png(), txt=b"a wall", json=b"{}"),
            "Describe the image briefly.",
            "a wall",
        ),
        (BigDocsDataModule, tar("bigdocs", json=row, png=png()), "Rows?", "3"),
    ]
    for kind, folder, question, answer in cases:
        data = kind(benchmarks={"one": folder}, num_workers=0).attach(LetterProcessor())
        (batch,) = data.benchmark_dataloader("one")
        assert (batch["questions"], batch["references"]) == ([question], [[answer]])


def test_the_benchmark_module_trains_nothing(small):
    data = BenchmarkDataModule({"quick": small}, 8, 0).attach(LetterProcessor())
    assert (data.eval_batch_size, data.num_workers) == (8, 0)
    assert len(keys(data.benchmark_dataloader("quick"))) == 7
    with pytest.raises(ConfigError, match="names no folder"):
        data.train_dataloader()


class CountingModule(pl.LightningModule):
    """Keeps the keys it was given; takes no real step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.processor = LetterProcessor()
        self.stage = SimpleNamespace(name="first", max_text_length=77)
        self.seen: list[list[str]] = []
        self.validated: list[str] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["keys"])
        assert batch["input_ids"][0, 0] == 77
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["keys"]

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, **quiet, **options)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*val_dataloader.* does not have many workers")
def test_a_trainer_runs_whole_epochs_with_processor_and_limit_of_the_module(train, small):
    model = CountingModule()
    data = WebDataModule([train], val={"held": small}, batch_size=2, num_workers=0, shuffle_buffer=4)
    fit = trainer(max_epochs=2, num_sanity_val_steps=0)
    fit.fit(model, datamodule=data)
    assert fit.global_step == 24
    assert fit.estimated_stepping_batches == 24
    first, second = (list(itertools.chain(*model.seen[at : at + 12])) for at in (0, 12))
    assert len(set(first)) == len(set(second)) == 24
    assert first != second
    assert model.validated == [f"small-{number:08d}" for number in range(7)] * 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Total length of `list` across ranks is zero")
def test_a_trainer_runs_without_validation_datasets(train):
    fit = trainer(max_steps=3)
    fit.fit(CountingModule(), datamodule=WebDataModule([train], batch_size=2, num_workers=0))
    assert fit.global_step == 3


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*does not have many workers")
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_validate_and_test_take_every_sample_of_a_benchmark(small, verb):
    model = CountingModule()
    getattr(trainer(), verb)(model, datamodule=BenchmarkDataModule({"quick": small}, num_workers=0), verbose=False)
    assert model.validated == [f"small-{number:08d}" for number in range(7)]


def test_loaders_of_evaluation_say_what_is_to_be_done_with_their_batches(small):
    data = module(val={"held": small}, benchmarks={"a": small, "b": small}, num_workers=0)
    data.set_benchmark_options(subset=3, read=["b"], max_new_tokens=5, predicted={"a": [0, 1, 2]})
    loaders = data.test_dataloader()
    batches = [next(iter(loader)) for loader in loaders]
    assert [(batch["dataset"], batch["task"]) for batch in batches] == [
        ("held", "loss"),
        ("a", "generate"),
        ("b", "read"),
    ]
    assert [batch["max_new_tokens"] for batch in batches[1:]] == [5, 5]
    # All of `a` is predicted already: a filler is left, so that Lightning runs the loop and it is scored.
    assert [batch["filler"] for batch in batches] == [False, True, False]
    assert [len(list(loader)) for loader in loaders[1:]] == [1, 1]
    data.set_benchmark_options(names=["b"])
    assert [next(iter(loader))["dataset"] for loader in data.predict_dataloader()] == ["b"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*train_dataloader.* does not have many workers")
def test_a_stage_has_an_order_of_its_own(train):
    seen = []
    for name in ("first", "first", "second"):
        model = CountingModule()
        model.stage.name = name
        data = WebDataModule([train], batch_size=2, num_workers=0, shuffle_buffer=4)
        trainer(max_epochs=1, limit_val_batches=0).fit(model, datamodule=data)
        seen.append(model.seen)
    assert seen[0] == seen[1] != seen[2]
    assert sorted(key for keys in seen[0] for key in keys) == sorted(key for keys in seen[2] for key in keys)
