"""`tokens`: where the mass of P_vocab is, as the paper draws it, and which text the visual tokens of an arm are near.

For a token over a line of text a lens is right where its token's text, not blank, is part of that line, case ignored.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from ..errors import ConfigError
from ..models.pixels import cut_tiles
from ..models.processing import AlignVLMProcessor
from ..models.pruning import mean_vocabulary
from ..models.token_lens import LENSES, connector_outputs, has_grid, read_lens
from ..models.token_readout import PlacedToken, place_tokens, read_page
from ..scoring.readout_page import paint_readout, visible
from . import plots
from .measure import Trained, load_trained, measured, pages, png_of, write_png
from .plan import Study
from .results import Result, Results
from .tables import table

PAPER = (
    "The paper, over 100 pages: the largest mean probability is 0.0118, whitespace leads, about 3.4K of 128,256 rows "
    "carry the mass."
)
MASS = 0.999
_TOP = 20
_CURVE_POINTS = 30
_DRAWN = {"text": 150, "visual": 100}
"""Text embeddings and visual tokens in the plot of the two principal components."""


def measure(trained: Trained, settings: Mapping[str, Any], run: Callable[..., None]) -> Any:
    """Read `settings["pages"]` pages of the first benchmark with the trained model; see `section` for what is kept."""
    if settings.keys() != {"pages"} or not (isinstance(settings["pages"], int) and settings["pages"] > 0):
        raise ConfigError(f"measures.tokens={dict(settings)}: expected pages, a number above 0")
    net, processor = load_trained(trained)
    reading, count = Reading(net, processor), settings["pages"]
    visual: list[torch.Tensor] = []
    for image, lines in pages(trained, count):
        output = connector_outputs(net, cut_tiles(image, processor.geometry).to(net.device))
        reading.add(image, lines, output)
        each, page = output.flatten(0, 1), len(visual)
        # From other places of each page, so that few tokens stand for all.
        visual.append(each[page * len(each) // count :: max(1, len(each) * count // _DRAWN["visual"])].cpu())
    found = {"pages": len(visual), "lenses": reading.counts, "painted": reading.painted}
    if net.connector.reads_text:
        tiles = (cut_tiles(image, processor.geometry) for image, _ in pages(trained, count))
        found |= _vocabulary(net, processor, tiles, trained.stages[-1])
    return found | {"components": _components(net, torch.cat(visual))}


def _vocabulary(net: Any, processor: AlignVLMProcessor, tiles: Iterable[torch.Tensor], stage: Path) -> dict[str, Any]:
    """Return the largest entries of the mean P_vocab, the share of whitespace, and how many rows carry `MASS`."""
    means, _ = mean_vocabulary(net, tiles)
    ids, decode = net.connector.row_ids(), processor.tokenizer.decode
    order = sorted(range(len(means)), key=lambda row: -means[row])
    carried, rows = 0.0, 0
    while carried < MASS * sum(means) and rows < len(order):
        carried += means[order[rows]]
        rows += 1
    return {
        "rows": len(means),
        "rows_of_mass": rows,
        "whitespace": sum(mean for token, mean in zip(ids, means, strict=True) if not decode([token]).strip()),
        "top": [[decode([ids[row]]), means[row]] for row in order[:_TOP]],
        "entropy": _curve(stage, "connector/entropy"),
    }


def _curve(stage: Path, tag: str) -> list[list[float]]:
    """Return [step, value] of a TensorBoard curve, evenly thinned."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage))
    events.Reload()
    points = [[event.step, event.value] for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []
    keep = {round(place * (len(points) - 1) / (_CURVE_POINTS - 1)) for place in range(_CURVE_POINTS)}
    return [point for index, point in enumerate(points) if index in keep]


_SCALES = {
    "embedding": "1 - cosine with the nearest text embedding",
    "logit": "entropy of the LM head in nats",
    "p_vocab": "entropy of P_vocab in nats",
}
"""What the colour of a cell says under each lens."""


class Reading:
    """What each lens reads on pages.

    Attributes:
        counts: Lens -> tokens over text that it reads right, and all over text.
        painted: Lens -> the first page painted. Both are empty where the outputs form no grid.
    """

    def __init__(self, net: Any, processor: AlignVLMProcessor) -> None:
        self._net, self._processor = net, processor
        self.counts: dict[str, list[int]] = {}
        self.painted: dict[str, str] = {}
        self._lenses = [*LENSES, *(["p_vocab"] if net.connector.reads_text else [])] if has_grid(net) else []

    def add(self, image: Image.Image, lines: Sequence[Mapping[str, Any]], output: torch.Tensor) -> None:
        """Read a page, whose tiles' outputs are (tiles, tokens, D)."""
        for lens in self._lenses:
            placed = self._read(lens, image, output)
            before = self.counts.get(lens, [0, 0])
            self.counts[lens] = [a + b for a, b in zip(before, lens_hits(placed, lines), strict=True)]
            if lens not in self.painted:
                most = 1.0 if lens == "embedding" else math.log(self._net.get_input_embeddings().weight.shape[0])
                self.painted[lens] = png_of(paint_readout(image, placed, most=most, label=_SCALES[lens]))

    def _read(self, lens: str, image: Image.Image, output: torch.Tensor) -> list[PlacedToken]:
        if lens == "p_vocab":
            return read_page(self._net, self._processor, image)
        readout, tokenizer = read_lens(self._net, output, lens), self._processor.tokenizer
        return place_tokens(readout, self._net.config, tokenizer, size=image.size, tiling=self._processor.geometry)


def lens_hits(placed: Sequence[PlacedToken], lines: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return of how many tokens over lines of text the token's text is part of the line, and how many are over text."""
    right = over = 0
    for token in placed:
        x, y = (token.box[0] + token.box[2]) / 2, (token.box[1] + token.box[3]) / 2
        for line in lines:
            x0, y0, x1, y1 = line["box"]
            if x0 <= x <= x1 and y0 <= y <= y1:
                over += 1
                text = token.text.strip().lower()
                right += bool(text) and text in line["text"].lower()
                break
    return right, over


def _components(net: Any, outputs: torch.Tensor) -> dict[str, list[list[float]]]:
    """Return text embeddings and visual tokens on the first two principal components of the text embeddings."""
    ids = net.connector.row_ids() if hasattr(net.connector, "row_ids") else range(net.config.text_config.vocab_size)
    table = net.get_input_embeddings().weight.detach().float()[list(ids)].cpu()
    mean = table.mean(0)
    centred = table - mean
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    found = {}
    for name, points in (("text", table), ("visual", outputs.float())):
        few = points[:: max(1, len(points) // _DRAWN[name])][: _DRAWN[name]]
        found[name] = [[round(value, 4) for value in row] for row in ((few - mean) @ axes).tolist()]
    return found


def section(study: Study, results: Results, folder: Path) -> Iterator[str]:
    """Write what P_vocab and the lenses show, means over the seeds; curves and pages are those of the first seed."""
    found = {arm: by_seed for arm, by_seed in measured(study, "tokens", results).items() if by_seed}
    yield f"## Visual tokens and text\n\n{PAPER}"
    if reading := {arm: _kept(by_seed) for arm, by_seed in found.items() if "top" in _kept(by_seed)[0]}:
        head = ["arm", "largest mean probability", "whitespace", f"rows that carry {100 * MASS:g} %", "of", "leading"]
        yield table(head, [_vocabulary_row(arm, kept) for arm, kept in reading.items()])
        curves = {arm: [(step, (value,) * 3) for step, value in kept[0]["entropy"]] for arm, kept in reading.items()}
        plots.lines(folder / "tokens-entropy.svg", "entropy of P_vocab", "step", "nats", curves)
        yield "![entropy of P_vocab over training](tokens-entropy.svg)"
        curves = {arm: [(x, (math.exp(y[0]),) * 3) for x, y in points] for arm, points in curves.items()}
        plots.lines(folder / "tokens-effective.svg", "effective vocabulary", "step", "tokens", curves)
        yield "![effective vocabulary over training](tokens-effective.svg)"
    rows = []
    for arm, by_seed in found.items():
        for lens in dict.fromkeys(lens for one in _kept(by_seed) for lens in one["lenses"]):
            counts = [one["lenses"][lens] for one in _kept(by_seed)]
            shares = [right / over for right, over in counts if over]
            spread = [f"{fmean(shares):.3f}", f"{min(shares):.3f} to {max(shares):.3f}"] if shares else ["–", "–"]
            rows.append([arm, lens, *spread])
    if rows:
        yield "### Lenses\n\nShare of the tokens over text whose nearest text token is part of that line.\n\n" + table(
            ["arm", "lens", "share", "lowest to highest seed"], rows
        )
    for arm, by_seed in found.items():
        first = _kept(by_seed)[0]
        plots.points(folder / f"tokens-{arm}.svg", arm, first["components"])
        yield f"![text embeddings and visual tokens of {arm}](tokens-{arm}.svg)"
        for lens, image in first["painted"].items():
            write_png(folder / f"tokens-{arm}-{lens}.png", image)
            yield f"![{arm}, {lens}](tokens-{arm}-{lens}.png)"


def _kept(by_seed: Mapping[int, Result]) -> list[Any]:
    return [result["measures"]["tokens"]["found"] for result in by_seed.values()]


def _vocabulary_row(arm: str, kept: Sequence[Any]) -> list[str]:
    largest, blank = (
        sum(values) / len(kept) for values in ([one["top"][0][1] for one in kept], [one["whitespace"] for one in kept])
    )
    rows = sum(one["rows_of_mass"] for one in kept) / len(kept)
    leading = " ".join(f"`{visible(text)}`" for text, _ in kept[0]["top"][:8])
    return [arm, f"{largest:.4f}", f"{blank:.3f}", f"{rows:.0f}", str(kept[0]["rows"]), leading]
