"""ZeRO-2 and -3 on two CPU processes (gloo) against one process; skipped where deepspeed is not installed."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from PIL import Image

import tests.integration.test_strategies as strategies
from tests.integration.zero_on_cpu import IMPORTABLE, ZeroOnCPU, deepspeed_on_path, needs_deepspeed

ROOT = Path(__file__).parents[2]
KINDS = ("zero2", "zero3")


class AtEnd(pl.Callback):
    """What a model says when training is over, asked for unequal lengths."""

    def __init__(self, inputs: tuple[int, ...]) -> None:
        self.inputs = inputs
        self.answers: dict[int, Any] = {}
        self.readings: dict[int, Any] = {}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ask."""
        pl_module.eval()
        pl_module.processor.post_process_image_text_to_text = lambda ids: ids.tolist()
        for number in self.inputs:
            picture = {"type": "image", "image": Image.new("RGB", (60, 40), (90, 50, 7))}
            words = {"type": "text", "text": "what?" * (1 + number)}
            turns = [{"role": "user", "content": [words] if number else [picture, words]}]
            batch = pl_module.processor.apply_chat_template(
                [turns], tokenize=True, add_generation_prompt=True
            )
            self.answers[number] = pl_module.generate(batch, max_new_tokens=3 + 4 * number)
            self.readings[number] = pl_module.net.read(batch["pixel_values"], torch.tensor([7, 65])).detach()


def fit(folder: Path, kind: str, name: str, *, whole_below: int = 0, **options: Any) -> dict[str, Any]:
    alone = kind == "one"
    at_end = AtEnd((0, 1) if alone else (int(os.environ["LOCAL_RANK"]),))
    strategy = None if alone else ZeroOnCPU(int(kind.removeprefix("zero")), whole_below)
    options = {"steps": strategies.STEPS, "callbacks": [at_end], **options}
    found = strategies.fit(folder, kind, name, strategy=strategy, **options)
    return {**found, **{key: getattr(at_end, key) for key in ("answers", "readings")}}


def main(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    if kind == "back":  # one process goes on from what two have left
        twice = partial(fit, folder, "one", "no vision", steps=strategies.TWICE)
        found = {source: twice(resume=folder / f"{source}.ckpt") for source in KINDS}
        return torch.save(found, folder / "back-0.pt")
    kind = "one" if kind == "alone" else kind
    found = {name: fit(folder, kind, name) for name in strategies.STAGES}
    found["accumulated"] = fit(folder, kind, "all", steps=strategies.TWICE, accumulate=2)
    twice = partial(fit, folder, kind, "no vision", steps=strategies.TWICE)
    found["unbroken"] = twice(save=folder / f"{kind}.ckpt")
    if kind == "one":
        return torch.save(found, folder / "alone-0.pt")
    # Some of the tiny model's parameters are smaller than this.
    found["resumed"] = twice(resume=folder / f"{kind}.ckpt", whole_below=1000)
    found["from another"] = twice(resume=folder / {"zero2": "one.ckpt", "zero3": "zero2.ckpt"}[kind])
    half = partial(twice, precision="bf16-mixed")
    found["bfloat16"] = half(save=folder / "half.ckpt")
    found["bfloat16 resumed"] = half(resume=folder / "half.ckpt")
    if kind == "zero3":
        again = {"activation_checkpointing": ["vision", "llm"]}
        found["run again"] = fit(folder, kind, "all", **again)
    torch.save(found, folder / f"{kind}-{os.environ['LOCAL_RANK']}.pt")
    torch.distributed.barrier()
    os._exit(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each kind what each rank found, and the weights at the start."""
    folder = tmp_path_factory.mktemp("zero")
    found: dict[str, Any] = strategies.write_starts(folder)
    with deepspeed_on_path():
        for kind, ranks in (("alone", 1), ("zero2", 2), ("zero3", 2), ("back", 1)):
            found[kind] = strategies.launch(kind, folder, ranks=ranks, script=__file__)
    return found


def assert_near(found: Any, expected: Any) -> None:
    """As between other strategies; DeepSpeed keeps the gradients to itself."""
    strategies.assert_near({**found, "gradients": {}}, {**expected, "gradients": {}})


def last_two(run: Any) -> dict[str, Any]:
    return {**run, "losses": run["losses"][2:], "norms": run["norms"][2:]}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*strategies.STAGES, "accumulated"])
def test_two_ranks_train_as_one(runs, kind, name):
    for rank in runs[kind]:
        assert_near(rank[name], runs["alone"][0][name])


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", strategies.STAGES)
def test_what_is_frozen_stays_bit_for_bit_and_everything_else_moves(runs, kind, name):
    start, run = runs[f"start-{strategies.STAGES[name][1]}"], runs[kind][0][name]
    assert start.keys() == run["state"].keys()
    for key, value in run["state"].items():
        moved = not torch.equal(start[key], value)
        assert moved == (key.split(".")[0] in strategies.TRAINED[name]), key


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("whole", "rest"), [("unbroken", "resumed"), ("bfloat16", "bfloat16 resumed")])
def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(runs, kind, whole, rest):
    for rank in runs[kind]:
        assert rank[rest]["losses"] == rank[whole]["losses"][2:]
        state = rank[rest]["state"]
        assert all(torch.equal(state[name], value) for name, value in rank[whole]["state"].items())
    types = {value.dtype for value in runs[kind][0][whole]["state"].values()}
    assert types == {torch.bfloat16 if whole == "bfloat16" else torch.float32}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_go_on_from_each_others_checkpoints(runs, kind):
    expected = last_two(runs["alone"][0]["unbroken"])
    assert_near(runs["back"][0][kind], expected)
    for rank in runs[kind]:
        assert_near(rank["from another"], expected)


@needs_deepspeed
@pytest.mark.slow
def test_weights_in_bfloat16_train_nearly_as_in_float32(runs):
    for kind in KINDS:
        found, expected = runs[kind][0]["bfloat16"], runs[kind][0]["unbroken"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2)
        assert found["losses"] != expected["losses"]


@needs_deepspeed
@pytest.mark.slow
def test_layers_that_run_again_train_the_same(runs):
    for rank in runs["zero3"]:
        assert_near(rank["run again"], runs["alone"][0]["all"])


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_answer_at_unequal_length_answer_as_one_process(runs, kind):
    for name in strategies.STAGES:
        expected = runs["alone"][0][name]
        for number, rank in enumerate(runs[kind]):
            assert rank[name]["answers"] == {number: expected["answers"][number]}
            assert len(rank[name]["answers"][number][0]) == 3 + 4 * number
            torch.testing.assert_close(
                rank[name]["readings"][number], expected["readings"][number], rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.skipif(IMPORTABLE, reason="deepspeed is found here")
def test_without_deepspeed_its_cluster_file_says_what_to_install(world, tmp_path, capsys, stage):
    file = tmp_path / "zero.yaml"
    shipped = yaml.safe_load((ROOT / f"configs/cluster/zero{stage}.yaml").read_text())
    file.write_text(yaml.safe_dump({**shipped, "accelerator": "cpu", "devices": 1}))
    assert world.run("fit", "--trainer", file, "--run_dir", tmp_path / "run") == 1
    told = capsys.readouterr().err
    assert (
        "ZeRO needs the package deepspeed: pip install 'deepspeed>=0.19'; configs/cluster/fsdp.yaml" in told
    )
    assert "Traceback" not in told


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
