"""Image and caption pairs for stage 1: CC-12M as img2dataset packs it, or shards in normal form."""

from pathlib import Path

from .base import WebDataModule
from .normal_form import CAPTION_PROMPT, Adapter, CaptionReader


class CC12MDataModule(WebDataModule):
    """Image and caption pairs: tars of `{key}.jpg`, `{key}.txt`, `{key}.json` (img2dataset) or normal form.

    Downloaded shards have no manifest: make it once with `prepare index <folder>`. Links that were dead when
    the set was downloaded are simply not in the tars.

    Args:
        prompt: Text of the user's turn after the image; may be empty. The paper states none.
        train: Folders of the training sets; several are concatenated.
        val: Name -> folder of the sets whose loss is watched.
        benchmarks: Name -> folder of the sets that are answered and scored.
        batch_size: Training samples per device and step.
        eval_batch_size: Samples per device in a batch of `val` and `benchmarks`.
        num_workers: Worker processes per device; 0 loads in the training process.
        seed: Seed of the order of the training samples.
        shuffle_buffer: Training samples read ahead and permuted together. Larger than elsewhere by default:
            shards made by img2dataset keep the order of their list of links.
        length_window: Training batches that are sorted by length together; 1: none.
        max_text_length: Largest number of text tokens of a sample; null takes the stage's.
        max_skipped_share: Share of bad training samples, 0 to 1, above which the run stops. Larger than
            elsewhere by default: pictures from the web are often damaged.
        strict: Stop at the first bad training sample.
        sources: Train only on samples of these sources; null takes all.
    """

    def __init__(
        self,
        prompt: str = CAPTION_PROMPT,
        train: list[Path] | None = None,
        val: dict[str, Path] | None = None,
        benchmarks: dict[str, Path] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 2,
        seed: int = 0,
        shuffle_buffer: int = 2048,
        length_window: int = 1,
        max_text_length: int | None = None,
        max_skipped_share: float = 0.05,
        strict: bool = False,
        sources: list[str] | None = None,
    ) -> None:
        super().__init__(
            train=train,
            val=val,
            benchmarks=benchmarks,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            shuffle_buffer=shuffle_buffer,
            length_window=length_window,
            max_text_length=max_text_length,
            max_skipped_share=max_skipped_share,
            strict=strict,
            sources=sources,
        )
        self.prompt = prompt

    def adapter(self) -> Adapter:
        """Read caption members with the prompt."""
        return CaptionReader(prompt=self.prompt)
