"""Two real processes as two ranks, each with two workers: nothing twice, nothing missing."""

import json
from collections import Counter
from pathlib import Path

import pytest

from datamodules.shards.manifest import load_manifest
from datamodules.shards.writer import ShardWriter
from tests.drills.launch import run_programs

ROOT = Path(__file__).parents[2]

# Runs as a file, because workers import the main module. Rank and world are arguments only.
RANK = """
import json, sys
from types import SimpleNamespace
import torch
from datamodules.loading.collate import Collator
from datamodules.shards.decode import Decoder
from datamodules.loading.eval_batches import EvaluationBatches, plan_evaluation
from datamodules.loading.loader import ShardLoader, TrainBatches
from datamodules.stream.state import first_cursors
from datamodules.shards.decode import SkipCounter
from datamodules.shards.manifest import load_manifest
from datamodules.stream.batching import BatchPlanner
from datamodules.stream.stream import Source, TrainStream


class Processor:
    def encode(self, messages, images, *, max_text_length=None, generation=False):
        return SimpleNamespace(truncated=False, input_ids=[1], num_tiles=0)

    def collate(self, encoded, *, pad_left=False):
        return {"labels": torch.ones(len(encoded), 2)}


def main():
    folder, rank = sys.argv[1], int(sys.argv[2])
    manifest = load_manifest(folder)
    parts = {"decoder": Decoder(), "collator": Collator(processor=Processor())}
    stream = TrainStream(sources=(Source(name="set", manifests=(manifest,)),), seed="1", buffer=4)
    batches = TrainBatches(
        stream=stream,
        planner=BatchPlanner(batch_size=3),
        cursor=first_cursors(2)[rank],
        counter=SkipCounter(max_share=0.0),
        **parts,
    )
    train = ShardLoader(batches, num_batches=4, num_workers=2)
    epochs = [[key for batch in train for key in batch["keys"]] for _ in range(2)]
    train.close()
    plan = plan_evaluation(range(manifest.num_samples), batch_size=4, rank=rank, world_size=2)
    held = EvaluationBatches(manifest=manifest, dataset="set", plan=plan, **parts)
    held = ShardLoader(held, num_batches=len(plan), num_workers=0)
    scored = [key for batch in held if not batch["filler"] for key in batch["keys"]]
    print(json.dumps({"epochs": epochs, "scored": scored, "num_scored_batches": len(plan)}))


if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_two_processes_with_two_workers_share_every_epoch(tmp_path):
    turn = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    with ShardWriter(tmp_path / "set", name="set", source="made", license="CC0-1.0", samples_per_shard=3) as out:
        for _ in range(24):
            out.add({"messages": [turn]}, [], [])
    expected = Counter(f"set-{number:08d}" for number in range(load_manifest(tmp_path / "set").num_samples))
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    outputs = run_programs(*[[script, tmp_path / "set", rank] for rank in range(2)])
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    for epoch in range(2):
        assert sum((Counter(result["epochs"][epoch]) for result in results), Counter()) == expected
    assert results[0]["epochs"][0] != results[0]["epochs"][1]
    assert sum((Counter(result["scored"]) for result in results), Counter()) == expected
    assert results[0]["num_scored_batches"] == results[1]["num_scored_batches"]
