"""Table 7 of the paper for all its connectors: time, tokens a second and memory of answering, all else equal.

    python perf/connectors.py [--json] [--paper-shapes] [--tiles 2] [--new-tokens 19] [--rounds 2] [--only NAME ...]

One line for each file in `configs/model/connector/`: the same random vision encoder and LLM with another connector in
between answer one page, greedily. Every connector has a process of its own, so that memory is its own; the processes
run one after the other, once forwards and once backwards through the list, and the medians are of both. Without options
the sizes are small, Ovis's vocabulary too, and the run ends within two minutes on two cores; `--paper-shapes` is
SigLIP-400M with Llama-3.2-3B in bf16 and wants a GPU. The paper's 0.161 s and 118.3 tokens a second are 19 tokens,
hence the default.

Times of answers with unequal numbers of visual tokens differ for two reasons, the connector's own work and what the LLM
reads; the column `connector` is the first alone. Memory is the peak of the process (CPU) or of the allocator (CUDA),
weights included. With `--json` the last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignvlm_pl.utils.cpu import thread_variables

os.environ.update(thread_variables())

import torch
import yaml
from torch import Tensor

from alignvlm_pl.models.build import Backbone, ModelSpec, build_config
from alignvlm_pl.models.modeling import AlignVLMForConditionalGeneration
from alignvlm_pl.utils.installation import configs_dir

PAPER = {  # seconds, tokens a second, GB: arXiv 2502.01341, table 7
    "mlp": (0.161, 118.3, 10.9),
    "perceiver": (0.140, 135.1, 10.9),
    "ovis": (0.155, 122.5, 10.8),
    "align": (0.165, 115.4, 10.9),
}
QUESTION_TOKENS = 32
SMALL_VISION = {
    "model_type": "siglip_vision_model",
    "image_size": 384,
    "patch_size": 14,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
}
SMALL_VOCABULARY = 16_384
SMALL_LLM = {
    "model_type": "llama",
    "vocab_size": SMALL_VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16_384,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all connectors have in common."""

    paper_shapes: bool
    tiles: int
    new_tokens: int
    rounds: int

    @property
    def device(self) -> torch.device:
        """Where the models run."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_spec(name: str, setting: Setting) -> ModelSpec:
    """Specify the model with one connector, its vision encoder and LLM random."""
    folder = configs_dir() / "model"
    connector = yaml.safe_load((folder / "connector" / f"{name}.yaml").read_text("utf-8"))
    vision, llm = SMALL_VISION, SMALL_LLM
    if name == "ovis" and not setting.paper_shapes:
        connector["visual_vocab"] = SMALL_VOCABULARY // 2  # as 65,536 are of Llama's 128,256
    if setting.paper_shapes:
        spec = yaml.safe_load((folder / "llama3.2-3b.yaml").read_text("utf-8"))["spec"]
        vision, llm = spec["vision"]["config"], spec["llm"]["config"]
    tiling = {"tile_height": 384, "tile_width": 384}
    return ModelSpec(vision=Backbone(config=vision), llm=Backbone(config=llm), connector=connector, tiling=tiling)


def build(name: str, setting: Setting) -> AlignVLMForConditionalGeneration:
    """Build the model, in bf16 at the paper's shapes."""
    torch.manual_seed(0)
    spec = model_spec(name, setting)
    vocabulary = spec.llm.load_config().vocab_size
    config = build_config(spec, image_token_id=vocabulary)  # outside the table, as a processor may give it
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if setting.paper_shapes else torch.float32)
    try:
        with setting.device:
            model = AlignVLMForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(previous)
    return model.eval()


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call in seconds, until the device is done."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Answer a page `rounds` times, after once unmeasured; times in seconds, memory in GiB."""
    device = setting.device
    model = build(name, setting)
    config = model.config
    visual = torch.full((1, setting.tiles * config.tokens_per_tile), config.image_token_id)
    question = torch.randint(0, 1000, (1, QUESTION_TOKENS))
    inputs: dict[str, Tensor] = {
        "input_ids": torch.cat([visual, question], dim=1).to(device),
        "pixel_values": (torch.rand(setting.tiles, 3, 384, 384) * 2 - 1).to(device),
        "num_tiles": torch.tensor([setting.tiles], device=device),
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    length = {"max_new_tokens": setting.new_tokens, "min_new_tokens": setting.new_tokens}
    features = model.encode_images(inputs["pixel_values"])
    table = model.get_input_embeddings().weight

    def answer() -> None:
        model.generate(**inputs, **length, do_sample=False)

    def connect() -> None:
        model.connector(features, table)

    seconds: dict[str, list[float]] = {"answer": [], "connect": []}
    for index in range(setting.rounds + 1):
        for key, call in (("answer", answer), ("connect", connect)):
            took = timed(call, device)
            seconds[key] += [took] if index else []
    return {
        "tokens_per_tile": config.tokens_per_tile,
        "parameters": sum(parameter.numel() for parameter in model.connector.parameters()),
        "answer": seconds["answer"],
        "connect": seconds["connect"],
        "memory_gib": peak_memory(device),
    }


def peak_memory(device: torch.device) -> float:
    """Peak of this process so far in GiB: of the allocator on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure_all(names: list[str], setting: Setting) -> dict[str, dict[str, Any]]:
    """Measure every connector twice, each time in a process of its own, and join the times."""
    # A forked process has the imports already; neither CUDA nor a pool of threads has started in this one.
    context = multiprocessing.get_context("fork")
    found: dict[str, dict[str, Any]] = {}
    for name in [*names, *reversed(names)]:
        with context.Pool(1) as pool:
            results = pool.apply(measure, (name, setting))
        if (earlier := found.get(name)) is not None:
            for key in ("answer", "connect"):
                results[key] += earlier[key]
            results["memory_gib"] = max(results["memory_gib"], earlier["memory_gib"])
        found[name] = results
    return {name: summary(found[name], setting) for name in names}


def summary(results: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """Medians of the times, and the columns of table 7."""
    seconds = statistics.median(results["answer"])
    return {
        "tokens_per_tile": results["tokens_per_tile"],
        "parameters": results["parameters"],
        "connector_s": round(statistics.median(results["connect"]), 5),
        "time_s": round(seconds, 4),
        "tokens_per_s": round(setting.new_tokens / seconds, 1),
        "memory_gib": round(results["memory_gib"], 2),
    }


def print_table(found: dict[str, dict[str, Any]]) -> None:
    """Print one line for each connector, the paper's numbers behind it."""
    head = (
        "connector",
        "visual/tile",
        "parameters",
        "connector s",
        "time s",
        "tokens/s",
        "memory GiB",
        "paper",
    )
    print("{:14}{:>12}{:>14}{:>13}{:>10}{:>10}{:>12}  {}".format(*head))
    for name, row in found.items():
        paper = "{} s, {} tokens/s, {} GB".format(*PAPER[name]) if name in PAPER else "-"
        print(
            f"{name:14}{row['tokens_per_tile']:>12}{row['parameters']:>14,}{row['connector_s']:>13.4f}"
            f"{row['time_s']:>10.3f}{row['tokens_per_s']:>10.1f}{row['memory_gib']:>12.2f}  {paper}"
        )


def main() -> int:
    """Print the table."""
    known = sorted(path.stem for path in (configs_dir() / "model" / "connector").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--paper-shapes", action="store_true", help="SigLIP-400M and Llama-3.2-3B in bf16")
    parser.add_argument("--tiles", type=int, default=2, help="tiles of the page (default 2)")
    parser.add_argument("--new-tokens", type=int, default=19, help="tokens of the answer (default 19)")
    parser.add_argument("--rounds", type=int, default=2, help="timed answers in each process (default 2)")
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="NAME", help=f"of {known}")
    options = parser.parse_args()
    setting = Setting(
        paper_shapes=options.paper_shapes,
        tiles=options.tiles,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
    )
    start = time.perf_counter()
    found = measure_all(options.only, setting)
    print_table(found)
    # Asked for last: CUDA, once started here, would not survive a fork.
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, torch {torch.__version__}, {setting}, {time.perf_counter() - start:.0f} s in all")
    if options.json:
        print(json.dumps({"device": device, "connectors": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
