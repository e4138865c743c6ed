"""Image and caption pairs for stage 1: CC-12M as img2dataset packs it, or shards in the sample schema."""

from typing import Any

from .base import WebDataModule
from .shards.sample_formats import CAPTION_PROMPT, Adapter, CaptionReader


class CC12MDataModule(WebDataModule):
    """Image and caption pairs: tars of `{key}.jpg`, `{key}.txt`, `{key}.json` (img2dataset) or the sample schema.

    Downloaded shards have no manifest: make it once with `prepare index <folder>`.

    Args:
        prompt: Text of the user's turn after the image; may be empty. The paper states none.
        shuffle_buffer: As in `WebDataModule`. Larger by default: shards made by img2dataset keep the order of their
            list of links.
        max_skipped_share: As in `WebDataModule`. Larger by default: images from the web are often damaged.
        **options: The other settings of `WebDataModule`.
    """

    def __init__(
        self,
        prompt: str = CAPTION_PROMPT,
        shuffle_buffer: int = 2048,
        max_skipped_share: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(shuffle_buffer=shuffle_buffer, max_skipped_share=max_skipped_share, **options)
        self.prompt = prompt

    def adapter(self) -> Adapter:
        """Read caption members with the prompt."""
        return CaptionReader(prompt=self.prompt)
