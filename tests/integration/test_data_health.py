"""What TensorBoard shows of the health of the training data, through the real command line."""

import io
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.shards.writer import ShardWriter


def scalars(run: Path) -> dict[str, float]:
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def write(folder: Path, *, cut: int, unlabelled: int, good: int = 16) -> Path:
    picture, buffer = Image.effect_noise((56, 56), 90), io.BytesIO()
    picture.save(buffer, "JPEG")
    with ShardWriter(folder, name="bad", source="made", license="none", samples_per_shard=5) as out:
        for number in range(good + cut + unlabelled):
            data = buffer.getvalue()
            asked = [{"type": "image", "index": 0}, {"type": "text", "text": "what?"}]
            answer = "" if number >= good + cut else "12"
            messages = [
                {"role": "user", "content": asked},
                *([{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else []),
            ]
            out.add({"messages": messages}, [data[:-300] if good <= number < good + cut else data], ["jpg"])
    return folder


@pytest.mark.slow
def test_skipped_samples_waits_and_shares_are_in_tensorboard(world, tmp_path):
    folder = write(tmp_path / "set", cut=2, unlabelled=1)
    run = world.fit(
        tmp_path / "run",
        f"--data.init_args.train=[{folder}]",
        "--data.init_args.batch_size=1",
        "--data.init_args.shuffle_buffer=8",
        "--data.init_args.max_skipped_share=1.0",
        "--stage.max_steps=5",
        "--stage.global_batch_size=4",
    )
    found = scalars(run)
    # 20 batches are an epoch of 16 good samples and the first four of the next, with or without bad ones between them.
    assert found["data/skipped_undecodable_image"] == found["data/skipped_undecodable_image/made"]
    assert 2 <= found["data/skipped_undecodable_image"] <= 4
    assert 1 <= found["data/skipped_nothing_to_learn"] <= 2
    assert 0 <= found["data/wait_share"] <= 1
    assert found["train/loss/made"] > 0
    assert {"data/padding_share", "data/truncated_share", "data/real_tokens"} <= set(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "setting"),
    [
        ({"cut": 1, "unlabelled": 0}, "max_skipped_share"),
        ({"cut": 0, "unlabelled": 1}, "max_unlabelled_share"),
    ],
)
def test_a_share_above_the_limit_stops_the_run(world, tmp_path, capsys, counts, setting):
    folder = write(tmp_path / "set", **counts)
    options = [f"--data.init_args.train=[{folder}]", f"--data.init_args.{setting}=0.0", "--stage.max_steps=9"]
    assert world.run("fit", "--run_dir", tmp_path / "run", *options) == 1
    assert f"more than the allowed share of 0 ({setting})" in capsys.readouterr().err
