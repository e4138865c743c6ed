"""`alignvlm export`: the folder that `fit` leaves, from a run or one of its checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from alignvlm_pl.cli import main
from tests.integration.checkpoint_files import LAST, error_of


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", [".", LAST, "checkpoints/step00000002.ckpt"])
def test_a_run_and_its_checkpoint_give_the_folder_of_fit(trained, tmp_path, source):
    assert main(["export", str(trained / source), str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == files(trained / "hf")


def test_an_earlier_checkpoint_has_its_own_step_and_weights(world, tmp_path):
    folder = world.fit(
        tmp_path / "run", "--stage.max_steps=2", "--checkpoint_every_n_steps=1", "--checkpoint_keep_last=2"
    )
    assert main(["export", str(folder / "checkpoints/step00000001.ckpt"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/stage.json").read_text())["steps"] == 1
    assert (tmp_path / "out/model.safetensors").read_bytes() != (folder / "hf/model.safetensors").read_bytes()


def test_files_have_the_size_that_is_asked_for(trained, tmp_path):
    assert main(["export", str(trained), str(tmp_path / "out"), "--max-shard-size", "200KB"]) == 0
    assert (tmp_path / "out/model.safetensors.index.json").is_file()


def test_what_cannot_be_exported_is_refused(trained, tmp_path, capsys):
    def error(*words: object) -> str:
        return error_of(capsys, main(["export", *map(str, words)]))

    out = tmp_path / "out"
    assert "none: there is no such run folder or checkpoint" in error(tmp_path / "none", out)
    assert f"{trained / 'hf'} exists: name a folder that does not" in error(trained, trained / "hf")
    assert "--max-shard-size=5: expected a size such as 5GB" in error(trained, out, "--max-shard-size", 5)
    alone = tmp_path / "alone/checkpoints/last.ckpt"
    alone.parent.mkdir(parents=True)
    shutil.copy((trained / LAST).resolve(), alone)
    assert "name the config.yaml of the run with --config" in error(alone, out)
    assert main(["export", str(alone), str(out), "--config", str(trained / "config.yaml")]) == 0
    alone.unlink()
    assert "last.ckpt is missing: the run has saved no checkpoint yet" in error(alone.parent.parent, out / "2")
    torch.save({"state_dict": {}}, alone)
    assert "does not say what it is" in error(alone, out / "2", "--config", trained / "config.yaml")
    alone.write_bytes(b"cut")
    assert "is damaged or no checkpoint" in error(alone, out / "2", "--config", trained / "config.yaml")
    assert not (out / "2").exists()
