"""DeepSpeed's ZeRO on two CPU processes (gloo) against one process; skipped where deepspeed is not installed."""

import importlib.util
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this file is also run by itself

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def main(folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import lightning.pytorch as pl
    import torch.distributed as dist
    from torch.utils.data import DataLoader

    from alignvlm_pl.models.tiny import tiny_spec
    from alignvlm_pl.module import AlignVLMModule
    from alignvlm_pl.stages import Stage
    from alignvlm_pl.zero import ZeroStrategy
    from tests.integration.test_strategies import STAGES, TWICE, batches

    # An extension that DeepSpeed would compile first.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None

    class OnCPU(ZeroStrategy):
        """Lightning wants CUDA."""

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", 0)

        def setup_environment(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    rank = int(os.environ["LOCAL_RANK"])
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", rank=rank, world_size=2)

    def fit(name: str, *, accumulate: int = 1, save: Path | None = None, resume: Path | None = None) -> Any:
        settings, tied = STAGES[name]
        module = AlignVLMModule(
            spec=tiny_spec(folder / f"tokenizer-{rank}", tied=tied), weights=str(folder / f"start-{tied}")
        )
        module.begin_stage(Stage(name=name, **settings, schedule="constant", warmup_share=0.0))
        data = batches(module, TWICE, rank=rank, ranks=2)
        losses = []

        class Told(pl.Callback):
            def on_train_batch_end(
                self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
            ) -> None:
                sums = torch.stack(
                    [outputs["document_loss_sums"].sum(), outputs["document_supervised"].sum()]
                )
                total, count = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
                losses.append(total / count)
                if save is not None and trainer.global_step == 2:
                    trainer.save_checkpoint(save)

        strategy = OnCPU()
        strategy._process_group_backend = "gloo"
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_epochs=1,
            gradient_clip_val=0.5,
            accumulate_grad_batches=accumulate,
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[Told()],
        )
        trainer.fit(
            module, DataLoader(data, batch_size=None), ckpt_path=None if resume is None else str(resume)
        )
        return {"losses": losses, "state": {k: v.clone() for k, v in module.net.state_dict().items()}}

    found = {name: fit(name) for name in STAGES}
    found["accumulated"] = fit("all", accumulate=2)
    fit("no vision", save=folder / "zero.ckpt")
    found["resumed"] = fit("no vision", resume=folder / "zero.ckpt")
    torch.save(found, folder / f"zero-{rank}.pt")
    dist.barrier()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
def test_two_ranks_train_as_one_and_a_resumed_run_as_an_unbroken_one(tmp_path):
    import tests.integration.test_strategies as strategies

    strategies.write_starts(tmp_path)
    expected = strategies.launch("twice", tmp_path, ranks=1)[0]
    found = strategies.launch("zero", tmp_path, ranks=2, script=__file__)
    for rank in found:
        for name in (*strategies.STAGES, "accumulated"):
            assert rank[name]["losses"] == pytest.approx(expected[name]["losses"], rel=5e-7)
            for key, value in expected[name]["state"].items():
                if not key.endswith("k_proj.bias"):
                    # Float32 in another order of additions. Measured worst case: 2e-6.
                    torch.testing.assert_close(rank[name]["state"][key], value, rtol=0, atol=7e-6, msg=key)
        unbroken, resumed = rank["no vision"], rank["resumed"]
        assert resumed["losses"] == unbroken["losses"][2:]
        assert all(torch.equal(resumed["state"][key], value) for key, value in unbroken["state"].items())


@pytest.mark.skipif(HAS_DEEPSPEED, reason="deepspeed is installed")
def test_without_deepspeed_its_cluster_file_says_what_to_install(world, tmp_path, capsys):
    file = tmp_path / "zero2.yaml"
    shipped = yaml.safe_load((ROOT / "configs/cluster/zero2.yaml").read_text())
    file.write_text(yaml.safe_dump({**shipped, "accelerator": "cpu", "devices": 1}))
    assert world.run("fit", "--trainer", file, "--run_dir", tmp_path / "run") == 1
    told = capsys.readouterr().err
    assert (
        "ZeRO needs the package deepspeed: pip install 'deepspeed>=0.19'; configs/cluster/fsdp.yaml" in told
    )
    assert "Traceback" not in told


if __name__ == "__main__":
    main(Path(sys.argv[2]))
