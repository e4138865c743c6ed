"""A checkpoint says what it is, is read with weights_only, and is refused by another model, stage or parent."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
import yaml

from callbacks.random_state import KEY, generator_states, restore_generators
from tests.integration.checkpoint_files import LAST, contents, error_of, unfinished_run

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


# --- what it says ---------------------------------------------------------------------------------


def test_a_checkpoint_describes_its_model_stage_data_and_libraries(world, trained):
    found = contents(trained)
    assert found["stage"]["name"] == "all"
    assert found["stage"]["lr_llm"] == 1e-3
    assert found["stage"]["warmup_share"] == 0.03, "defaults too"
    assert found["parent"] is None
    assert found["samples_seen"] == {"made": 2 * 4}
    assert found["versions"]["torch"] == torch.__version__
    assert {"alignvlm_pl", "python", "lightning", "transformers"} < set(found["versions"])
    assert found["versions"]["pillow"] == PIL.__version__, "it cuts the tiles"
    processor = found["processor"]
    assert processor["tiling"]["tile_height"] == 56
    assert processor["tokens_per_tile"] == 16
    assert len(processor["tokenizer"]) == len(processor["chat_template"]) == 16
    assert processor["connector"] == {"type": "align", "pixel_shuffle": 1, "eps": 1e-5, "bias": True}
    record = json.loads((trained / "hf/stage.json").read_text())
    for key in ("processor", "samples_seen", "versions", "parent"):
        assert record[key] == found[key], key
    assert record["settings"] == found["stage"]


def test_the_model_can_be_built_from_the_checkpoint_alone(trained):
    from alignvlm_pl.models.configuration import AlignVLMConfig
    from alignvlm_pl.models.modeling import AlignVLMForConditionalGeneration

    state = torch.load(trained / LAST, weights_only=True)
    model = AlignVLMForConditionalGeneration(AlignVLMConfig(**state["contents"]["model"]))
    model.load_state_dict({name.removeprefix("model."): value for name, value in state["state_dict"].items()})


def test_samples_are_counted_through_a_resume(world, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, symlinks=True)
    shutil.rmtree(folder / "hf")
    world.fit(folder, "--stage.max_steps=2")  # nothing is left to train, but the folder to write
    assert json.loads((folder / "hf/stage.json").read_text())["samples_seen"] == {"made": 8}
    shutil.rmtree(folder / "hf")
    world.fit(folder, "--stage.max_steps=3")
    assert contents(folder)["samples_seen"] == {"made": 12}
    assert json.loads((folder / "hf/stage.json").read_text())["samples_seen"] == {"made": 12}


def test_describe_prints_what_a_checkpoint_and_a_folder_are(trained, tmp_path, capsys):
    from alignvlm_pl.cli import main

    assert main(["describe", str(trained / LAST)]) == 0
    assert json.loads(capsys.readouterr().out) == {"step": 2, "epoch": 0, **contents(trained)}
    assert main(["describe", str(trained / "hf")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((trained / "hf/stage.json").read_text())
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    for name, message in [
        ("none", "no such file"),
        ("text", "is damaged"),
        ("plain", "does not say what it is"),
    ]:
        assert message in error_of(capsys, main(["describe", str(tmp_path / f"{name}.ckpt")]))


# --- random numbers -------------------------------------------------------------------------------


def test_generators_continue_where_their_state_was_taken():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    draw()
    state = generator_states()
    expected = draw()
    assert draw() != expected
    restore_generators(state)
    assert draw() == expected


def with_dropout(world: Any, folder: Path) -> Path:
    content = yaml.safe_load((world.root / "model.yaml").read_text())
    content["spec"]["llm"]["config"]["attention_dropout"] = 0.5
    (folder / "dropout.yaml").write_text(yaml.safe_dump(content))
    return folder / "dropout.yaml"


def test_dropout_resumes_as_in_an_unbroken_run(world, tmp_path):
    options = [
        f"--model={with_dropout(world, tmp_path)}",
        "--checkpoint_every_n_steps=1",
        "--stage.max_steps=4",
    ]
    world.fit(tmp_path / "whole", *options)
    world.fit(world.cut(tmp_path / "cut", *options), *options)
    one, other = (torch.load(tmp_path / name / LAST, weights_only=True) for name in ("whole", "cut"))
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    assert torch.equal(one[KEY][0]["torch"], other[KEY][0]["torch"])


# --- what is refused ------------------------------------------------------------------------------


def change_contents(folder: Path, change: Any) -> None:
    path = (folder / LAST).resolve()
    state = torch.load(path, weights_only=True)
    change(state["contents"])
    torch.save(state, path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--model.spec.tiling.max_tiles=2",
            "ckpt_path was trained with tiling.max_tiles 4, the model has 2. Use the model",
        ),
        ("--model.spec.spell_answers=true", "with spell_answers False, the model has True"),
        (f"--model.spec.chat_template={TEMPLATE}", "with chat_template "),
        ("--model.spec.connector={type: align, eps: 1e-3}", "with connector.eps 1e-05, the model has 0.001"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_of_another_contract_is_refused_with_both_values(
    world, trained, tmp_path, capsys, command, option, message
):
    status = world.run(command, "--run_dir", tmp_path / "run", f"--ckpt_path={trained / LAST}", option)
    assert message in error_of(capsys, status)


def test_a_parent_of_another_contract_is_refused_before_weights_are_loaded(
    world, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("alignvlm_pl.training.module.build_model", None)
    options = [f"--stage.init_from={trained / 'hf'}", "--model.spec.tiling.thumbnail=none"]
    error = error_of(capsys, world.run("fit", "--run_dir", tmp_path / "run", *options))
    assert "hf was trained with tiling.thumbnail first, the model has none" in error


def test_another_tokenizer_is_refused(world, trained, tmp_path, capsys):
    from tokenizers import Tokenizer

    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(world.root / "tokenizer", tokenizer)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode("a").ids == [vocabulary["a"]]
    option = f"--model.spec.llm.tokenizer={tokenizer}"
    folder = trained / "hf"
    for source in (
        f"--ckpt_path={trained / LAST}",
        f"--stage.init_from={folder}",
        f"--model.weights={folder}",
    ):
        error = error_of(capsys, world.run("fit", "--run_dir", tmp_path / "run", source, option))
        assert f"trained with tokenizer {contents(trained)['processor']['tokenizer']}, the model has " in error


def test_given_weights_say_what_they_were_trained_with(world, trained, tmp_path, capsys, caplog):
    given = f"--model.weights={trained / 'hf'}"
    world.fit(tmp_path / "same", given, "--stage.max_steps=1")
    assert "model.weights" not in caplog.text
    world.fit(tmp_path / "larger", given, "--stage.max_steps=1", "--model.spec.tiling.max_tiles=2")
    assert "hf was trained with tiling.max_tiles 4, the model has 2." in caplog.text
    option = "--model.spec.connector={type: align, eps: 1e-3}"
    for command in ("fit", "test"):
        status = world.run(command, "--run_dir", tmp_path / "run", given, option)
        assert "hf was trained with connector.eps 1e-05, the model has 0.001" in error_of(capsys, status)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--stage.lr_llm=5e-3", "trained with stage.lr_llm=0.001, now 0.005: its optimizer"),
        ("--stage.lr_vision=null", "stage.lr_vision=0.001, now None"),
        ("--stage.weight_decay=0.1", "stage.weight_decay=0.0, now 0.1"),
        ("--stage.global_batch_size=8", "trained with stage.global_batch_size=4, now 8: its steps count other samples"),
    ],
)
def test_learning_rates_that_a_resumed_optimizer_would_bring_back_are_refused(
    world, trained, tmp_path, capsys, option, message
):
    folder = unfinished_run(trained, tmp_path / "run")
    assert message in error_of(capsys, world.run("fit", "--run_dir", folder, option))


def test_a_stage_is_not_resumed_from_another_parent(world, trained, tmp_path, capsys):
    first, second = (world.fit(tmp_path / name, f"--stage.init_from={trained / 'hf'}") for name in ("one", "two"))
    started = json.loads((trained / "hf/stage.json").read_text())["weights_sha256"]
    assert contents(first)["parent"] == {"stage": "all", "weights_sha256": started}
    shutil.rmtree(first / "hf")
    status = world.run("fit", "--run_dir", first, f"--stage.init_from={second / 'hf'}")
    other = json.loads((second / "hf/stage.json").read_text())["weights_sha256"]
    error = error_of(capsys, status)
    assert f"started from stage 'all' with weights {started[:12]}…" in error
    assert f"holds stage 'all' with weights {other[:12]}…" in error
    assert "started from stage 'all'" in error_of(capsys, world.run("fit", "--run_dir", first))
    world.fit(first, f"--stage.init_from={trained / 'hf'}")


def test_a_stage_without_the_parent_it_names_is_refused(world, tmp_path, capsys):
    status = world.run("fit", "--run_dir", tmp_path / "run", "--stage.parent=first")
    error = error_of(capsys, status)
    assert (
        "stage 'all' starts from the end of stage 'first', but stage.init_from is null: set it to the hf folder"
        in error
    )
    assert not (tmp_path / "run").exists()


class Bomb:
    """What `torch.load` would run without `weights_only`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_that_would_run_code_is_not_read(world, trained, tmp_path, capsys, command):
    state = torch.load(trained / LAST, weights_only=True)
    torch.save({**state, "bomb": Bomb(str(tmp_path / "ran"))}, tmp_path / "bad.ckpt")
    status = world.run(command, "--run_dir", tmp_path / "run", f"--ckpt_path={tmp_path / 'bad.ckpt'}")
    assert "bad.ckpt holds more than tensors and plain types" in error_of(capsys, status)
    assert not (tmp_path / "ran").exists()


def test_a_world_that_does_not_fit_the_batch_is_refused(world, tmp_path, capsys):
    status = world.run("fit", "--run_dir", tmp_path / "run", "--stage.global_batch_size=5")
    assert "stage.global_batch_size=5 is not a multiple of data batch_size 2 x 1 devices" in error_of(capsys, status)
