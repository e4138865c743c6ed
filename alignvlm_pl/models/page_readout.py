"""Page readout: text from P_vocab, with the CTC loss of the `read` objective and greedy decoding.

A row of visual tokens can be read like the output of a text-line recogniser. A CTC loss (Graves et al. 2006) on each
row trains the connector to map every visual token to the character in its patch, without running the LLM; blank is the
newline token, classes are single-character tokens.
Repeats are not merged, as in the Recurrent Neural Aligner (Sak et al. 2017): a character takes exactly one column, so
"11" is two columns.
"""

import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..preprocessing.batch import Batch, StepSummary
from ..preprocessing.imaging import cut_pixels
from ..preprocessing.tiling import Tiling, choose_grid, plan_tiles
from .connectors import shuffle_factor
from .connectors.grid import shuffled_grid
from .losses import TokenLoss
from .modeling import AlignVLMForConditionalGeneration
from .processing import AlignVLMProcessor
from .vision import token_grid

CHARACTERS = "".join(c for c in string.printable if c.isprintable())
_IMPOSSIBLE = -1e30
"""Log-probability of an impossible path; finite, because the gradient of logaddexp(-inf, -inf) is NaN."""


@dataclass(frozen=True, slots=True)
class Alphabet:
    """The columns of P_vocab that are read out: token ids of the blank (newline) and of each of the characters."""

    columns: tuple[int, ...]
    characters: str

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "Alphabet":
        """Collect the printable ASCII characters that are single tokens of a tokenizer.

        Raises:
            ConfigError: If the newline or more than a tenth of the characters are not single tokens.
        """
        ids = {c: tokenizer(c, add_special_tokens=False)["input_ids"] for c in "\n" + CHARACTERS}
        single = [c for c in CHARACTERS if len(ids[c]) == 1]
        if len(ids["\n"]) != 1 or len(single) < 0.9 * len(CHARACTERS):
            raise ConfigError(
                f"the tokenizer has one token for {len(single)} of {len(CHARACTERS)} printable characters (newline: "
                f"{ids[chr(10)]}); the read warm start needs one for nearly all of them"
            )
        return cls((ids["\n"][0], *(ids[c][0] for c in single)), "".join(single))

    def encode(self, text: str) -> list[int]:
        """Return the class indices of a text (from 1; 0 is blank). Accents are stripped, unknown characters dropped."""
        plain = unicodedata.normalize("NFKD", " ".join(text.split()))
        return [self.characters.index(c) + 1 for c in plain if c in self.characters]

    def decode(self, classes: Sequence[int]) -> str:
        """Return the text of class indices, blanks dropped."""
        return " ".join("".join(self.characters[c - 1] for c in classes if c).split())


class PageReadout:
    """Read out the first image of each document, row by row."""

    def __init__(self, processor: AlignVLMProcessor) -> None:
        self.processor = processor

    @cached_property
    def alphabet(self) -> Alphabet:
        return Alphabet.from_tokenizer(self.processor.tokenizer)

    def log_probs(self, net: AlignVLMForConditionalGeneration, batch: Batch) -> Tensor:
        """Compute log P_vocab (tiles, tokens, C) of a batch, without running the LLM."""
        boxes = batch.get("tile_boxes")
        boxes = None if boxes is None else boxes.to(net.device)
        return net.read(batch["pixel_values"].to(net.device), self.alphabet.columns, tile_boxes=boxes)

    def loss(self, config: Any, log_probs: Tensor, batch: Batch) -> TokenLoss:
        """Compute the CTC loss of log P_vocab (tiles, tokens, C) over characters; 0 for a document without an image."""
        zero = log_probs[:0].sum().float()  # part of the graph, so that a batch without images has gradients
        losses = [
            ctc_loss(page[0], [self.alphabet.encode(text) for text in page[1]]) if page else (zero, zero.detach())
            for page in self.pages(config, log_probs, batch)
        ]
        each, counts = (torch.stack(values) for values in zip(*losses, strict=True))
        return TokenLoss(each.sum(), counts.sum(), each.detach(), counts)

    def count_characters(self, config: Any, batch: StepSummary | Batch) -> int:
        """Count the characters that `loss` sums over, without the device."""
        pages = filter(None, self._rows(config, batch))
        return sum(max(len(self.alphabet.encode(text)), 1) for _, texts in pages for text in texts)

    def texts(self, config: Any, log_probs: Tensor, batch: Batch) -> list[tuple[str, str]]:
        """Return (prediction, reference) of each document's first image; one line per non-empty row."""
        pages = (page or (log_probs[:0, 0], []) for page in self.pages(config, log_probs, batch))
        pairs = ((read_rows(rows, self.alphabet), texts) for rows, texts in pages)
        return [("\n".join(filter(None, found)), "\n".join(filter(None, texts))) for found, texts in pairs]

    def _token_grid(self, config: Any) -> tuple[int, int]:
        grid = token_grid(config.vision_config, self.processor.geometry)
        return shuffled_grid(grid, shuffle_factor(config.connector))

    def _rows(self, config: Any, batch: StepSummary | Batch) -> Iterator[tuple[tuple[int, int], list[str]] | None]:
        """Yield what `row_texts` returns of each document's first image; None without image."""
        token_rows = self._token_grid(config)[0]
        for tiles, lines, sizes in zip(batch["tiles"], batch["lines"], batch["sizes"], strict=True):
            yield row_texts(lines[0], sizes[0], self.processor.geometry, token_rows) if tiles else None

    def pages(self, config: Any, log_probs: Tensor, batch: Batch) -> Iterator[tuple[Tensor, list[str]] | None]:
        """Yield rows of log P_vocab (R, T, C) and their R texts of each document's first image; None without image."""
        cells = self._token_grid(config)
        for tiles, page in zip(log_probs.split(batch["tiles"]), self._rows(config, batch), strict=True):
            if page is None:
                yield None
                continue
            (rows, columns), texts = page
            skip = int(self.processor.geometry.thumbnail == "first" and rows * columns > 1)
            yield to_rows(tiles[skip : skip + rows * columns], (rows, columns), cells), texts


def to_rows(values: Tensor, grid: tuple[int, int], token_grid: tuple[int, int]) -> Tensor:
    """Arrange the tokens of an image's tiles as rows of the page.

    `values` (rows · cols tiles, h · w tokens, C), row-major and without the thumbnail, become (rows · h, cols · w, C)
    for a `grid` of (rows, cols) tiles and a `token_grid` (h, w) in each.
    """
    (rows, cols), (height, width) = grid, token_grid
    return values.reshape(rows, cols, height, width, -1).transpose(1, 2).reshape(rows * height, cols * width, -1)


def row_texts(
    lines: Sequence[dict[str, Any]], size: tuple[int, int], tiling: Tiling, token_rows: int
) -> tuple[tuple[int, int], list[str]]:
    """Assign the text lines of an image of `size` (width, height) to rows of tokens, of which a tile has `token_rows`.

    `lines` are `{"text", "box": [x0, y0, x1, y1]}`, in pixels of the image.

    Returns:
        The grid (rows, cols) and rows · token_rows texts. A line belongs to the row of its vertical centre; lines of
        one row are joined from left to right.
    """
    grid = choose_grid(*size, tiling)
    starts = [box for box in plan_tiles(*size, tiling) if not box.is_thumbnail][:: grid.cols]
    rows: list[list[tuple[float, str]]] = [[] for _ in range(grid.rows * token_rows)]
    for line in lines:
        x0, y0, _, y1 = line["box"]
        y = (y0 + y1) / 2
        tile_row = max(index for index, box in enumerate(starts) if box.top <= max(y, 0.0))
        inside = starts[tile_row].to_tile((0, y, 0, y))[1]
        row = min(max(int(inside * token_rows / tiling.tile_height), 0), token_rows - 1)
        rows[tile_row * token_rows + row].append((x0, line["text"]))
    return (grid.rows, grid.cols), [" ".join(text for _, text in sorted(row)) for row in rows]


def ctc_loss(rows: Tensor, targets: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Compute the CTC loss of log-probabilities (R, T, C), without merging repeats; class 0 is the blank.

    `targets` are R lists of class indices, possibly empty.

    Returns:
        The sum over rows in float32 (float64 for float64 rows), and the number of characters, an empty row counting as
        one. Rows with fewer columns than characters have zero loss.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    sizes = [len(target) for target in targets]
    padded = torch.tensor([[*target, *[0] * (max(sizes) - len(target))] for target in targets], dtype=torch.long)
    # Copies that do not wait for the device.
    lengths, padded = (x.to(rows.device, non_blocking=True) for x in (torch.tensor(sizes), padded))
    emit = rows.gather(2, padded[:, None].expand(-1, rows.shape[1], -1))
    # paths[r, n]: log-probability that the columns so far have emitted the first n characters of row r.
    paths = rows.new_full((len(targets), padded.shape[1] + 1), _IMPOSSIBLE)
    paths[:, 0] = 0.0
    for blank, characters in zip(rows[..., :1].unbind(1), emit.unbind(1), strict=True):
        written = F.pad(paths[:, :-1] + characters, (1, 0), value=_IMPOSSIBLE)
        paths = torch.logaddexp(paths + blank, written)
    losses = -paths.gather(1, lengths[:, None]).squeeze(1)
    return losses.masked_fill(lengths > rows.shape[1], 0).sum(), lengths.clamp(min=1).sum().to(losses)


def read_rows(rows: Tensor, alphabet: Alphabet) -> list[str]:
    """Decode rows of log-probabilities (R, T, C) greedily."""
    return [alphabet.decode(row) for row in rows.argmax(dim=-1).tolist()]


@torch.no_grad()
def read_lines(net: AlignVLMForConditionalGeneration, processor: AlignVLMProcessor, image: Image.Image) -> list[str]:
    """Return what P_vocab reads on an RGB image: the text of each row of visual tokens, from top to bottom.

    Rows without text are empty; a thumbnail is left out. The LLM does not run.

    Raises:
        ConfigError: The connector has no P_vocab, or the tokenizer too few single characters.
    """
    tiling, alphabet = processor.geometry, Alphabet.from_tokenizer(processor.tokenizer)
    pixels, boxes = (torch.from_numpy(array).to(net.device) for array in cut_pixels(image, tiling))
    plan = plan_tiles(*image.size, tiling)
    tiles = torch.tensor([index for index, tile in enumerate(plan) if not tile.is_thumbnail], device=net.device)
    log_probs = net.read(pixels[tiles], alphabet.columns, tile_boxes=boxes[tiles])
    grid = choose_grid(*image.size, tiling)
    return read_rows(to_rows(log_probs, (grid.rows, grid.cols), net.grid), alphabet)
