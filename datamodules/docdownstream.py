"""Question answering for stage 3: DocDownstream records stored as json beside images, or the sample schema."""

from .base import WebDataModule
from .shards.sample_formats import Adapter, read_docdownstream


class DocDownstreamDataModule(WebDataModule):
    """DocDownstream: shards of `prepare jsonl` (sample schema), or its records packed as `{key}.json` + images.

    `sources` are the names of its ten datasets (`DocVQA`, `ChartQA`, …), checked against the manifests.
    """

    def adapter(self) -> Adapter:
        """Read plain-text messages with `<|image|>` placeholders."""
        return read_docdownstream
