"""Boxes: a trained model as a small file over the pretrained parts."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignvlm_pl.cli import box as command
from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.loading import reading_settings, weights_folder
from alignvlm_pl.pretrained import box

READING = {"page_width": 768, "question": "{}?", "transcribe": "All?"}
LINEAR, TIED, TRUNK = "language_model.layer.weight", "language_model.norm.weight", "vision_tower.stem.weight"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Pretrained parts of three weights, with a tokenizer; returns the weights."""
    rng = np.random.default_rng(1)
    shapes = {LINEAR: (48, 64), TIED: (48,), TRUNK: (8, 3, 3, 3)}
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for prefix in ("language_model.", "vision_tower."):
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        (tmp_path / prefix).mkdir()
        save_file(own, tmp_path / prefix / "model.safetensors")
    (tmp_path / "language_model." / "tokenizer.json").write_text('{"model": {"vocab": 3}, "added_tokens": []}')
    monkeypatch.setattr(box, "ensure_smollm2", lambda: tmp_path / "language_model.")
    monkeypatch.setattr(box, "_PARTS", {prefix: lambda prefix=prefix: tmp_path / prefix for prefix in box._PARTS})
    return weights


def export(folder: Path, weights: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    for name in (*box._FILES, "chat_template.jinja"):
        (folder / name).write_text(json.dumps({"file": name, "part": {"_name_or_path": "/a", "init_from": "/b"}}))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": 3}, "added_tokens": ["<image>"]}')
    return folder


def test_a_model_comes_out_as_it_was_packed(tmp_path: Path, parts: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(2)
    low_rank = rng.standard_normal((48, 4), dtype=np.float32) @ rng.standard_normal((4, 64), dtype=np.float32)
    trained = {
        LINEAR: parts[LINEAR] + 0.01 * low_rank,
        TIED: parts[TIED] + np.float32(0.5),
        TRUNK: parts[TRUNK] * np.float32(1.1),
        "connector.w1.weight": rng.standard_normal((16, 8), dtype=np.float32),
        "connector.norm.bias": rng.standard_normal(16, dtype=np.float32),
    }
    found = box.pack_box(export(tmp_path / "hf", trained), tmp_path / "out" / "it.safetensors", reading=READING, rank=4)
    assert found["lost"] < 1e-3 and (tmp_path / "out" / "it.safetensors").stat().st_size / 1e6 == pytest.approx(
        found["megabytes"], abs=0.01
    )
    (folder := tmp_path / "again").mkdir()
    box.unpack_box(tmp_path / "out" / "it.safetensors", folder)
    again = load_file(folder / "model.safetensors")
    assert again.keys() == trained.keys()
    for name, value in trained.items():
        change = value - parts.get(name, 0)
        assert np.abs(again[name] - value).max() <= np.abs(change).max() * (0 if value.ndim < 2 else 0.03) + 1e-6, name
    assert json.loads((folder / "tokenizer.json").read_text()) == {"model": {"vocab": 3}, "added_tokens": ["<image>"]}
    assert json.loads((folder / "config.json").read_text()) == {"file": "config.json", "part": {}}
    assert reading_settings(folder) == READING


def test_a_weight_that_did_not_change_takes_no_room(tmp_path: Path, parts: dict[str, np.ndarray]) -> None:
    box.pack_box(export(tmp_path / "hf", dict(parts)), tmp_path / "it.safetensors", reading=READING)
    assert load_file(tmp_path / "it.safetensors") == {}
    (folder := tmp_path / "again").mkdir()
    box.unpack_box(tmp_path / "it.safetensors", folder)
    again = load_file(folder / "model.safetensors")
    assert all((again[name] == value).all() for name, value in parts.items())


def test_the_record_names_the_weights_that_were_written(tmp_path: Path, parts: dict[str, np.ndarray]) -> None:
    from alignvlm_pl.training.export import weights_sha256

    box.pack_box(export(tmp_path / "hf", dict(parts)), tmp_path / "it.safetensors", reading=READING)
    (folder := tmp_path / "again").mkdir()
    box.unpack_box(tmp_path / "it.safetensors", folder)
    assert json.loads((folder / "stage.json").read_text())["weights_sha256"] == weights_sha256(folder)


def test_another_model_is_refused(tmp_path: Path, parts: dict[str, np.ndarray]) -> None:
    hf = export(tmp_path / "hf", {**parts, LINEAR: parts[LINEAR][:, :8].copy()})
    with pytest.raises(ConfigError, match=r"language_model.layer.weight has shape \(48, 8\), expected \(48, 64\)"):
        box.pack_box(hf, tmp_path / "it.safetensors", reading=READING)
    (hf / "stage.json").unlink()
    with pytest.raises(ConfigError, match=r"has no stage.json: expected the hf/ folder"):
        box.pack_box(hf, tmp_path / "it.safetensors", reading=READING)


def test_a_folder_is_taken_as_it_is_and_an_unknown_box_named() -> None:
    assert weights_folder("runs/demo") == "runs/demo"
    assert weights_folder(None) is None
    with pytest.raises(ConfigError, match=r"model box:recipts; .*did you mean 'receipts'"):
        weights_folder("box:recipts")


def test_a_folder_without_settings_is_read_as_it_is(tmp_path: Path) -> None:
    settings = {"page_width": 0, "question": "What is the {}?", "transcribe": "Transcribe the page."}
    assert reading_settings(tmp_path) == settings


def test_the_command_scores_what_it_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    done: list[tuple[str, ...]] = []

    def run_command(*words: str) -> None:
        done.append(words)
        if words[0] == "test":
            folder = Path(words[words.index("--run_dir") + 1])
            folder.mkdir()
            scores = {"receipts": {"anls": 0.4, "anls/total": 0.5}, "readout-lines": {"cer": 0.25}}
            (folder / "results.json").write_text(json.dumps({"benchmarks": scores}))

    unpacked = []
    monkeypatch.setattr(command, "run_command", run_command)
    monkeypatch.setattr(command, "pack_box", lambda folder, out, *, reading: {"megabytes": 1.0})
    monkeypatch.setattr(command, "unpack_box", lambda out, folder: unpacked.append((out, folder)))
    assert command.run(["box", "receipts", "scans", "--run-dir", str(tmp_path)]) == 0
    assert unpacked == [(tmp_path / "receipts.safetensors", tmp_path / "unpacked")]
    tests = [words for words in done if words[0] == "test"]
    assert len(tests) == 2
    assert all(words[words.index("--model.weights") + 1] == str(tmp_path / "unpacked") for words in tests)
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("box: "))
    assert {**last, "minutes": 0} == {"anls/total": 0.5, "cer": 0.25, "megabytes": 1.0, "minutes": 0}
