"""The code of docs/python.md runs, block after block, on the tiny model."""

from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs/python.md"


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec",
    "ignore:You defined a",
    "ignore:Total length of",
)
def test_the_blocks_of_the_page_run(tmp_path, monkeypatch, capsys):
    from tests.integration.conftest import write_set

    write_set(tmp_path / "data/train", 8, samples_per_shard=4)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    parts = PAGE.read_text("utf-8").split("```python\n")[1:]
    for code in (part.split("```")[0] for part in parts):
        exec(compile(code, str(PAGE), "exec"), names)
    assert names["trainer"].global_step == 2
    for one, other in zip(names["module"].net.parameters(), names["loaded"].net.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "hf/model.safetensors").is_file()
    assert names["batch"]["input_ids"].shape[0] == 2
    assert names["embeds"].shape == (2, 16, 64)
    assert capsys.readouterr().out.splitlines()[-2:] == ["0.8", "True"]
