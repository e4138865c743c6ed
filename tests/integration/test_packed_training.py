"""Training on batches of text alone, packed rows and uneven ranks: real batches through a real trainer."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.drills.launch import run_program

ROOT = Path(__file__).parents[2]
WORDS, PICTURE, WIDE = ("words", "only?", None), ("page", "123456", (56, 56)), ("page", "7", (112, 56))
RATES = {"lr_vision": 1e-3, "lr_connector": 1e-3, "lr_llm": 1e-3}


def build(folder: Path) -> Any:
    """A module with a random tiny model, the same in every process."""
    from alignvlm_pl.models.tiny import tiny_spec
    from alignvlm_pl.training.module import AlignVLMModule

    torch.manual_seed(0)
    return AlignVLMModule(spec=tiny_spec(folder / f"tokenizer-{os.getpid()}"))


def samples(module: Any, *kinds: tuple[str, str, tuple[int, int] | None], limit: int | None = None) -> Any:
    """A collator and encoded samples: (source, answer, size of the picture or None)."""
    from datamodules.loading.collate import Collator
    from datamodules.shards.sample import Sample

    def sample(number: int, source: str, answer: str, size: tuple[int, int] | None) -> Sample:
        content: list[dict[str, Any]] = [{"type": "text", "text": "what?"}]
        images = [] if size is None else [Image.new("RGB", size, (40 * number, 90, 200))]
        content = [{"type": "image", "index": 0}] * len(images) + content
        answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        return Sample(
            key=f"{source}{number}",
            source=source,
            task="vqa",
            messages=[{"role": "user", "content": content}, answered],
            images=images,
            references=[],
            lines=[{"text": answer, "box": [4, 4, 20, 16]}] if images else [],
            sizes=[image.size for image in images],
        )

    collator = Collator(processor=module.processor, max_text_length=limit)
    return collator, [collator.encode(sample(number, *kind)) for number, kind in enumerate(kinds)]


def train(module: Any, batches: list[Any], folder: Path, *, accumulate: int = 1, **stage: Any) -> Any:
    """Fit one pass over the batches; what was logged, and the gradients of the last step."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader

    from alignvlm_pl.preprocessing.batch import with_steps
    from alignvlm_pl.training.stage import Stage
    from callbacks.data_health import DataHealth

    class Kept(CSVLogger):
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            logged.update({name: float(value) for name, value in metrics.items()})

    logged: dict[str, float] = {}
    devices = int(os.environ.get("RANKS", "1"))
    module.begin_stage(Stage(**{"name": "all", **RATES, **stage}))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        logger=Kept(folder),
        callbacks=[DataHealth()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    steps = list(with_steps(batches, accumulate))
    trainer.fit(module, train_dataloaders=DataLoader(steps, batch_size=None))
    return logged, {name: p.grad for name, p in module.net.named_parameters()}


pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def test_packed_rows_train_and_log_as_the_same_documents_in_a_batch(tmp_path):
    found = {}
    for packed in (False, True):
        module = build(tmp_path)
        collator, items = samples(module, WORDS, PICTURE, WIDE, PICTURE, limit=30)
        batch = collator.collate_packed([items[:3], items[3:]]) if packed else collator.collate(items)
        found[packed] = [*train(module, [batch], tmp_path), batch]
    (plain, gradients, batch), (logged, packed_gradients, packed_batch) = found.values()
    assert batch["truncated"] == packed_batch["truncated"] == [True, True, False, True]
    assert logged["data/truncated_share"] == 0.75
    real = sum(batch["attention_mask"].sum(1).tolist())
    assert logged["data/real_tokens"] == plain["data/real_tokens"] == real
    for metrics, own in ((plain, batch), (logged, packed_batch)):
        assert metrics["data/padding_share"] == pytest.approx(1 - real / own["input_ids"].numel())
    # float32, other orders of additions. Measured worst case: 2e-7 relative.
    for name in ("train/loss", "train/loss/words", "train/loss/page"):
        assert logged[name] == pytest.approx(plain[name], rel=1e-5)
    assert logged["train/loss/words"] != pytest.approx(logged["train/loss/page"], rel=1e-3)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_loss_of_a_source_is_the_mean_over_its_tokens_since_the_last_logging(tmp_path):
    module = build(tmp_path)
    collator, (words, picture, wide) = samples(module, WORDS, PICTURE, WIDE)
    batches = [collator.collate([words, picture]), collator.collate([wide])]
    # At a learning rate of all but zero, both micro batches see the weights that the sums below are taken with.
    logged, _ = train(module, batches, tmp_path, accumulate=2, **dict.fromkeys(RATES, 1e-12))
    sums, counts = [], []
    for item in (words, picture, wide):
        batch = collator.collate([item])
        with torch.no_grad():
            inputs = {key: batch[key] for key in ("input_ids", "pixel_values", "tile_boxes", "labels")}
            output = module.net(**inputs)
        sums.append(float(output.loss_sum))
        counts.append(float(output.num_supervised))
    assert counts == [6, 7, 2]
    assert logged["train/loss/words"] == pytest.approx(sums[0] / counts[0], rel=1e-5)
    assert logged["train/loss/page"] == pytest.approx(sum(sums[1:]) / sum(counts[1:]), rel=1e-5)
    assert logged["data/truncated_share"] == 0


@pytest.mark.parametrize(
    "stage",
    [{}, {"readout_weight": 0.5}, {"objective": "read", "lr_llm": None}, {"objective": "patch", "lr_llm": None}],
)
def test_a_step_without_supervision_or_images_leaves_the_weights_as_numbers(tmp_path, stage):
    module = build(tmp_path)
    collator, (words,) = samples(module, WORDS)
    batch = collator.collate([words])
    batch["labels"].fill_(-100)
    logged, gradients = train(module, [batch], tmp_path, **stage)
    for name, parameter in module.net.named_parameters():
        assert bool(parameter.isfinite().all()), name
        assert not parameter.requires_grad or torch.equal(gradients[name], torch.zeros_like(parameter)), name
    assert all(value == value for value in logged.values())
    assert "train/loss/words" not in logged, "there is no token to take the mean over"


def test_the_readout_of_packed_rows_is_that_of_their_documents(tmp_path):
    """CTC takes the tiles of each document, where `num_tiles` counts those of a row."""
    module = build(tmp_path)
    collator, items = samples(module, WORDS, PICTURE, WIDE, PICTURE)
    batches = [collator.collate(items), collator.collate_packed([items[:3], items[3:]])]
    module.configure_model()
    losses, pages = [], []
    for batch in batches:
        log_probs = module.net.read(
            batch["pixel_values"], module.readout.alphabet.columns, tile_boxes=batch["tile_boxes"]
        )
        losses.append(module.readout.loss(module.net.config, log_probs, batch))
        pages.append(
            [None if page is None else page[1] for page in module.readout.pages(module.net.config, log_probs, batch)]
        )
    assert torch.equal(losses[0].document_sums, losses[1].document_sums)
    assert losses[0].document_supervised.tolist() == losses[1].document_supervised.tolist()
    assert losses[0].document_sums[0] == losses[0].document_supervised[0] == 0, "words alone are not read"
    assert pages[0] == pages[1]
    assert [page if page is None else "".join(page) for page in pages[0]] == [None, "123456", "7", "123456"]


@pytest.mark.slow
def test_two_processes_of_which_one_has_no_image_train_like_one(tmp_path):
    """Rank 0 has text alone, rank 1 images: nobody waits, and gradients and metrics are those of one process."""
    results = []
    for ranks in (1, 2):
        run_program(__file__, tmp_path / f"ranks{ranks}", ranks=ranks, environment={"RANKS": str(ranks)})
        results.append(torch.load(tmp_path / f"ranks{ranks}/0.pt"))
    (single, expected), (logged, gradients) = results
    _, others = torch.load(tmp_path / "ranks2/1.pt")
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], others[name]), name
        # float32: sums of two ranks. Measured worst case: 6e-8.
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert any(bool(gradient.any()) for name, gradient in gradients.items() if "vision" in name)
    for name in ("words", "page"):
        assert logged[f"train/loss/{name}"] == pytest.approx(single[f"train/loss/{name}"], rel=1e-5)
    for name in ("padding_share", "truncated_share", "real_tokens"):
        assert logged[f"data/{name}"] == single[f"data/{name}"]


def main(folder: Path) -> None:
    """Fit on this rank's share of two batches, one without images, and keep what came of it."""
    ranks, rank = int(os.environ["RANKS"]), int(os.environ.get("LOCAL_RANK", "0"))
    folder.mkdir(exist_ok=True)
    module = build(folder)
    collator, (words, picture, wide) = samples(module, WORDS, PICTURE, WIDE)
    batches = [collator.collate([words]), collator.collate_packed([[picture, wide]])]
    torch.save(train(module, batches[rank::ranks], folder, accumulate=2 // ranks), folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
