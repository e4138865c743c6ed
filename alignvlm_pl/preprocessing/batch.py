"""The batch: what a data loader gives and what a training, validation or prediction step takes."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from torch import Tensor


class SkippedSample(NamedTuple):
    """A sample of an evaluation dataset that could not be read: key, skip reason, and a message that names the file."""

    key: str
    reason: str
    message: str


class StepSummary(TypedDict):
    """The fields of a micro batch from which the number of tokens in its loss is computed."""

    num_supervised: int
    lines: list[list[list[dict[str, Any]]]]
    sizes: list[list[tuple[int, int]]]
    tiles: list[int]


class _Fields(TypedDict):
    """Fields of every batch."""

    input_ids: Tensor
    """(B, L) int64; the image token at the positions of visual tokens."""
    attention_mask: Tensor
    """(B, L) int64; 0 for padding, which is right of a row for training and left for generation."""
    labels: Tensor
    """(B, L) int64; -100 has no loss."""
    pixel_values: Tensor
    """(tiles, 3, H, W) uint8, the tiles of all samples one after another."""
    tile_boxes: Tensor
    """(tiles, 4) int16; left, upper, right, lower edge of a tile's real pixels."""
    num_tiles: Tensor
    """(B,) int64, tiles of each row."""
    keys: list[str]
    """(samples,) keys; this list and all below have one entry a sample, in reading order."""
    sources: list[str]
    """Dataset of a sample."""
    lines: list[list[list[dict[str, Any]]]]
    """For each image of a sample, its text lines; only image 0 can have any."""
    sizes: list[list[tuple[int, int]]]
    """For each image of a sample, (width, height) in pixels."""
    truncated: list[bool]
    """Whether a sample's text was cut at `max_text_length`."""
    tokens: list[int]
    """Text and visual tokens of a sample; on the host, as `tiles`, so that counting does not wait for a GPU."""
    tiles: list[int]
    """Tiles of a sample."""
    filler: bool
    """Whether the batch only makes the number of batches equal on all ranks: it has no labels and is not scored."""


class Batch(_Fields, total=False):
    """A micro batch of B rows: a plain dict at run time, whose tensors Lightning moves to a device.

    A row is one sample, or several in a packed batch. The fields of this class are those of some batches only.
    """

    positions: list[int]
    """Training: global index of each sample in the training stream; evaluation: its index in the dataset."""
    num_supervised: int
    """Loss: number of labels that are not -100, without the first of a row, which no position predicts."""
    step: list[StepSummary] | None
    """Training, in the first micro batch of an optimizer step: a summary of each of its micro batches."""
    segment_ids: Tensor
    """Packed: (B, L) int64, number of the sample within its row from 1; 0 for padding."""
    document_tiles: Tensor
    """Packed: (samples,) int64, tiles of each sample."""
    rows: list[int]
    """Packed: row of each sample."""
    documents_per_row: list[int]
    """Packed: (B,) samples of each row."""
    references: list[list[str]]
    """Generation: references of each sample."""
    questions: list[str]
    """Generation: text of the last user turn of each sample."""
    meta: list[Mapping[str, Any]]
    """Generation: `meta` of each sample."""
    dataset: str
    """Evaluation: name of the dataset in the config."""
    task: str
    """Evaluation: `loss`, `generate` or `read`."""
    max_new_tokens: int
    """Evaluation: longest prediction in tokens."""
    skipped: list[SkippedSample]
    """Evaluation: the samples of this batch that could not be read."""
