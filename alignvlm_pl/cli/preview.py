"""`shards preview`: a page of samples as a model is trained on them, supervised tokens coloured."""

import argparse
import base64
import io
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, NothingToLearnError
from ..preprocessing.chat import IGNORE_INDEX
from ..utils.atomic_files import write_atomically

_IMAGE_PX = 900


def main(argv: list[str]) -> int:
    """Write the page."""
    from datamodules.shards.sample_formats import FORMATS

    parser = argparse.ArgumentParser(prog="shards preview", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of a dataset")
    parser.add_argument(
        "--model", type=Path, required=True, help="configs/model/NAME.yaml: template, tokenizer, tiling"
    )
    parser.add_argument("--out", type=Path, default=Path("preview.html"), help="default: %(default)s")
    parser.add_argument("--start", type=int, default=0, help="first sample; default: %(default)s")
    parser.add_argument("--count", type=int, default=20, help="samples; default: %(default)s")
    parser.add_argument("--max-text-length", type=int, help="cut as a stage with this setting does")
    parser.add_argument("--format", choices=FORMATS, default="normal", help="what the tars hold; default: %(default)s")
    options = parser.parse_args(argv)
    if options.start < 0 or options.count < 1:
        raise ConfigError(f"--start {options.start} --count {options.count}: expected start >= 0 and count >= 1")
    skipped: list[tuple[str, str]] = []
    samples = list(_samples(options, skipped))
    if skipped and not samples:
        raise DataError(
            f"{options.folder}: none of {len(skipped)} samples reads as --format {options.format}, the first: "
            f"{skipped[0][1]}; known formats: {', '.join(FORMATS)}; see `shards verify`"
        )
    write_atomically(options.out, _page(options, samples, skipped))
    sys.stdout.write(f"{len(samples)} samples: {options.out}\n")
    for reason, message in skipped:
        sys.stdout.write(f"  skipped ({reason}): {message}\n")
    return 0


def _samples(options: argparse.Namespace, skipped: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the fields of the page for each valid sample; append (reason, message) of the others to `skipped`."""
    from datamodules.loading.collate import answered_messages
    from datamodules.shards.decode import Decoder
    from datamodules.shards.manifest import load_manifest
    from datamodules.shards.reader import read_range
    from datamodules.shards.sample import UNLABELLED
    from datamodules.shards.sample_formats import FORMATS

    from ..models.build import build_processor
    from .params import read_spec

    processor = build_processor(read_spec(options.model))
    decode = Decoder(adapter=FORMATS[options.format])
    manifest = load_manifest(options.folder)
    if options.start >= manifest.num_samples:
        raise ConfigError(f"--start {options.start}: {options.folder} has {manifest.num_samples} samples, from 0")
    stop = min(options.start + options.count, manifest.num_samples)
    for raw in read_range(manifest, options.start, stop):
        try:
            sample = decode(raw)
            messages = answered_messages(sample.messages, sample.references)
            encoded = processor.encode(messages, sample.images, max_text_length=options.max_text_length)
        except NothingToLearnError as error:
            skipped.append((UNLABELLED, f"sample {raw['__key__']!r}: {error}"))
            continue
        except DataError as error:  # a whole dataset of another schema says so for each of its samples
            skipped.append((getattr(error, "reason", "invalid_sample"), str(error)))
            continue
        yield {
            "key": sample.key,
            "source": sample.source,
            "images": [_data_address(image) for image in sample.images],
            "spans": list(spans(processor, encoded.input_ids.tolist(), encoded.labels.tolist())),
            "tiles": encoded.num_tiles,
            "length": len(encoded.input_ids),
            "supervised": int((encoded.labels[1:] != IGNORE_INDEX).sum()),
            "truncated": encoded.truncated,
        }


def spans(processor: Any, ids: list[int], labels: list[int]) -> Iterator[tuple[str, str]]:
    """Cut a sequence into runs of one kind.

    Yields:
        ``image``, ``supervised`` or ``context``, and the text of the run; an image's is its number of tokens.
    """

    def kind(pair: tuple[int, int]) -> str:
        token, label = pair
        if token == processor.image_token_id:
            return "image"
        return "context" if label == IGNORE_INDEX else "supervised"

    for name, run in groupby(zip(ids, labels, strict=True), key=kind):
        tokens = [token for token, _ in run]
        yield name, f"{len(tokens)} visual tokens" if name == "image" else processor.tokenizer.decode(tokens)


def _data_address(image: Any) -> str:
    """Return an image as a data URL, so that the page is a single file."""
    small = image.copy()
    small.thumbnail((_IMAGE_PX, _IMAGE_PX))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _page(options: argparse.Namespace, samples: list[dict[str, Any]], skipped: list[tuple[str, str]]) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("alignvlm_pl.cli", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("preview.html.j2")
    return template.render(
        folder=options.folder, model=options.model, start=options.start, samples=samples, skipped=skipped
    )
