"""The `patch` objective: each visual token over text is turned towards the text embeddings of what is written there.

After the patch-level alignment of arXiv 2505.17316, whose targets are sums of the embeddings of a patch's words: here
of the characters that the token covers, whose places follow from the boxes of the lines. It works with any connector
that gives a token for each place; the LLM does not run.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..ops import full_weight
from ..preprocessing.batch import Batch, StepSummary
from ..preprocessing.tiling import Box, token_boxes
from .connectors import connector_class, shuffle_factor
from .connectors.grid import shuffled_grid
from .losses import TokenLoss
from .page_readout import Alphabet
from .processing import AlignVLMProcessor
from .vision import patch_size, token_grid

Targets = list[tuple[int, list[int]]]
"""Index of a visual token of a document's first image -> token ids of the characters it covers."""


class PatchAlignment:
    """Loss of the visual tokens of each document's first image: 1 less the cosine, of tokens over text."""

    def __init__(self, processor: AlignVLMProcessor) -> None:
        self.processor = processor

    @cached_property
    def alphabet(self) -> Alphabet:
        return Alphabet.from_tokenizer(self.processor.tokenizer)

    def count(self, config: Any, batch: StepSummary | Batch) -> int:
        """Count the visual tokens that `loss` sums over, without the device."""
        return sum(map(len, self._targets(config, batch)))

    def loss(self, net: Any, batch: Batch) -> TokenLoss:
        """Compute the loss of a batch; 0 for a document without text on its first image."""
        boxes = batch.get("tile_boxes")
        boxes = None if boxes is None else boxes.to(net.device)
        outputs: Tensor = net.get_image_features(batch["pixel_values"].to(net.device), boxes).pooler_output
        table = full_weight(net.get_input_embeddings().weight).detach()
        zero = outputs.sum().float() * 0  # part of the graph, so that a batch without text has gradients
        losses, counts = [], []
        for tiles, targets in zip(outputs.split(batch["tiles"]), self._targets(net.config, batch), strict=True):
            found = [zero]
            if targets:
                places = torch.tensor([place for place, _ in targets], device=table.device)
                wanted = torch.stack([table[ids].float().mean(0) for _, ids in targets])
                found.append((1 - F.cosine_similarity(tiles.flatten(0, 1)[places].float(), wanted, dim=-1)).sum())
            losses.append(torch.stack(found).sum())
            counts.append(float(len(targets)))
        each, count = torch.stack(losses), torch.tensor(counts, device=table.device)
        return TokenLoss(each.sum(), count.sum(), each.detach(), count)

    def _targets(self, config: Any, batch: StepSummary | Batch) -> list[Targets]:
        tiling, factor = self.processor.geometry, shuffle_factor(config.connector)
        grid = shuffled_grid(token_grid(config.vision_config, tiling), factor)
        keeps_places = getattr(connector_class(config.connector["type"]), "keeps_places", True)
        if grid[0] * grid[1] != config.tokens_per_tile or not keeps_places:
            raise ConfigError(
                f"objective 'patch' needs a visual token for each place, and connector {config.connector['type']!r} "
                f"makes {config.tokens_per_tile} of {grid[0]} x {grid[1]}"
            )
        height, width = patch_size(config.vision_config)
        found = []
        for tiles, lines, sizes in zip(batch["tiles"], batch["lines"], batch["sizes"], strict=True):
            boxes: list[list[Box]] = []
            if tiles:
                boxes = token_boxes(*sizes[0], tiling, grid=grid, token_size=(height * factor, width * factor))
            found.append(self.targets([box for tile in boxes for box in tile], lines[0] if tiles else []))
        return found

    def targets(self, boxes: Sequence[Box], lines: Sequence[Mapping[str, Any]]) -> Targets:
        """Return what tokens with these boxes cover of lines of text, in pixels of one image.

        A token covers a line that its middle row crosses, and of its characters, each of which has an equal share of
        the line's width, those that it overlaps by at least half of the narrower of both. Blanks are no target.
        """
        found = []
        for place, (left, top, right, bottom) in enumerate(boxes):
            middle, covered = (top + bottom) / 2, list[int]()
            for line in lines:
                x0, y0, x1, y1 = line["box"]
                if y0 <= middle <= y1 and line["text"] and right > left:
                    step = (x1 - x0) / len(line["text"])
                    least = min(step, right - left) / 2
                    for index, character in enumerate(line["text"]):
                        start = x0 + index * step
                        if min(right, start + step) - max(left, start) >= least:
                            covered += [self.alphabet.columns[one] for one in self.alphabet.encode(character)]
            if covered:
                found.append((place, covered))
        return found
