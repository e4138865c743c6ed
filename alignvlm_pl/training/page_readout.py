"""Reading pages through P_vocab, ALIGN's weights over the vocabulary: the loss of the warm start, and the texts."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..models.connectors import shuffle_factor, shuffled_grid
from ..models.ctc_readout import Alphabet, ctc_loss, read_rows, row_texts, to_rows
from ..models.losses import TokenLoss
from ..models.modeling import AlignVLMForConditionalGeneration
from ..models.processing import AlignVLMProcessor
from ..models.vision import token_grid


class PageReadout:
    """Reads the first image of each document, row by row.

    Args:
        processor: Processor of the model.
    """

    def __init__(self, processor: AlignVLMProcessor) -> None:
        self.processor = processor

    @cached_property
    def alphabet(self) -> Alphabet:
        """Columns of P_vocab that are read out."""
        return Alphabet.from_tokenizer(self.processor.tokenizer)

    def columns(self, device: torch.device) -> Tensor:
        """Ids (C,) of the alphabet's tokens."""
        return torch.tensor(self.alphabet.columns, device=device)

    def log_probs(self, net: AlignVLMForConditionalGeneration, batch: Mapping[str, Any]) -> Tensor:
        """Log P_vocab (tiles, tokens, C) of a batch's tiles, without the LLM."""
        device = net.device
        boxes = batch.get("tile_boxes")
        return net.read(
            batch["pixel_values"].to(device),
            self.columns(device),
            tile_boxes=None if boxes is None else boxes.to(device),
        )

    def loss(self, config: Any, log_probs: Tensor, batch: Mapping[str, Any]) -> TokenLoss:
        """CTC loss over characters; a document without an image has none.

        Args:
            config: Of the model.
            log_probs: Of the batch's tiles, see `log_probs`.
            batch: With the `lines` of each document.
        """
        none = log_probs[:0].sum().float()  # in the graph, so that a batch of text alone has gradients
        sums, characters = zip(
            *(
                (none, none.detach())
                if page is None
                else ctc_loss(page[0], [self.alphabet.encode(text) for text in page[1]])
                for page in self.pages(config, log_probs, batch)
            ),
            strict=True,
        )
        each, counts = torch.stack(sums), torch.stack(characters)
        return TokenLoss(each.sum(), counts.sum(), each.detach(), counts)

    def texts(self, config: Any, log_probs: Tensor, batch: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What stands on each document's first image as it is read, and as it is; non-empty rows, one a line."""
        pages = [
            (read_rows(page[0], self.alphabet), page[1]) if page else ([], [])
            for page in self.pages(config, log_probs, batch)
        ]
        return [("\n".join(filter(None, found)), "\n".join(filter(None, texts))) for found, texts in pages]

    def pages(
        self, config: Any, log_probs: Tensor, batch: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, list[str]] | None]:
        """Of each document's first image: rows of log P_vocab (R, T, C) and the R texts that they should read.

        None for a document without an image. CONTRACT: packed batches bring `document_tiles`
        (models/processing.py), because their `num_tiles` counts by rows; `lines` and `sizes` are by document.
        """
        tiling = self.processor.geometry
        cells = shuffled_grid(token_grid(config.vision_config, tiling), shuffle_factor(config.connector))
        counts = batch.get("document_tiles", batch["num_tiles"]).tolist()
        for tiles, lines, sizes in zip(log_probs.split(counts), batch["lines"], batch["sizes"], strict=True):
            if not len(tiles):
                yield None
                continue
            grid, texts = row_texts(lines[0], sizes[0], tiling, cells[0])
            skip = int(tiling.thumbnail == "first" and grid[0] * grid[1] > 1)
            yield to_rows(tiles[skip : skip + grid[0] * grid[1]], grid, cells), texts
