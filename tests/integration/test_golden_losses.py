"""Twenty training losses of the tiny model, in full digits: a refactor must not move them.

`python tests/integration/test_golden_losses.py` writes tests/golden/training_losses.json anew, after a change of the
maths that is meant (CONTRIBUTING.md). Float64 on one CPU thread; weights and pictures are made of whole numbers, so
that they are the same on every machine.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden" / "training_losses.json"
STEPS, ACCUMULATE, SIZE = 20, 2, 2
COMMON = {"warmup_share": 0.2, "weight_decay": 0.1, "gradient_clip_norm": 1.0, "max_steps": STEPS}
STAGES: dict[str, dict[str, Any]] = {
    "answer": {"lr_vision": 1e-3, "lr_connector": 2e-3, "lr_llm": 1e-3},
    "answer and readout": {"lr_connector": 2e-3, "lr_llm": 1e-3, "readout_weight": 0.3},
    "read": {"objective": "read", "lr_vision": 1e-3, "lr_connector": 2e-3},
}


def set_weights(net: torch.nn.Module) -> None:
    """Uniform weights of whole numbers over powers of two, biases of zero; the gains of norms stay as they are.

    Normal random numbers would differ in their last digits from one kind of CPU to another.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(net.named_parameters()):
            if parameter.ndim > 1:
                whole = torch.randint(-(2**20), 2**20 + 1, parameter.shape, generator=generator)
                parameter.copy_(whole.double() / 2**20 * math.sqrt(3 / parameter[0].numel()))
            elif name.endswith("bias"):
                parameter.zero_()
    net.initialize_connector()


def batches(module: Any) -> list[Any]:
    """Documents of one or two tiles, and text alone, with answers of 1 to 15 characters."""
    from datamodules.loading.collate import Collator
    from datamodules.shards.sample import Sample

    collator, encoded = Collator(processor=module.processor), []
    for number in range(STEPS * ACCUMULATE * SIZE):
        height, width = 56, 56 * (1 + number % 2)
        pixels = np.arange(height * width * 3) * (7 + 2 * number) % 251
        images = [Image.fromarray(pixels.astype(np.uint8).reshape(height, width, 3))] if number % 4 else []
        content: list[dict[str, Any]] = [{"type": "image", "index": 0}] * len(images)
        content.append({"type": "text", "text": "what?"})
        answered = [{"type": "text", "text": str(number) * (1 + number % 5)}]
        sample = Sample(
            key=str(number),
            source="made",
            task="vqa",
            messages=[{"role": "user", "content": content}, {"role": "assistant", "content": answered}],
            images=images,
            references=[],
            lines=[{"text": str(number), "box": [4, 4, 20, 16]}] if images else [],
            sizes=[image.size for image in images],
        )
        encoded.append(collator.encode(sample))
    return [collator.collate(encoded[i : i + SIZE]) for i in range(0, len(encoded), SIZE)]


def train(name: str, folder: Path) -> list[float]:
    """Loss of each optimizer step, over its supervised tokens (`read`: characters)."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from alignvlm_pl.models.tiny import tiny_spec
    from alignvlm_pl.preprocessing.batch import with_steps
    from alignvlm_pl.training.module import AlignVLMModule
    from alignvlm_pl.training.stage import Stage

    class StepLosses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            sums[index // ACCUMULATE] += outputs["loss"]

    sums = torch.zeros(STEPS, dtype=torch.float64)
    module = AlignVLMModule(spec=tiny_spec(folder))
    module.begin_stage(Stage(name="golden", **COMMON, **STAGES[name]))
    module.configure_model()
    set_weights(module.net)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision="64-true",
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=module.stage.gradient_clip_norm if module.stage else None,
        callbacks=[StepLosses()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, train_dataloaders=DataLoader(list(with_steps(batches(module), ACCUMULATE)), batch_size=None))
    assert trainer.global_step == STEPS
    return sums.tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*val_dataloader", "ignore:.*does not have many workers")
@pytest.mark.parametrize("name", STAGES)
def test_training_losses_are_the_committed_ones(name, tmp_path):
    expected = json.loads(GOLDEN.read_text())[name]
    assert len(expected) == STEPS
    # Measured: 4e-16 between AVX-512, AVX2 and neither; other BLAS kernels add in other orders.
    assert train(name, tmp_path) == pytest.approx(expected, rel=1e-9, abs=0)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: train(name, Path(folder)) for name in STAGES}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
