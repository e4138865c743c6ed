"""`fit`, `validate`, `test` and `predict` through the real command line on a tiny random model and tiny shards."""

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alignvlm_pl.training.stage import PARTS

FREEZE_TABLES = [
    ({"vision": 1e-3, "connector": 1e-3, "llm": 1e-3}, {"vision_tower", "connector", "language_model"}),
    ({"vision": None, "connector": 1e-3, "llm": 1e-3}, {"connector", "language_model"}),
    ({"vision": None, "connector": 1e-3, "llm": None}, {"connector"}),
    ({"vision": 1e-3, "connector": None, "llm": 0.0}, {"vision_tower"}),
]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


def part_weights(state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in state.items() if part in name}
    assert found, f"no weights of {part} among {list(state)[:5]}"
    return found


def losses(folder: Path, name: str = "train/loss") -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def rates(values: dict[str, float | None]) -> list[str]:
    return [f"--stage.lr_{part}={'null' if rate is None else rate}" for part, rate in values.items()]


@pytest.fixture(scope="session")
def trained(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert world.run("fit", "--run_dir", folder, "--benchmark.subset=3") == 0
    return folder


def test_fit_leaves_config_checkpoint_events_predictions_and_weights(trained):
    left = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    expected = {
        "config.yaml",
        "checkpoints/last.ckpt",
        "hf/stage.json",
        "hf/model.safetensors",
        "hf/config.json",
    }
    expected |= {"predictions/held-step000003.jsonl", "predictions/images/held/held-00000000.png"}
    assert expected <= left
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["last.ckpt", "step00000003.ckpt"]
    assert (trained / "checkpoints/last.ckpt").resolve() == trained / "checkpoints/step00000003.ckpt"
    assert len((trained / "predictions/held-step000003.jsonl").read_text().splitlines()) == 3
    record = json.loads((trained / "hf/stage.json").read_text())
    assert (record["stage"], record["steps"], record["parent"]) == ("all", 3, None)
    # Written last: its record says that the stage is finished.
    written = (trained / "hf/stage.json").stat().st_mtime_ns
    assert written >= (trained / "checkpoints/last.ckpt").stat().st_mtime_ns
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["stage"]["max_steps"] == 3
    assert config["trainer"]["max_steps"] == -1, "derived values are not saved, or the config could not be used again"


def test_the_table_of_parts_is_printed_once_and_logged(world, tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = [
        "--stage.max_steps=1",
        "--stage.lr_vision=null",
        "--stage.lr_llm=2e-3",
        "--stage.weight_decay=0.1",
    ]
    folder = world.fit(tmp_path / "run", *options)
    events = EventAccumulator(str(folder))
    events.Reload()
    (logged,) = events.Tensors("stage/text_summary")
    text = logged.tensor_proto.string_val[0].decode()
    for told in (text, caplog.text):
        assert told.count("stage all: objective answer, 1 steps, global batch 4") == 1
        assert re.search(r"part +parameters +trainable +lr +weight decay", told)
        assert re.search(r"vision +36,512 +0 +frozen +-", told)
        assert re.search(r"llm +90,624 +90,624 +0\.002 +0, 0\.1", told)


def test_fit_logs_the_loss_of_each_source_and_the_health_of_the_data(trained):
    assert losses(trained, "train/loss/made")[0] == pytest.approx(losses(trained)[0], rel=0.2)
    assert len(losses(trained, "train/loss/made")) == 3
    assert all(0 < share < 1 for share in losses(trained, "data/padding_share"))
    assert losses(trained, "data/truncated_share") == [0, 0, 0]
    assert all(tokens > 4 * 16 for tokens in losses(trained, "data/real_tokens"))


def test_saved_config_scores_the_checkpoint_and_the_exported_weights_alike(trained, tmp_path):
    from alignvlm_pl.cli import main

    config = ["--config", str(trained / "config.yaml")]
    sources = {
        "checkpoint": ["test", *config, f"--ckpt_path={trained / 'checkpoints/last.ckpt'}"],
        "weights": ["test", *config, f"--model.weights={trained / 'hf'}"],
        "validate": ["validate", *config, f"--model.weights={trained / 'hf'}"],
        "untrained": ["test", *config],
    }
    results = {}
    for name, options in sources.items():
        assert main([*options, "--run_dir", str(tmp_path / name)]) == 0
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert results["checkpoint"] == results["weights"] == results["validate"]
    assert results["checkpoint"]["benchmarks"]["held"]["num"] == 5
    assert 0 < results["checkpoint"]["loss"]["held"] < results["untrained"]["loss"]["held"]
    assert len((tmp_path / "checkpoint/predictions/held.jsonl").read_text().splitlines()) == 5
    assert yaml.safe_load((trained / "config.yaml").read_text())["ckpt_path"] is None, "test overwrote fit's config"


def test_scoring_without_weights_is_said_aloud(world, tmp_path, caplog):
    assert world.run("test", "--run_dir", tmp_path / "run") == 0
    assert "neither --ckpt_path nor --model.weights is given, so the model answers untrained" in caplog.text


def test_predict_answers_every_sample_as_test_does(world, trained, tmp_path):
    options = ["--model.weights", trained / "hf"]
    assert world.run("predict", *options, "--run_dir", tmp_path / "predict") == 0
    assert world.run("test", *options, "--run_dir", tmp_path / "test") == 0
    files = [tmp_path / name / "predictions/held.jsonl" for name in ("predict", "test")]
    predicted, tested = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [(r["key"], r["prediction"]) for r in predicted] == [(r["key"], r["prediction"]) for r in tested]
    assert len(predicted) == 5


def test_loss_falls_on_one_batch(world, tmp_path):
    once = ["--stage.max_steps=20", "--trainer.overfit_batches=0", "--trainer.limit_train_batches=2"]
    data = ["--data.init_args.batch_size=4", f"--data.init_args.train=[{world.root / 'held'}]"]
    folder = world.fit(tmp_path / "run", *once, *data, "--stage.lr_llm=3e-3")
    values = losses(folder)
    assert len(values) == 20
    assert all(0 < value < 20 for value in values)
    assert sum(values[-3:]) < 0.6 * sum(values[:3])


@pytest.mark.parametrize(("table", "trained_parts"), FREEZE_TABLES)
def test_one_step_changes_what_the_stage_trains_and_nothing_else(world, tmp_path, caplog, table, trained_parts):
    folder = world.fit(tmp_path / "run", "--stage.max_steps=1", "--trainer.enable_progress_bar=false", *rates(table))
    for part, attribute in PARTS.items():  # gradients that nobody uses would still be computed and averaged
        frozen = re.search(rf"^{part} +[\d,]+ +0 +frozen", caplog.text, flags=re.MULTILINE)
        assert (frozen is None) == (attribute in trained_parts)
    before = untrained_state(world)
    after = weights(folder)
    for part in ("vision_tower", "connector", "language_model"):
        for name, value in part_weights(after, part).items():
            # The gain of an embedding row that no token asks for has no gradient, hence "any" below.
            if part not in trained_parts:
                assert value.numpy().tobytes() == before[name].numpy().tobytes(), name
        changed = [not torch.equal(value, before[name]) for name, value in part_weights(after, part).items()]
        assert (sum(changed) > 0.9 * len(changed)) == (part in trained_parts), part


def untrained_state(world: Any) -> dict[str, torch.Tensor]:
    """State from which a fit with the default seed starts."""
    from lightning.pytorch import seed_everything

    from alignvlm_pl.models.build import Backbone, ModelSpec, build_model, build_processor

    fields = yaml.safe_load((world.root / "model.yaml").read_text())["spec"]
    spec = ModelSpec(**{**fields, "vision": Backbone(**fields["vision"]), "llm": Backbone(**fields["llm"])})
    processor = build_processor(spec)
    seed_everything(0, verbose=False)
    return build_model(spec, processor).state_dict()


def test_accumulation_of_unequal_micro_batches_equals_one_large_batch(world, tmp_path):
    """The loss is a mean over the step's tokens, not over micro batches."""
    folders = [
        world.fit(tmp_path / f"run{size}", "--stage.max_steps=2", f"--data.init_args.batch_size={size}")
        for size in (4, 2, 1)
    ]
    expected, norms = weights(folders[0]), losses(folders[0], "train/gradient_norm")
    for other in folders[1:]:
        # Adam ignores the scale of gradients, so their norm is compared as well. Measured: 2e-7 relative.
        assert losses(other, "train/gradient_norm") == pytest.approx(norms, rel=1e-5)
        for name, value in weights(other).items():
            # Adam's first steps magnify rounding where a gradient is all but zero. Measured: 2e-7, at lr 1e-3.
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_each_step_divides_by_its_own_tokens(world, tmp_path):
    """The same 16 samples at every step and a learning rate of all but zero: the gradient stays the same."""
    rate = dict.fromkeys(("vision", "connector", "llm"), 1e-12)
    options = ["--stage.global_batch_size=16", "--stage.gradient_clip_norm=100"]
    folder = world.fit(tmp_path / "run", *options, *rates(rate))
    norms = losses(folder, "train/gradient_norm")
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)
    assert losses(folder)[0] > 1


def test_the_stage_s_beta2_reaches_the_optimizer(world, tmp_path):
    folder = world.fit(tmp_path / "run", "--stage.max_steps=1", "--stage.adam_beta2=0.5")
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)
    assert {group["betas"] for group in state["optimizer_states"][0]["param_groups"]} == {(0.9, 0.5)}


def recipe(world: Any, folder: Path, **second: Any) -> Path:
    base = yaml.safe_load((world.root / "stage.yaml").read_text())
    folder.mkdir()
    stages = {
        "first": {**base, "name": "first", "lr_llm": None, "max_steps": 2},
        "second": {**base, "name": "second", "parent": "first", "max_steps": 2, **second},
    }
    for name, content in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    entries = [{"stage": f"{name}.yaml"} for name in stages]
    content = {"model": str(world.root / "model.yaml"), "data": str(world.root / "data.yaml")}
    content |= {"trainer": str(world.root / "cpu.yaml"), "stages": entries}
    content |= {"benchmark": {"at_stage_end": False}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def test_recipe_hands_weights_from_stage_to_stage_and_skips_what_is_finished(world, tmp_path, capsys):
    from alignvlm_pl.cli import main

    path = recipe(world, tmp_path / "recipe", lr_vision=None, lr_connector=None, lr_llm=1e-12)
    command = ["fit", "--config", str(path), "--run_dir", str(tmp_path / "run")]
    assert main(command) == 0
    first, second = tmp_path / "run/1-first", tmp_path / "run/2-second"
    records = [json.loads((folder / "hf/stage.json").read_text()) for folder in (first, second)]
    assert records[1]["parent"] == {"stage": "first", "weights_sha256": records[0]["weights_sha256"]}
    # At a learning rate of all but zero, the second stage ends with the weights it started from.
    start, one, two = untrained_state(world), weights(first), weights(second)
    assert any(not torch.equal(value, start[name]) for name, value in one.items())
    assert all(torch.allclose(value, two[name], rtol=0, atol=1e-7) for name, value in one.items())
    capsys.readouterr()
    written = (second / "hf/model.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert capsys.readouterr().out.count("is finished") == 2
    assert (second / "hf/model.safetensors").stat().st_mtime_ns == written


def test_a_stage_begins_when_nothing_of_the_one_before_it_is_left(world, tmp_path, monkeypatch):
    import gc

    from torch.optim.swa_utils import AveragedModel

    from alignvlm_pl.cli import main
    from alignvlm_pl.cli.lightning_cli import AlignCLI

    path = recipe(world, tmp_path / "recipe")
    first = yaml.safe_load((path.parent / "first.yaml").read_text())
    (path.parent / "first.yaml").write_text(yaml.safe_dump({**first, "ema_decay": 0.5}))
    left: list[tuple[weakref.ref, ...]] = []
    run = AlignCLI.run_command.__func__

    def watched(cls, options):
        if cls is not AlignCLI:  # all stages are checked before the first begins
            return run(cls, options)
        assert all(one() is None for stage in left for one in stage)
        assert not any(type(one) is AveragedModel for one in gc.get_objects())
        done = run(cls, options)
        left.append((weakref.ref(done.model.net), weakref.ref(done.trainer.optimizers[0])))
        return done

    monkeypatch.setattr(AlignCLI, "run_command", classmethod(watched))
    assert main(["fit", "--config", str(path), "--run_dir", str(tmp_path)]) == 0
    assert len(left) == 2


def test_a_stage_refuses_a_parent_of_another_name(world, trained, tmp_path, capsys):
    options = ["--stage.parent=first", f"--stage.init_from={trained / 'hf'}", "--run_dir", tmp_path / "run"]
    assert world.run("fit", *options) == 1
    error = capsys.readouterr().err
    assert "written by stage 'all', expected 'first'" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run/hf").exists()


def test_interrupted_stage_resumes_from_its_last_checkpoint_and_ends_at_the_same_step(world, tmp_path, monkeypatch):
    from alignvlm_pl.training.module import AlignVLMModule

    options = ["--stage.max_steps=4", "--checkpoint_every_n_steps=1"]
    whole = world.fit(tmp_path / "whole", *options)
    folder = world.cut(tmp_path / "cut", *options)
    assert not (folder / "hf").exists()
    cut = torch.load(folder / "checkpoints/last.ckpt")
    assert cut["global_step"] == 2
    calls, step = [], AlignVLMModule.training_step
    monkeypatch.setattr(AlignVLMModule, "training_step", lambda self, *batch: calls.append(1) or step(self, *batch))
    world.fit(folder, *options)
    assert len(calls) == 2 * 2, "two steps of two micro batches were left"
    assert json.loads((folder / "hf/stage.json").read_text())["steps"] == 4
    resumed, straight = (torch.load(f / "checkpoints/last.ckpt") for f in (folder, whole))
    assert resumed["lr_schedulers"] == straight["lr_schedulers"]
    assert resumed["optimizer_states"][0]["state"][0]["step"] == 4


def test_freed_memory_is_kept_before_the_first_step_on_a_cpu(world, tmp_path, monkeypatch):
    from alignvlm_pl.training import module

    calls, step = [], module.AlignVLMModule.training_step
    monkeypatch.setattr(module, "keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setattr(
        module.AlignVLMModule, "training_step", lambda self, *batch: calls.append("step") or step(self, *batch)
    )
    world.fit(tmp_path / "run", "--stage.max_steps=1")
    assert calls[:2] == ["kept", "step"] and calls.count("kept") == 1


def test_a_stage_cut_off_before_its_export_exports_without_training(world, tmp_path):
    import shutil

    folder = world.fit(tmp_path / "run", "--stage.max_steps=2")
    before = weights(folder)
    shutil.rmtree(folder / "hf")
    world.fit(folder, "--stage.max_steps=2")
    after = weights(folder)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_read_objective_trains_the_connector_and_reads(world, tmp_path):
    options = [
        "--stage.objective=read",
        *rates({"vision": None, "llm": None}),
        "--benchmark.readout_sets=[held]",
    ]
    assert world.run("fit", "--run_dir", tmp_path / "run", *options) == 0
    assert all(value > 0 for value in losses(tmp_path / "run", "train/readout_loss"))
    records = (tmp_path / "run/predictions/held-step000003.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in records] == [{"key", "prediction", "references", "cer"}] * 5


def test_the_patch_objective_trains_any_connector(world, tmp_path):
    options = ["--stage.objective=patch", *rates({"vision": None, "llm": None}), "--model.spec.connector.type=mlp"]
    folder = world.fit(tmp_path / "run", *options, "--stage.max_steps=20", "--stage.lr_connector=0.01")
    found = losses(folder, "train/patch_loss")
    assert found[-1] < 0.7 * found[0], "1 less the cosine"
    with pytest.raises(KeyError):
        losses(folder)


def test_example_asks_the_exported_folder(trained, tmp_path):
    import runpy

    from PIL import Image

    Image.new("L", (56, 56), 128).save(tmp_path / "page.png")
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples/ask.py"))
    answer = example["ask"](str(trained / "hf"), str(tmp_path / "page.png"), "What is it?")
    assert isinstance(answer, str)
    assert answer == example["ask"](str(trained / "hf"), str(tmp_path / "page.png"), "What is it?")


def test_example_paints_what_the_exported_folder_reads(trained, tmp_path):
    import runpy

    from PIL import Image

    Image.new("L", (112, 56), 128).save(tmp_path / "page.png")
    paint = runpy.run_path(str(Path(__file__).parents[2] / "examples/readout.py"))["paint"]
    for name, mass in (("plain", ()), ("all kept", ("1.01",)), ("collapsed", ("0.001",))):
        paint(str(trained / "hf"), str(tmp_path / "page.png"), str(tmp_path / f"{name}.png"), *mass)
    plain, kept, collapsed = ((tmp_path / f"{name}.png").read_bytes() for name in ("plain", "all kept", "collapsed"))
    assert plain == kept != collapsed
