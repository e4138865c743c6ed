"""`prune`: find the rows of the vocabulary that carry ALIGN's weights on a dataset."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.processing import AlignVLMProcessor

_SHOWN = 10


def run(argv: list[str]) -> int:
    """Write a file of token ids to keep, which `connector: {type: align, vocab_keep: FILE}` takes."""
    options = _parser().parse_args(argv[1:])
    _check(options)
    from ..models.kept_rows import choose_rows
    from ..models.pruning import mean_vocabulary, require_align
    from ..utils.atomic_files import write_atomically

    model, processor = _model(options)
    connector = require_align(model)
    means, tokens = mean_vocabulary(model, _images(options, processor))
    places, mass = choose_rows(means, mass=options.mass, count=options.count, multiple=options.multiple)
    ids = connector.row_ids()
    # A pruned model collapses the same blanks.
    kept = sorted({ids[place] for place in places}.union(connector.collapse.tokens if connector.collapse else ()))
    content = {
        "vocab_size": connector.vocab_size,
        "mass": mass,
        "visual_tokens": tokens,
        "model": str(options.model),
        "weights": options.weights and str(options.weights),
        "data": [str(folder) for folder in options.data],
        "kept": kept,
    }
    write_atomically(options.out, json.dumps(content) + "\n")
    largest = sorted(range(len(means)), key=lambda place: -means[place])[:_SHOWN]
    largest_rows = ", ".join(f"{processor.tokenizer.decode([ids[place]])!r} {means[place]:.4f}" for place in largest)
    sys.stdout.write(
        f"{len(kept):,} of {len(ids):,} rows carry {100 * mass:.2f} % of P_vocab over {tokens:,} visual tokens\n"
        f"largest: {largest_rows}\n"
        f"{options.out}: set connector.vocab_keep to this path\n"
    )
    if options.json:
        result = {
            "kept": len(kept),
            "rows": len(ids),
            "mass": mass,
            "visual_tokens": tokens,
            "largest": means[largest[0]],
        }
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alignvlm prune", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="configs/model/NAME.yaml")
    parser.add_argument("--weights", type=Path, help="folder of a trained model; default: the pretrained parts")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of datasets with images")
    parser.add_argument("--mass", type=float, help="keep the fewest rows that carry this share, for example 0.99")
    parser.add_argument("--count", type=int, help="keep this many rows, for example 3400, rounded up to --multiple")
    parser.add_argument(
        "--multiple", type=int, default=64, help="keep a multiple of this many rows; default: %(default)s"
    )
    parser.add_argument("--samples", type=int, default=100, help="samples of each dataset; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="file for the ids, for example keep.json")
    parser.add_argument("--device", default="cpu", help="for example cuda; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _check(options: argparse.Namespace) -> None:
    if (options.mass is None) == (options.count is None):
        raise ConfigError("prune: give either --mass or --count")
    if options.mass is not None and not 0 < options.mass <= 1:
        raise ConfigError(f"prune --mass {options.mass}: expected a share above 0, at most 1, for example 0.99")
    for name in ("count", "multiple", "samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"prune --{name} {value}: expected at least 1")


def _model(options: argparse.Namespace) -> "tuple[Any, AlignVLMProcessor]":
    import torch

    from ..models.build import build_model, build_processor, load_weights
    from .params import read_spec

    spec = read_spec(options.model)
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {options.device}: {str(error).splitlines()[0][:200]}; use cpu or cuda") from error
    processor = build_processor(spec)
    model = build_model(spec, processor, pretrained=not options.weights)
    if options.weights:
        load_weights(model, options.weights)
    return model.to(device).eval(), processor


def _images(options: argparse.Namespace, processor: "AlignVLMProcessor") -> "Iterator[Tensor]":
    from datamodules.shards.decode import Decoder
    from datamodules.shards.manifest import load_manifest
    from datamodules.shards.reader import read_range

    from ..models.pixels import cut_tiles

    decode = Decoder()
    for folder in options.data:
        manifest = load_manifest(folder)
        for raw in read_range(manifest, 0, min(options.samples, manifest.num_samples)):
            for image in decode(raw).images:
                yield cut_tiles(image, processor.geometry)
