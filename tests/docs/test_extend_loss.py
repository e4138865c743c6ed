"""docs/extend/loss.md, its classes trained on the tiny model."""

import re
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import write_set

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "loss.md"


@pytest.fixture
def losses(tmp_path, monkeypatch):
    """The page's classes by name, with a dataset of eight samples in the working directory."""
    write_set(tmp_path / "train", 8, samples_per_shard=4)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "losses"}
    exec(
        compile("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)), str(PAGE), "exec"),
        names,
    )
    return names


def trained(kind, *, batch_size, **options):
    """The connector's weights after two steps of two samples, and the logged values."""
    import lightning.pytorch as pl

    from alignvlm_pl.models.tiny import tiny_spec
    from alignvlm_pl.training.stage import Stage
    from datamodules import DocDownstreamDataModule

    pl.seed_everything(0, verbose=False)
    module = kind(spec=tiny_spec("tokenizer"), **options)
    # Not AdamW, which makes of a difference in the last digit of a gradient one as large as the learning rate.
    sgd = {"class_path": "torch.optim.SGD"}
    stage = Stage(name="hand", lr_connector=0.5, gradient_clip_norm=None, schedule="constant", optimizer=sgd)
    module.begin_stage(stage)
    data = DocDownstreamDataModule(train=["train"], batch_size=batch_size, num_workers=0, shuffle_buffer=0)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", accumulate_grad_batches=2 // batch_size, log_every_n_steps=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    weights = torch.cat([value.flatten() for value in module.net.connector.parameters()])
    return weights.detach(), {name: float(value) for name, value in trainer.logged_metrics.items()}


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec",
    "ignore:You defined a",
    "ignore:Total length of",
)
@pytest.mark.parametrize(("name", "option"), [("NearStart", "distance_weight"), ("Smoothed", "smoothing")])
def test_a_loss_of_the_page_trains_the_same_however_a_step_is_cut(losses, name, option):
    from alignvlm_pl.training.module import AlignVLMModule

    whole, logged = trained(losses[name], batch_size=2, **{option: 0.5})
    cut, logged_cut = trained(losses[name], batch_size=1, **{option: 0.5})
    torch.testing.assert_close(whole, cut, rtol=1e-4, atol=1e-6)
    assert logged_cut["train/loss"] == pytest.approx(logged["train/loss"], rel=1e-5)
    plain, without = trained(AlignVLMModule, batch_size=2)
    assert not torch.equal(plain, whole), "the option does something"
    if name == "NearStart":
        assert logged["train/distance"] > 0
        assert logged["train/loss"] == pytest.approx(without["train/loss"], rel=1e-2)
    off, _ = trained(losses[name], batch_size=2, **{option: 0.0})
    torch.testing.assert_close(off, plain, rtol=1e-4, atol=1e-6)
