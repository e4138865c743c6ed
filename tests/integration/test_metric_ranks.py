"""Records of several uneven ranks, some with nothing, give the scores of one process to the last digit."""

import json
from pathlib import Path

import pytest

from alignvlm_pl.benchmarks import get_benchmark
from alignvlm_pl.scoring.records import to_samples
from alignvlm_pl.scoring.run import score_samples
from callbacks.benchmark_evaluation import gather_records
from tests.drills.launch import run_programs

ROOT = Path(__file__).parents[2]
RANK = """
import json, sys
import torch.distributed as dist
from callbacks.benchmark_evaluation import gather_records

rank, world_size, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
records = json.loads(open(sys.argv[4]).read())
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
for first in (5, 0):  # rank 0 has five records, then none; the last rank has the rest; others have none
    own = records[:first] if rank == 0 else records[first:] if rank == world_size - 1 else []
    print(json.dumps(gather_records({"chartqa": own} if own else {}, ["chartqa", "none"])))
dist.barrier()
dist.destroy_process_group()
"""


def scores(records):
    scored = score_samples(get_benchmark("chartqa"), to_samples(records))
    return scored.num, scored.metrics, scored.intervals


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_uneven_ranks_equal_one_process(tmp_path, world_size):
    records = [
        {
            "key": f"k{n:02d}",
            "question": "ü?",
            "prediction": str(n % 7 / 3),
            "references": [str(n % 5 / 3)],
            "meta": {"split": "human" if n % 3 else "augmented"},
        }
        for n in range(17)
    ]
    path, script = tmp_path / "records.json", tmp_path / "rank.py"
    path.write_text(json.dumps(records))
    script.write_text(RANK)
    meeting = (tmp_path / "meeting").as_uri()
    programs = [[script, rank, world_size, meeting, path] for rank in range(world_size)]
    single = gather_records({"chartqa": records[::-1]}, ["chartqa"])["chartqa"]
    assert single == records
    for output in run_programs(*programs):
        lines = [line for line in output.splitlines() if line.startswith("{")]
        assert len(lines) == 2
        for line in lines:
            found = json.loads(line)
            assert found["none"] == []
            assert found["chartqa"] == records
            assert scores(found["chartqa"]) == scores(single)
