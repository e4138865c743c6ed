"""The connector's start and health in real runs: the calibrated gain, what is logged, resume, two ranks."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.drills.launch import run_program

ROOT = Path(__file__).parents[2]
GAIN = "connector.norm2.weight"


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    if name not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.value for event in events.Scalars(name)}


def image_tags(folder: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags: list[str] = events.Tags()["images"]
    return tags


@pytest.mark.slow
def test_a_fresh_stage_starts_at_the_entropy_and_a_resumed_one_is_left_alone(world, tmp_path, caplog):
    options = ["--stage.calibrate.target_entropy=2.5", "--connector_health.every_n_steps=2"]
    caplog.set_level("INFO")
    fresh = world.fit(tmp_path / "fresh", *options, "--stage.max_steps=2")
    record = json.loads((fresh / "hf/stage.json").read_text())["calibration"]
    assert record["target_entropy"] == 2.5
    assert record["entropy_before"] > 4.0  # of ln 259 = 5.557
    assert record["entropy"] == pytest.approx(2.5, abs=1e-3)
    assert record["gain"] == pytest.approx(record["gain_factor"], rel=1e-5)  # gain_init is 1
    assert caplog.text.count("calibrated: gain x") == 1
    assert "connector before the first step: entropy 2." in caplog.text
    gain = load_file(fresh / "hf/model.safetensors")[GAIN]
    assert float(gain.mean()) == pytest.approx(record["gain"], abs=5e-3)  # two steps at 1e-3 later
    entropy = scalars(fresh, "connector/entropy")
    assert set(entropy) == {0, 2}
    assert entropy[0] == pytest.approx(2.5, abs=2e-3)  # the batch has fewer tokens than either takes
    assert scalars(fresh, "connector/effective_vocabulary")[0] == pytest.approx(2.71828 ** entropy[0], rel=1e-3)
    assert -1 <= scalars(fresh, "connector/token_cosine")[2] <= 1
    assert 0 < scalars(fresh, "connector/max_weight")[2] <= 1

    caplog.clear()
    plain = world.fit(tmp_path / "plain", "--stage.max_steps=1")
    late = world.fit(tmp_path / "late", *options, "--stage.max_steps=2", "--ckpt_path", plain / "checkpoints/last.ckpt")
    assert "calibrated" not in caplog.text
    assert "calibration" not in json.loads((late / "hf/stage.json").read_text())
    resumed = world.fit(
        tmp_path / "resumed", *options, "--stage.max_steps=3", "--ckpt_path", fresh / "checkpoints/last.ckpt"
    )
    assert "calibrated" not in caplog.text
    assert json.loads((resumed / "hf/stage.json").read_text())["calibration"] == record
    assert float(load_file(resumed / "hf/model.safetensors")[GAIN].mean()) == pytest.approx(record["gain"], abs=5e-3)


@pytest.mark.slow
def test_without_p_vocab_there_is_the_cosine_and_no_calibration(world, tmp_path, caplog, capsys):
    mlp = '--model.spec.connector={"type": "mlp"}'
    health = ["--connector_health.every_n_steps=null", "--connector_health.page_every_n_steps=1"]
    folder = world.fit(tmp_path / "mlp", mlp, "--stage.max_steps=1", *health, "--benchmark.at_stage_end=true")
    assert list(folder.rglob("images/held/*.png"))
    assert not list(folder.rglob("*.readout.png"))
    assert not any("readout" in tag or tag == "connector/page" for tag in image_tags(folder))
    assert set(scalars(folder, "connector/token_cosine")) == {0}
    assert scalars(folder, "connector/entropy") == {}
    assert "calibration" not in json.loads((folder / "hf/stage.json").read_text())
    for number, (options, message) in enumerate(
        [
            ([mlp, "--stage.calibrate.target_entropy=2"], "connector 'mlp' has no P_vocab"),
            (["--stage.calibrate.target_entropy=6"], "between 0 and 5.557 nats"),
            (
                ["--stage.calibrate.target_entropi=2"],
                "stage.calibrate has no setting 'target_entropi'; did you mean",
            ),
            (["--connector_health.tokens=1"], "connector_health.tokens=1: expected at least 2"),
            (
                ["--connector_health.every_n_steps=0"],
                "connector_health.every_n_steps=0: expected at least 1, or null",
            ),
            (["--connector_health.page_every_n_steps=0"], "connector_health.page_every_n_steps=0: expected at least 1"),
        ]
    ):
        assert world.run("fit", "--run_dir", tmp_path / str(number), *options) == 1
        assert message in capsys.readouterr().err + caplog.text


def main(folder: Path) -> None:
    """One step: rank 0 has text alone, rank 1 an image; or neither has one."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from alignvlm_pl.models.tiny import tiny_spec
    from alignvlm_pl.training.module import AlignVLMModule
    from alignvlm_pl.training.stage import Stage
    from callbacks import ConnectorHealth, GainCalibration
    from datamodules.loading.collate import Collator
    from datamodules.shards.sample import Sample

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.manual_seed(0)
    module = AlignVLMModule(spec=tiny_spec(folder / f"tokenizer-{rank}"))
    collator = Collator(processor=module.processor)

    def batch(*, pictured: bool) -> Any:
        content: list[dict[str, Any]] = [{"type": "image", "index": 0}] * pictured + [{"type": "text", "text": "?"}]
        answered = {"role": "assistant", "content": [{"type": "text", "text": "ab"}]}
        sample = Sample(
            key="0",
            source="made",
            task="vqa",
            messages=[{"role": "user", "content": content}, answered],
            images=[Image.effect_noise((56, 56), 80).convert("RGB")] * pictured,
            references=[],
            lines=[],
            sizes=[(56, 56)] * pictured,
        )
        return collator.collate([collator.encode(sample)])

    logged: dict[int, list[str]] = {}

    class Kept(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            logged.setdefault(step or 0, []).extend(name for name in metrics if name.startswith("connector/"))

    stage = Stage(name="all", lr_vision=1e-3, lr_connector=1e-3, lr_llm=1e-3, calibrate={"target_entropy": 2.0})
    module.begin_stage(stage)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        use_distributed_sampler=False,
        logger=Kept(folder),
        callbacks=[GainCalibration(2.0), ConnectorHealth(every_n_steps=1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    batches = [batch(pictured=False), batch(pictured=rank == 1)]
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    torch.save((module.calibration, logged, module.net.connector.state_dict()), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_ranks_wait_for_an_image_and_take_the_gain_of_the_one_that_has_it(tmp_path):
    run_program(__file__, tmp_path, ranks=2)
    (found, logged, state), (other, _, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert found == other
    assert found["tokens"] == 16
    assert found["entropy"] == pytest.approx(2.0, abs=1e-3)
    assert all(torch.equal(state[name], others[name]) for name in state)
    # Nothing at step 0, where there was no image; before the second step and after it, with rank 1's tokens.
    assert not logged.get(0)
    assert logged[1].count("connector/entropy") == 1
    assert logged[2].count("connector/token_cosine") == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
