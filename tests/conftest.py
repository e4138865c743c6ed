"""What every test gets: fixed seeds, one thread, no network, and the working directory it started with."""

import gc
import os
import random
import sys
from collections.abc import Iterator

import pytest

# Two cores: more threads than that in small operations only wait for each other. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Hugging Face loaders fail at once instead of asking a server.
os.environ["HF_HUB_OFFLINE"] = "1"

# A Trainer leaves them in its process; another one would find a port that is taken, or a rank or seed not its own.
_OF_RANKS = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
    "NODE_RANK",
    "LOCAL_RANK",
    "RANK",
    "GROUP_RANK",
    "PL_GLOBAL_SEED",
)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Seed the generators; torch and numpy only where a test module has imported them already."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    folder = os.getcwd()
    ranks = {name: os.environ[name] for name in _OF_RANKS if name in os.environ}
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        dtype = torch.get_default_dtype()
        yield
        torch.set_default_dtype(dtype)
    else:
        yield
    # A Trainer with a strategy for several ranks leaves its group; a later one would take itself for one of them.
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()
    os.chdir(folder)
    for name in _OF_RANKS:
        os.environ.pop(name, None)
    os.environ.update(ranks)


def pytest_collection_finish() -> None:
    """Keep what the test modules have imported out of garbage collections: of these a run of `fit` makes several."""
    gc.collect()
    gc.freeze()


# A minute and more each, much of it waiting: first, so that no process is left alone with one of them in the end.
_LONGEST = """
test_slurm test_study test_preemption test_strategies test_demo test_stage_kills test_fit_tiny test_collapsed_runs
test_box_model test_evenness test_read_command test_checkpoint_contents test_damage
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests; skip `gpu` tests where there is no CUDA device."""
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
