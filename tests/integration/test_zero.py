"""DeepSpeed's ZeRO on two CPU processes (gloo) against one process; skipped where deepspeed is not installed."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this file is also run by itself

import importlib.util
HAS_DEEPSPEED = importlib.util.find_spec('deepspeed') is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
WHOLE = 10_000
"""Parameters of so many elements stay whole: some of the tiny model's."""




def main(kind: str, folder: Path) -> None:
    from functools import partial

    import tests.integration.test_strategies as strategies
    from tests.integration.zero_on_cpu import ZeroOnCPU

    torch.manual_seed(0)
    stage = int(kind.removeprefix("zero"))

    def fit(name: str, *, whole_below: int = 0, steps: Any = strategies.STEPS, **options: Any) -> Any:
        strategy = ZeroOnCPU(stage, whole_below)
        return strategies.fit(folder, kind, name, steps=steps, strategy=strategy, **options)

    found = {name: fit(name) for name in strategies.STAGES}
    twice = partial(fit, "no vision", steps=strategies.TWICE)
    found["unbroken"] = twice(save=folder / f"{kind}.ckpt")
    found["resumed"] = twice(resume=folder / f"{kind}.ckpt")
    torch.save(found, folder / f"{kind}-{os.environ['LOCAL_RANK']}.pt")
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
