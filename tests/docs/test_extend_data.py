"""docs/extend/data.md, followed word by word in an empty folder."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from alignvlm_pl.models.build import build_processor
from alignvlm_pl.models.tiny import tiny_spec

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "data.md"


@pytest.fixture
def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.fixture
def dataset(blocks, tmp_path, monkeypatch):
    """The dataset that the page's script writes, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("invoices").mkdir()
    for total in ("12.50", "7.00"):
        Image.new("RGB", (56, 56), "white").save(f"invoices/{total}.png")
        Path(f"invoices/{total}.txt").write_text(f"{total}\n")
    exec(compile(blocks[0], str(PAGE), "exec"), {})
    return Path("data/invoices")


def test_the_script_writes_a_dataset_without_damage(dataset):
    from alignvlm_pl.cli import main

    assert main(["shards", "verify", str(dataset)]) == 0


def test_the_datamodule_adds_its_instruction(blocks, dataset, monkeypatch):
    Path("mine").mkdir()
    Path("mine/data.py").write_text(blocks[1])
    monkeypatch.syspath_prepend(Path.cwd())
    from mine.data import InstructionDataModule

    processor = build_processor(tiny_spec(Path("tokenizer")))
    data = InstructionDataModule(
        "Be brief.", train=[dataset], benchmarks={"held": dataset}, batch_size=2, num_workers=0
    )
    data.attach(processor)
    batch = next(iter(data.train_dataloader()))
    texts = [processor.tokenizer.decode(ids) for ids in batch["input_ids"]]
    assert all("What is the total? Be brief." in text for text in texts)
    for name in ("mine", "mine.data"):
        monkeypatch.delitem(sys.modules, name)
