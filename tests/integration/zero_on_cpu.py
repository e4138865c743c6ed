"""DeepSpeed's ZeRO without CUDA, on gloo: the strategies that the tests' runs name, and whether they can run.

`.ci/run` installs deepspeed into a folder of its own, because transformers and lightning behave in another way where
they find it; only the processes of these tests have that folder on their path.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from alignvlm_pl.strategies.zero import ZeroStrategy

FOLDER = Path(sys.prefix) / "deepspeed"
IMPORTABLE = find_spec("deepspeed") is not None
"""By this process too, not only by those that are started with the folder on their path."""
INSTALLED = IMPORTABLE or (FOLDER / "deepspeed").is_dir()
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed")


@contextmanager
def deepspeed_on_path() -> Iterator[None]:
    """Have processes that are started within find deepspeed, and have it take CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        paths = [os.environ.get("PYTHONPATH"), str(FOLDER) if FOLDER.is_dir() else None]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


class ZeroOnCPU(ZeroStrategy):
    """Lightning's and DeepSpeed's ways of asking for CUDA are replaced, nothing that computes."""

    def __init__(self, stage: int = 2, whole_below: int = 0) -> None:
        super().__init__(stage, whole_below)
        self._process_group_backend = "gloo"

    @property
    def root_device(self) -> torch.device:
        """The CPU, with an index as DeepSpeed needs."""
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        """As Lightning, without asking for CUDA."""
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # an extension that it would compile first
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Zero3OnCPU(ZeroOnCPU):
    """Stage 3."""

    def __init__(self) -> None:
        super().__init__(stage=3)
