"""`tokens`: where the mass of P_vocab is, as the paper draws it, and which text the visual tokens of an arm are near.

For a token over a line of text a lens is right where its token's text, not blank, is part of that line, case ignored.
"""

import base64
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
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
from .measure import Trained, load_trained, measured, pages
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
_PAGE_PX = 800


def measure(trained: Trained, settings: Mapping[str, Any], run: Callable[..., None]) -> Any:
    """Read `settings["pages"]` pages of the first benchmark with the trained model; see `section` for what is kept."""
    if settings.keys() != {"pages"} or not (isinstance(settings["pages"], int) and settings["pages"] > 0):
        raise ConfigError(f"measures.tokens={dict(settings)}: expected pages, a number above 0")
    last = trained.stages[-1]
    net, processor = load_trained(trained)
    shown = list(pages(trained, settings["pages"]))
    tiles = [cut_tiles(image, processor.geometry) for image, _ in shown]
    outputs = [connector_outputs(net, one) for one in tiles]
    found: dict[str, Any] = {"pages": len(shown), "tokens": sum(one.shape[0] * one.shape[1] for one in outputs)}
    if net.connector.reads_text:
        found |= _vocabulary(net, processor, tiles, last)
    found["lenses"], found["painted"] = _lenses(net, processor, shown, outputs)
    found["components"] = _components(net, torch.cat([one.flatten(0, 1) for one in outputs]))
    return found


def _vocabulary(net: Any, processor: AlignVLMProcessor, tiles: Sequence[torch.Tensor], stage: Path) -> dict[str, Any]:
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


def _lenses(net: Any, processor: AlignVLMProcessor, shown: Sequence[Any], outputs: Sequence[torch.Tensor]) -> Any:
    """Return lens -> [right, over text], and lens -> the first page painted; both empty without a grid of tokens."""
    if not has_grid(net):
        return {}, {}
    counts: dict[str, list[int]] = {}
    painted: dict[str, str] = {}
    names = [*LENSES, *(["p_vocab"] if net.connector.reads_text else [])]
    for (image, lines), output in zip(shown, outputs, strict=True):
        for name in names:
            if name == "p_vocab":
                placed = read_page(net, processor, image)
            else:
                lens = {"size": image.size, "tiling": processor.geometry}
                placed = place_tokens(read_lens(net, output, name), net.config, processor.tokenizer, **lens)
            right, over = lens_hits(placed, lines)
            counts[name] = [a + b for a, b in zip(counts.get(name, [0, 0]), (right, over), strict=True)]
            if name not in painted:
                most = 1.0 if name == "embedding" else math.log(net.get_input_embeddings().weight.shape[0])
                painted[name] = _encoded(paint_readout(image, placed, most=most))
    return counts, painted


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
    table = net.get_input_embeddings().weight.detach().float()[list(ids)]
    mean = table.mean(0)
    centred = table - mean
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    found = {}
    for name, points in (("text", table), ("visual", outputs.float())):
        few = points[:: max(1, len(points) // _DRAWN[name])][: _DRAWN[name]]
        found[name] = [[round(value, 4) for value in row] for row in ((few - mean) @ axes).tolist()]
    return found


def _encoded(image: Image.Image) -> str:
    image.thumbnail((_PAGE_PX, _PAGE_PX), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def section(study: Study, results: Results, folder: Path) -> Iterator[str]:
    """Write what P_vocab and the lenses show, means over the seeds; painted pages are those of the first seed."""
    found = {arm: by_seed for arm, by_seed in measured(study, "tokens", results).items() if by_seed}
    yield f"## Visual tokens and text\n\n{PAPER}"
    if reading := {arm: _kept(by_seed) for arm, by_seed in found.items() if "top" in _kept(by_seed)[0]}:
        head = ["arm", "largest mean probability", "whitespace", f"rows that carry {100 * MASS:g} %", "of", "leading"]
        yield table(head, [_vocabulary_row(arm, kept) for arm, kept in reading.items()])
        curves = {arm: [(step, (value,) * 3) for step, value in kept[0]["entropy"]] for arm, kept in reading.items()}
        plots.lines(folder / "tokens-entropy.svg", "entropy of P_vocab", "step", "nats", curves)
        yield "![entropy of P_vocab over training](tokens-entropy.svg)"
    rows = []
    for arm, by_seed in found.items():
        for lens in dict.fromkeys(lens for one in _kept(by_seed) for lens in one["lenses"]):
            shares = [one["lenses"][lens][0] / max(one["lenses"][lens][1], 1) for one in _kept(by_seed)]
            rows.append([arm, lens, f"{sum(shares) / len(shares):.3f}", f"{min(shares):.3f} to {max(shares):.3f}"])
    if rows:
        yield "### Lenses\n\nShare of the tokens over text whose nearest text token is part of that line.\n\n" + table(
            ["arm", "lens", "share", "lowest to highest seed"], rows
        )
    for arm, by_seed in found.items():
        first = _kept(by_seed)[0]
        plots.points(folder / f"tokens-{arm}.svg", arm, first["components"])
        yield f"![text embeddings and visual tokens of {arm}](tokens-{arm}.svg)"
        for lens, image in first["painted"].items():
            (folder / f"tokens-{arm}-{lens}.png").write_bytes(base64.b64decode(image))
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
