"""What is measured of trained cells beside their scores: one interface, and the cells that have it."""

import base64
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from datamodules.shards.decode import Decoder
from datamodules.shards.reader import read_range
from datamodules.shards.sample import Sample

from ..errors import ConfigError
from ..models.build import ModelSpec, build_model, build_processor, load_weights
from ..models.pixels import cut_tiles
from ..models.processing import AlignVLMProcessor
from ..utils.yaml_files import load_yaml
from .measured import benchmark_manifests
from .plan import Study
from .results import Result, Results
from .schedule import finished

NO_VAL = ("--data.init_args.val={}",)
"""Option of a `test` whose losses are not asked for."""
PAGE_PX = 800
"""Longest side of the pages that result files hold."""
COLOURS = 32
"""Colours of these pages."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained cell: the run folders of its `stages`, and its own `folder`."""

    stages: list[Path]
    folder: Path

    @property
    def tested(self) -> Path:
        """Run folder of its test."""
        return self.folder / "test"

    @property
    def measures(self) -> Path:
        """Folder of what measures write."""
        return self.folder / "measures"

    @property
    def test_options(self) -> list[str]:
        """Options of `test` for its weights."""
        last = self.stages[-1]
        return ["--config", str(last / "config.yaml"), "--model.weights", str(last / "hf")]

    @property
    def spec(self) -> ModelSpec:
        """Its model, as the configuration of its last stage describes it."""
        return ModelSpec.from_fields(load_yaml(self.stages[-1] / "config.yaml")["model"]["init_args"]["spec"])


def load_trained(trained: Trained, **connector: Any) -> tuple[Any, AlignVLMProcessor]:
    """Return the trained model in eval mode, on a GPU where there is one, and its processor.

    `connector` are options in place of the connector's.
    """
    spec = replace(trained.spec, connector={**trained.spec.connector, **connector})
    processor = build_processor(spec)
    net = build_model(spec, processor, pretrained=False)
    load_weights(net, trained.stages[-1] / "hf")
    return net.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def benchmark_samples(trained: Trained) -> dict[str, Iterator[Sample]]:
    """Return the samples of each benchmark of a cell, which are read when they are asked for."""
    manifests = benchmark_manifests(load_yaml(trained.stages[-1] / "config.yaml")["data"])
    if not manifests:
        raise ConfigError("a measure reads the pages of the benchmarks, and the recipe's data has none")
    return {name: map(Decoder(), read_range(one)) for name, one in manifests.items()}


def pages(trained: Trained, count: int) -> Iterator[tuple[Image.Image, list[Any]]]:
    """Yield the first pages of the first benchmark of a cell, with their lines of text."""
    samples = next(iter(benchmark_samples(trained).values()))
    for sample in islice((one for one in samples if one.images), count):
        yield sample.images[0].convert("RGB"), list(sample.lines)


def png_of(image: Image.Image) -> str:
    """Return an RGB image as a PNG in base64, at most `PAGE_PX` px wide and high and in few colours."""
    small = image.copy()
    small.thumbnail((PAGE_PX, PAGE_PX), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.quantize(COLOURS).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def write_png(path: Path, content: str) -> None:
    """Write what `png_of` has returned."""
    path.write_bytes(base64.b64decode(content))


def page_tiles(trained: Trained, processor: AlignVLMProcessor, count: int) -> list[Tensor]:
    """Return the pixel values (tiles, 3, H, W) of those pages."""
    return [cut_tiles(image, processor.geometry) for image, _ in pages(trained, count)]


Measure = Callable[[Trained, Mapping[str, Any], Callable[..., None]], Any]
"""Takes a trained cell, the settings of the measure in the study's file, and a function that runs a command; returns
what the result file keeps, in plain types."""


def measured(study: Study, name: str, results: Results) -> dict[str, dict[int, Result]]:
    """Return the results of `samples` that have a measure with the study's settings, by arm and seed."""
    return {
        arm: {seed: result for seed, result in by_seed.items() if has_measure(study, name, result)}
        for arm, by_seed in finished(study, "samples", results).items()
    }


def has_measure(study: Study, name: str, result: Result) -> bool:
    """Return whether a result has a measure with the settings of the study."""
    return bool(result["measures"].get(name, {}).get("settings") == study.measures[name])
