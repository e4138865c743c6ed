"""The real command line in a process of its own, which starts the other ranks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RANKS = "LOCAL_RANK NODE_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT PL_GLOBAL_SEED".split()
"""Variables by which a process takes itself for one of several ranks."""


def cli(*options: Any) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in RANKS}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr
