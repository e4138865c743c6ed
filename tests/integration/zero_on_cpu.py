"""DeepSpeed's ZeRO without CUDA, on gloo: for tests, and named by their cluster files."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported

import torch
from lightning.pytorch.plugins.environments import ClusterEnvironment

from alignvlm_pl.zero import ZeroStrategy


class ZeroOnCPU(ZeroStrategy):
    """Lightning and DeepSpeed's constructor want CUDA; nothing that computes is replaced."""

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
        assert isinstance(self.cluster_environment, ClusterEnvironment)
        self.set_world_ranks()
        self._init_deepspeed_distributed()
