"""What is measured of trained cells beside their scores: one interface, and the cells that have it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from datamodules.shards.decode import Decoder
from datamodules.shards.manifest import load_manifest
from datamodules.shards.reader import read_range

from ..errors import ConfigError
from ..models.build import ModelSpec, build_model, build_processor, load_weights
from ..models.pixels import cut_tiles
from ..models.processing import AlignVLMProcessor
from ..utils.yaml_files import load_yaml
from .plan import Study
from .results import Result, Results
from .schedule import Place, cell_at


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained cell: `stages` are the run folders of its stages, `folder` is one for what a measure writes."""

    stages: list[Path]
    folder: Path

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
    """Return the trained model in eval mode and its processor; `connector` are options in place of the connector's."""
    spec = replace(trained.spec, connector={**trained.spec.connector, **connector})
    processor = build_processor(spec)
    net = build_model(spec, processor, pretrained=False)
    load_weights(net, trained.stages[-1] / "hf")
    return net.eval(), processor


def pages(trained: Trained, count: int) -> Iterator[tuple[Image.Image, list[Any]]]:
    """Yield the first pages of the first benchmark of a cell, with their lines of text."""
    data = load_yaml(trained.stages[-1] / "config.yaml")["data"]["init_args"]
    benchmarks = data.get("benchmarks") or {}
    if not benchmarks:
        raise ConfigError("a measure reads the pages of the first benchmark, and the recipe's data has none")
    given = next(iter(benchmarks.values()))
    manifest, decode = load_manifest(Path(given["folder"] if isinstance(given, dict) else given)), Decoder()
    for raw in read_range(manifest, 0, min(count, manifest.num_samples)):
        sample = decode(raw)
        for image in sample.images[:1]:
            yield image.convert("RGB"), list(sample.lines)


def page_tiles(trained: Trained, processor: AlignVLMProcessor, count: int) -> list[Tensor]:
    """Return the pixel values (tiles, 3, H, W) of those pages."""
    return [cut_tiles(image, processor.geometry) for image, _ in pages(trained, count)]


Measure = Callable[[Trained, Mapping[str, Any], Callable[..., None]], Any]
"""Takes a trained cell, the settings of the measure in the study's file, and a function that runs a command; returns
what the result file keeps, in plain types."""


def measured(study: Study, name: str, results: Results) -> dict[str, dict[int, Result]]:
    """Return the results of `samples` that have a measure with the study's settings, by arm and seed."""
    found: dict[str, dict[int, Result]] = {arm: {} for arm in study.arms}
    for arm in study.arms:
        for seed in study.seeds:
            try:
                result = results.read(cell_at(study, Place(budget="samples", arm=arm, seed=seed), results))
            except ConfigError:  # a cell before it is missing
                continue
            if result is not None and has_measure(study, name, result):
                found[arm][seed] = result
    return found


def has_measure(study: Study, name: str, result: Result) -> bool:
    """Return whether a result has a measure with the settings of the study."""
    return bool(result["measures"].get(name, {}).get("settings") == study.measures[name])
