"""The module without the command line: mappings as in YAML, a missing stage, a Trainer that differs from the stage."""

import io
from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from torch.utils.data import DataLoader

from alignvlm_pl.errors import CheckpointError, ConfigError
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.preprocessing.batch import with_steps
from alignvlm_pl.training.module import AlignVLMModule, differences_from_stage
from alignvlm_pl.training.stage import Stage


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


SPEC = {"vision": {"pretrained": "v"}, "llm": {"pretrained": "l"}}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"checkpoint_path": io.BytesIO()}, ConfigError, "load_from_checkpoint: 'BytesIO' is no path; give that of a"),
        ({"checkpoint_path": None}, ConfigError, "load_from_checkpoint: 'NoneType' is no path"),
        ({"checkpoint_path": "https://h/a.ckpt"}, ConfigError, "'https://h/a.ckpt' is no path; give that of a file on"),
        ({"checkpoint_path": "file:///a.ckpt"}, ConfigError, "'file:///a.ckpt' is no path"),
        ({"foo": 1}, ConfigError, "load_from_checkpoint: unknown argument 'foo'; known: activation_checkpointing, at"),
        ({"atention": "sdpa"}, ConfigError, "unknown argument 'atention'; did you mean 'attention'"),
        ({"spec": {"x": 1}}, ConfigError, "spec has no field 'x'; known: chat_template, connector, llm, spell_answers"),
        ({"spec": {**SPEC, "llm": {"x": 1}}}, ConfigError, "spec.llm has no field 'x'; known: config, pretrained, to"),
        ({"spec": {"llm": {}}}, ConfigError, "spec lacks the field 'vision' of ModelSpec; add it"),
        ({"spec": 5}, ConfigError, "spec is of type int, expected a ModelSpec or a mapping of its fields"),
        ({"spec": None}, ConfigError, "spec is of type NoneType"),
        ({"checkpoint_path": "empty"}, CheckpointError, r"empty is damaged or no checkpoint \(empty, cut off or of an"),
        (
            {"checkpoint_path": "cut"},
            CheckpointError,
            r"cut is damaged or no checkpoint \(empty, cut off or of an",
        ),
        ({"checkpoint_path": "absent"}, CheckpointError, "absent: there is no such file"),
        ({"checkpoint_path": "list"}, CheckpointError, r"list is damaged or no checkpoint \(it holds a list\)"),
        ({"checkpoint_path": "spec"}, ConfigError, "spec is of type int, expected a ModelSpec"),
    ],
)
def test_what_a_checkpoint_is_not_loaded_from_is_named(tmp_path, monkeypatch, change, error, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "spec": SPEC}, "good")
    torch.save({"state_dict": {}, "spec": 5}, "spec")
    torch.save([1], "list")
    Path("empty").touch()
    Path("cut").write_bytes(Path("good").read_bytes()[:200])
    for given in (change, {"spec": SPEC, **change}) if "spec" not in str(change) else (change,):
        with pytest.raises(error, match=message):
            AlignVLMModule.load_from_checkpoint(**{"checkpoint_path": "good", **given})
    if "spec" in change:
        with pytest.raises(ConfigError, match=message):
            AlignVLMModule(**change)


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


def test_buffers_keep_their_precision_in_weights_of_16_bits(tmp_path):
    module = AlignVLMModule(tiny_spec(tmp_path))
    module.configure_model()
    rotary = module.net.language_model.get_decoder().rotary_emb
    before = rotary.inv_freq.clone()
    assert not torch.equal(before.bfloat16().float(), before), "rounding would show"
    assert module.to(torch.bfloat16) is module
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, before)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("precision", ["bf16-true", HalfPrecision("bf16-true")], ids=["name", "plugin"])
def test_weights_of_16_bits_evaluate_and_do_not_train(tmp_path, precision):
    settings = {"plugins": [precision]} if isinstance(precision, HalfPrecision) else {"precision": precision}
    module = AlignVLMModule(tiny_spec(tmp_path)).begin_stage(Stage(name="hand", lr_connector=1e-3))
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, **settings)
    with pytest.raises(ConfigError, match=r"trainer\.precision=bf16-true is not supported in fit; use bf16-mixed, or"):
        trainer.fit(module, train_dataloaders=[{}])
    tokens = module.processor.tokens_per_tile
    ids = torch.tensor([[module.processor.image_token_id] * tokens + [5, 6, 7]])
    prompt = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "num_tiles": torch.tensor([1]),
        "pixel_values": torch.rand(1, 3, 56, 56),
        "task": "generate",
        "max_new_tokens": 2,
        "filler": False,
    }
    predictions = trainer.predict(module, DataLoader([prompt], batch_size=None))
    assert [len(batch) for batch in predictions] == [1]
    assert module.net.connector.w1.weight.dtype == torch.bfloat16
    other = AlignVLMModule(tiny_spec(tmp_path))
    other.configure_model()
    found, exact = (m.net.language_model.get_decoder().rotary_emb.inv_freq for m in (module, other))
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("entry", ["fit", "validate", "test", "predict"])
def test_a_loss_scale_is_refused_everywhere(tmp_path, entry):
    module = AlignVLMModule(tiny_spec(tmp_path)).begin_stage(Stage(name="hand", lr_connector=1e-3))
    plugin = MixedPrecision("16-mixed", device="cpu")
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[plugin])
    where = " in fit; use bf16-mixed, or" if entry == "fit" else "; use bf16-mixed, bf16-true or 16-true, or"
    with pytest.raises(ConfigError, match=f"trainer.precision=16-mixed is not supported{where} 32-true"):
        getattr(trainer, entry)(module, [{}])
