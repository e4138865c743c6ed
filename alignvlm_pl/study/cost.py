"""`cost` (the paper's table 7): time, tokens a second and memory of an answer, all equal but the connector.

The models are random and of the recipe's sizes. Each arm has a process of its own, so that memory is its own; they run
one after the other, once forwards and once backwards, and medians are of both. Where there is no GPU for a model of a
billion parameters and more, only what can be counted on the meta device is reported.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from callbacks.throughput import peak_memory

from ..errors import ConfigError
from ..models.build import ModelSpec, build_config
from ..models.configuration import AlignVLMConfig
from ..models.modeling import AlignVLMForConditionalGeneration
from ..training.flops import count_work
from ..utils.yaml_files import load_yaml
from .measured import made
from .plan import Study, connector_of, model_file
from .results import Results
from .tables import table

PAPER = {  # seconds, tokens a second, GB: arXiv 2502.01341, table 7
    "mlp": "0.161 s, 118.3, 10.9",
    "perceiver": "0.140 s, 135.1, 10.9",
    "ovis": "0.155 s, 122.5, 10.8",
    "align": "0.165 s, 115.4, 10.9",
}
DEFAULTS = {"tiles": 2, "new_tokens": 19, "rounds": 2}
"""The paper's 0.161 s and 118.3 tokens a second are 19 tokens."""
_QUESTION_TOKENS = 32
_LARGE = 1_000_000_000
"""Parameters from which a model is not run on a CPU."""


def update_cost(study: Study, results: Results) -> None:
    """Measure the cost of the arms, unless it is there with the same settings and connectors."""
    settings = {**DEFAULTS, **study.cost}
    wanted = {"settings": settings, "connectors": {arm: connector_of(study, arm) for arm in study.arms}}
    found = results.read_other("cost")
    if found is None or any(found[key] != value for key, value in wanted.items()):
        results.write_other("cost", {**wanted, "arms": measure_cost(study, settings), "made": made()})


def measure_cost(study: Study, settings: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return arm -> `parameters` and `tflops` of the connector, `tokens_per_tile`, and, where a model can run here,
    `connector_s`, `answer_s`, `tokens_per_s` and `memory_gib`.

    Settings: `tiles` of the page, `new_tokens` of the answer, `rounds` of timing.

    Raises:
        ConfigError: If a setting is unknown.
    """
    if settings.keys() != DEFAULTS.keys():
        raise ConfigError(f"cost={dict(settings)}: expected {', '.join(DEFAULTS)}")
    found = {arm: count_arm(study, arm, tiles=settings["tiles"]) for arm in study.arms}
    runs = [arm for arm in study.arms if found[arm].pop("runs")]
    # A new process has a peak of its own, and may start CUDA.
    context, timed = multiprocessing.get_context("spawn"), {arm: list[dict[str, Any]]() for arm in runs}
    for arm in [*runs, *reversed(runs)]:
        with context.Pool(1) as pool:
            timed[arm].append(pool.apply(_run, (_spec(study, arm), dict(settings))))
    for arm, runs_of_arm in timed.items():
        answer, connect = (
            statistics.median(seconds for one in runs_of_arm for seconds in one[key]) for key in ("answer", "connect")
        )
        memory = max(one["memory_gib"] for one in runs_of_arm)
        found[arm] |= {"connector_s": connect, "answer_s": answer, "memory_gib": memory}
        found[arm]["tokens_per_s"] = settings["new_tokens"] / answer
    return found


def _spec(study: Study, arm: str) -> ModelSpec:
    connector = {key: value for key, value in connector_of(study, arm).items() if key != "collapse"}
    return ModelSpec.from_fields({**load_yaml(model_file(study, arm))["spec"], "connector": connector})


def _config(spec: ModelSpec) -> AlignVLMConfig:
    # The placeholder is outside the table, as a processor may give it.
    return build_config(spec, image_token_id=spec.llm.load_config().vocab_size)


def count_arm(study: Study, arm: str, *, tiles: int) -> dict[str, Any]:
    """Return `parameters` and `tflops` of an arm's connector for a page of some tiles, `tokens_per_tile`, and whether
    the model `runs` here.
    """
    with torch.device("meta"):
        model = AlignVLMForConditionalGeneration(_config(_spec(study, arm))).requires_grad_(False)
    work = count_work(model)
    size = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in model.connector.parameters()),
        "tokens_per_tile": model.config.tokens_per_tile,
        "tflops": tiles * work.connector / 1e12,
        "runs": torch.cuda.is_available() or size < _LARGE,
    }


@torch.inference_mode()
def _run(spec: ModelSpec, wanted: Mapping[str, int]) -> dict[str, Any]:
    """Answer a page some times, after once unmeasured; times in seconds, memory in GiB."""
    torch.manual_seed(0)
    device, config = torch.device("cuda" if torch.cuda.is_available() else "cpu"), _config(spec)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else previous)  # no float32 copy in the peak
    try:
        with device:
            model = AlignVLMForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(previous)
    tiling, tiles = config.tiling, wanted["tiles"]
    pixels = (torch.rand(tiles, 3, tiling["tile_height"], tiling["tile_width"]) * 2 - 1).to(device, model.dtype)
    visual = torch.full((1, tiles * config.tokens_per_tile), config.image_token_id)
    ids = torch.cat([visual, torch.randint(0, config.text_config.vocab_size, (1, _QUESTION_TOKENS))], dim=1).to(device)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    inputs["num_tiles"] = torch.tensor([tiles], device=device)
    length = {"max_new_tokens": wanted["new_tokens"], "min_new_tokens": wanted["new_tokens"]}
    features, weight = model.encode_images(pixels), model.get_input_embeddings().weight
    calls: dict[str, Callable[[], Any]] = {
        "answer": lambda: model.generate(**inputs, **length, do_sample=False),
        "connect": lambda: model.connector(features, weight),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(wanted["rounds"] + 1):
        for name, call in calls.items():
            took = _timed(call, device)
            seconds[name] += [took] if index else []
    return {**seconds, "memory_gib": peak_memory(device) / 2**30}


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def section(study: Study, results: Results, folder: Path) -> Iterator[str]:
    """Write a row an arm, the paper's numbers behind it."""
    found = results.read_other("cost")
    yield "## Cost of answering a page"
    if found is None:
        yield "**Missing**: run `study cost`."
        return
    rows = []
    for arm, one in found["arms"].items():
        counted = [str(one["tokens_per_tile"]), f"{one['parameters']:,}", f"{one['tflops']:.3g}"]
        keys = ("connector_s", "answer_s", "tokens_per_s", "memory_gib")
        timed = [f"{one[key]:.3g}" if key in one else "–" for key in keys]
        rows.append([arm, *counted, *timed, PAPER.get(arm, "–")])
    head = ["arm", "visual tokens a tile", "parameters", "TFLOPs of the connector"]
    head += ["connector s", "answer s", "tokens/s", "memory GiB", "the paper, 3B on a GPU: s, tokens/s, GB"]
    yield table(head, rows)
    made = ", ".join(f"{key} {value}" for key, value in {**found["settings"], **found["made"]}.items())
    yield f"Made with: {made}."
