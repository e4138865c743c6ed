"""The module without the command line: mappings as in YAML, a missing stage, a Trainer that differs from the stage."""

from dataclasses import asdict

import lightning.pytorch as pl
import pytest
import torch

from alignvlm_pl.errors import CheckpointError, ConfigError
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.training.module import AlignVLMModule, differences_from_stage
from alignvlm_pl.training.stage import Stage
from datamodules.loading.steps import with_steps


def test_the_spec_may_be_a_mapping(tmp_path):
    spec = tiny_spec(tmp_path)
    module = AlignVLMModule(asdict(spec))
    assert module.spec == spec
    assert module.processor.tokens_per_tile == 16


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_what_is_not_there_yet_is_named(tmp_path):
    module = AlignVLMModule(tiny_spec(tmp_path))
    with pytest.raises(ConfigError, match=r"not built yet: call configure_model\(\)"):
        module.net  # noqa: B018
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"fit needs a stage.*begin_stage\(Stage"):
        trainer.fit(module, train_dataloaders=[{}])


def test_values_of_the_stage_that_the_trainer_overrules_are_named():
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False)
    stage = Stage(name="hand", lr_connector=1e-3, max_steps=5, gradient_clip_norm=0.5)
    assert differences_from_stage(trainer, stage) == [
        "stage.gradient_clip_norm=0.5 has no effect: the Trainer has gradient_clip_val=None, which counts",
        "stage.max_steps=5 has no effect: the Trainer has max_steps=3, which counts",
    ]


def test_a_checkpoint_without_its_spec_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"old\.ckpt holds no spec of its model; give spec="):
        AlignVLMModule.load_from_checkpoint(tmp_path / "old.ckpt")


class Loop:
    """What the module asks its Trainer about a run on one rank: five micro batches, two of a step."""

    accumulate_grad_batches, world_size, num_training_batches = 2, 1, 5

    class strategy:
        reduce = staticmethod(lambda value, reduce_op: value)


def micro_batches():
    counts = (1, 3, 5, 7, 4)
    return [{"num_supervised": n, "lines": [], "sizes": [], "tiles": []} for n in counts]


@pytest.mark.parametrize(
    ("handed_over", "weights"),
    [
        # Lightning halves each loss. Whole steps: 1 / tokens of the step; the last one, of one micro batch, too.
        (lambda found: with_steps(found, 2), [2 / 4, 2 / 4, 2 / 12, 2 / 12, 2 / 4]),
        # Less than a step at a time: the mean of the means. The last step is one micro batch, so it is whole.
        (lambda found: with_steps(found, 1), [1 / 1, 1 / 3, 1 / 5, 1 / 7, 2 / 4]),
        (iter, [1 / 1, 1 / 3, 1 / 5, 1 / 7, 2 / 4]),
    ],
    ids=["steps", "single", "plain"],
)
def test_what_a_loss_sum_is_divided_by(tmp_path, handed_over, weights):
    module = AlignVLMModule(tiny_spec(tmp_path)).begin_stage(Stage(name="hand", lr_connector=1e-3))
    loop = Loop()  # held here: the module refers to it weakly
    module.trainer = loop
    found = [
        1 / float(module._step_normaliser(batch, index)) for index, batch in enumerate(handed_over(micro_batches()))
    ]
    assert found == pytest.approx(weights)


def test_batches_of_other_loaders_are_counted_by_their_labels(tmp_path):
    module = AlignVLMModule(tiny_spec(tmp_path)).begin_stage(Stage(name="hand", lr_connector=1e-3))
    labels = torch.tensor([[5, -100, 3, 4], [-100, -100, 2, -100]])
    assert module._num_supervised({"labels": labels}) == 3, "no position predicts the first label"


def test_test_runs_the_validation_of_a_subclass():
    class Counting(AlignVLMModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return {"num_supervised": batch}

        def on_validation_epoch_end(self):
            ended.append(True)

    ended: list[bool] = []
    module = Counting.__new__(Counting)
    assert module.test_step(5, 0) == {"num_supervised": 5}
    module.on_test_epoch_end()
    assert ended == [True]
