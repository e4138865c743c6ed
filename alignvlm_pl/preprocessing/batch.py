"""The batch: what a data loader gives and what a training, validation or prediction step takes.

Positions whose number depends on the data are found on the CPU: on a GPU the host would wait for the device.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ..errors import DataError
from .chat import IGNORE_INDEX


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

    input_ids: Tensor  # (B, L) int64; the image token at the positions of visual tokens
    attention_mask: Tensor  # (B, L) int64; 0 for padding, which is right of a row for training and left for generation
    labels: Tensor  # (B, L) int64; -100 has no loss
    pixel_values: Tensor  # (tiles, 3, H, W) uint8, the tiles of all samples one after another
    tile_boxes: Tensor  # (tiles, 4) int16; left, upper, right, lower edge of a tile's real pixels
    num_tiles: Tensor  # (B,) int64, tiles of each row
    keys: list[str]  # (samples,) keys; this list and all below have one entry a sample, in reading order
    sources: list[str]  # Dataset of a sample
    lines: list[list[list[dict[str, Any]]]]  # For each image of a sample, its text lines; only image 0 can have any
    sizes: list[list[tuple[int, int]]]  # For each image of a sample, (width, height) in pixels
    truncated: list[bool]  # Whether a sample's text was cut at `max_text_length`
    tokens: list[int]
    """Text and visual tokens of a sample; on the host, as `tiles`, so that counting does not wait for a GPU."""
    tiles: list[int]  # Tiles of a sample
    filler: bool
    """Whether the batch only makes the number of batches equal on all ranks: it has no labels and is not scored."""


class Batch(_Fields, total=False):
    """A micro batch of B rows: a plain dict at run time, whose tensors Lightning moves to a device.

    A row is one sample, or several in a packed batch. The fields of this class are those of some batches only.
    """

    positions: list[int]
    """Training: global index of each sample in the training stream; evaluation: its index in the dataset."""
    thumbnails: Tensor  # Tiling with thumbnails: (tiles,) bool, true at tiles that show a whole image of several tiles
    num_supervised: int
    """Loss: number of labels that are not -100, without the first of a row, which no position predicts."""
    supervised_positions: Tensor
    """Loss: (n,) int64, see `supervised_positions`; labels that are -100 there have no loss all the same."""
    visual_positions: Tensor  # Loss: (visual tokens,) int64, see `visual_positions`
    step: list[StepSummary] | None
    """Training, in the first micro batch of an optimizer step: a summary of each of its micro batches."""
    segment_ids: Tensor  # Packed: (B, L) int64, number of the sample within its row from 1; 0 for padding
    document_bounds: Tensor  # Packed: (documents + 1,) int32, see `document_bounds`
    longest_document: int  # Packed: largest distance of two neighbours in `document_bounds`
    document_tiles: Tensor  # Packed: (samples,) int64, tiles of each sample
    rows: list[int]  # Packed: row of each sample
    documents_per_row: list[int]  # Packed: (B,) samples of each row
    references: list[list[str]]  # Generation: references of each sample
    questions: list[str]  # Generation: text of the last user turn of each sample
    meta: list[Mapping[str, Any]]  # Generation: `meta` of each sample
    dataset: str  # Evaluation: name of the dataset in the config
    task: str  # Evaluation: `loss`, `generate` or `read`
    max_new_tokens: int  # Evaluation: longest prediction in tokens
    skipped: list[SkippedSample]  # Evaluation: the samples of this batch that could not be read


def supervised_positions(labels: Tensor) -> Tensor:
    """Return the positions (n,) of labels (B, L) that have a loss, as indices into the flattened batch, ascending.

    The first label of a row has none, because no position predicts it.
    """
    supervised = labels != IGNORE_INDEX
    supervised[:, 0] = False
    return supervised.flatten().nonzero().flatten()


def visual_positions(placeholders: Tensor, num_tiles: Tensor | None, *, tokens_per_tile: int) -> Tensor:
    """Return the positions (visual tokens,) of image placeholders, as indices into the flattened batch, ascending.

    `placeholders` (B, L) is true at placeholders, in reading order of the tiles; `num_tiles` (B,) has the tiles of each
    row, or None, which checks nothing. A row without the placeholders of its tiles is a DataError with both numbers.
    """
    if num_tiles is not None:
        if len(num_tiles) != len(placeholders):
            raise DataError(f"num_tiles has {len(num_tiles)} entries but the batch has {len(placeholders)} samples")
        found = placeholders.sum(dim=1)
        mismatched = (found != num_tiles * tokens_per_tile).nonzero().flatten().tolist()
        if mismatched:
            row = mismatched[0]
            raise DataError(
                f"sample {row} of the batch has {int(found[row])} image placeholders but its {int(num_tiles[row])} "
                f"tiles give {int(num_tiles[row]) * tokens_per_tile} visual tokens ({tokens_per_tile} a tile); "
                "processor and model disagree on tiling or tokens_per_tile"
            )
    return placeholders.flatten().nonzero().flatten()


def document_bounds(segment_ids: Tensor) -> Tensor:
    """Return where the documents of packed rows begin, and the end of the last: (documents + 1,) int32.

    They are indices into the flattened batch. `segment_ids` (B, L) numbers the documents within their row from 1; the
    padding at its end, 0, is a document of its own.
    """
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    end = torch.full((1,), segment_ids.numel(), device=segment_ids.device)
    return torch.cat([starts.flatten().nonzero().flatten(), end]).to(torch.int32)


def summary(batch: Batch) -> StepSummary:
    """Return the fields of a micro batch that determine its number of supervised tokens and characters.

    The loss is a mean over those of all micro batches of a step, which must be known before its first backward pass.
    """
    return {
        "num_supervised": batch["num_supervised"],
        "lines": batch["lines"],
        "sizes": batch["sizes"],
        "tiles": batch["tiles"],
    }


def with_steps(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Group the micro batches of a custom DataLoader, as `Collator` makes them, into optimizer steps of `size` each.

    Yields them with `step`: in the first of a step the summaries of all of it, in the others None.
    """
    rest = iter(batches)
    while step := list(islice(rest, size)):
        summaries = [summary(batch) for batch in step]
        for number, batch in enumerate(step):
            batch["step"] = None if number else summaries
            yield batch
