"""The torchmetrics metric on two uneven ranks, one of them with nothing, equals one process to the last digit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignvlm_pl.benchmarks import get_benchmark
from alignvlm_pl.scoring.metric import BenchmarkMetric

ROOT = Path(__file__).parents[2]
RANK = """
import json, sys
import torch.distributed as dist
from alignvlm_pl.benchmarks import get_benchmark
from alignvlm_pl.scoring.metric import BenchmarkMetric

rank, meeting, records = int(sys.argv[1]), sys.argv[2], json.loads(open(sys.argv[3]).read())
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
for first in (5, 0):  # rank 0 has five answers, then none
    metric = BenchmarkMetric(get_benchmark("chartqa"))
    for record in records[:first] if rank == 0 else records[first:]:
        metric.update([record])
    print(json.dumps([metric.compute(), [record["key"] for record in metric.gather()]]))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_uneven_ranks_equal_one_process(tmp_path):
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
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), meeting, str(path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    single = BenchmarkMetric(get_benchmark("chartqa"))
    single.update(records)
    expected = single.compute()
    assert expected["num"] == 17
    for rank in ranks:
        for line in rank.communicate(timeout=120)[0].splitlines():
            figures, keys = json.loads(line)
            assert figures == expected
            assert keys == [record["key"] for record in records]
        assert rank.returncode == 0
