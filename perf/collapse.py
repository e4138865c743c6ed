"""Whole pages with and without collapsed blanks: visual tokens, seconds of a step and of an answer, memory.

    python perf/collapse.py MODEL [--pages FOLDER] [--count 10] [--mass 0.5] [--min-run 3] [--tile 768 192] [--json]
    python perf/collapse.py MODEL --curve DATASET [DATASET ...] [--questions 32] [--masses 0.3 0.5 0.7 0.9 1.01]

MODEL is box:receipts, or the `hf` folder of a model that has learned to read, such as runs/demo/3-instruct/hf. FOLDER
holds images, of which the first `--count` by name are taken, cut to their content and scaled to `--width` px; without
it, as many synthetic receipts are drawn. `--tile 768 192` cuts other tiles than the model was trained with, (width,
height) in px.
Each page comes once with and once without, in turns, each in a process of its own for its peak memory: forward,
backward and AdamW's step of all parts on a question and its answer under bf16 autocast (CPU) or in the model's dtype
(GPU), then a greedy answer of `--tokens` tokens. The ratios are of the sums over the pages (targets: at least 3 times
fewer visual tokens, steps at least 2 times as fast).

With `--curve` it scores datasets of one question a sample (`prepare synthetic`'s heldout-…) with each `mass`, on the
first questions of each: share of the visual tokens that the LLM ran on, and mean ANLS.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignvlm_pl.utils.cpu import thread_variables

os.environ.update(thread_variables())

import torch
from PIL import Image

from alignvlm_pl.metrics.anls import anls
from alignvlm_pl.models.collapse import Collapse
from alignvlm_pl.models.modeling import AlignVLMForConditionalGeneration
from alignvlm_pl.models.page_readout import Alphabet
from alignvlm_pl.models.processing import AlignVLMProcessor

NONE = 1.01
"""A mass above 1, under which nothing is left out."""
QUESTION, ANSWER = "What is the total?", "12.50"
EMBEDDED = ("input_ids", "pixel_values", "num_tiles", "tile_boxes")
"""What an embedded prompt is made of."""


def load(options: argparse.Namespace, mass: float) -> tuple[Any, Any]:
    """Model and processor that collapse blanks, the newline's, above a mass."""
    model = AlignVLMForConditionalGeneration.from_pretrained(options.model)
    tiling = {"max_tiles": options.max_tiles}
    if options.tile:
        tiling |= dict(zip(("tile_width", "tile_height"), options.tile, strict=True))
    processor = AlignVLMProcessor.from_pretrained(options.model, tiling=tiling)
    model.config.tiling = processor.tiling
    rows, columns = model.grid
    model.config.tokens_per_tile = processor.tokens_per_tile = rows * columns
    model.language_model.set_attn_implementation("sdpa")  # eager keeps all scores of a page in each layer
    blank = Alphabet.from_tokenizer(processor.tokenizer).columns[0]
    own = model.connector.collapse
    min_run = options.min_run or (own.min_run if own else 1)
    model.connector.collapse = Collapse(mass, own.tokens if own else (blank,), min_run)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def pages(options: argparse.Namespace) -> list[Image.Image]:
    """The pages, RGB, cut to their content and scaled to the width."""
    if options.pages is None:
        from datamodules.prepare.synthetic import generate_document

        drawn = (
            generate_document(seed, split="heldout", kind="receipt-page", width=options.width)
            for seed in range(options.count)
        )
        return [document.image.convert("RGB") for document in drawn]
    from alignvlm_pl.preprocessing.images.trim import scale_to_width, trim_page
    from alignvlm_pl.preprocessing.imaging import load_image

    files = [path for path in sorted(options.pages.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    return [scale_to_width(trim_page(load_image(path))[0], options.width) for path in files[: options.count]]


def measure(options: argparse.Namespace, mass: float) -> dict[str, Any]:
    """Tokens and seconds of each page, and the peak memory."""
    model, processor = load(options, mass)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-9, fused=True)
    found: dict[str, Any] = {"tokens": [], "step_s": [], "answer_s": []}
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    for number, page in enumerate([*pages(options)[:1], *pages(options)]):  # the first twice: it warms up
        batch = processor.collate([processor.encode([*asked, {"role": "assistant", "content": ANSWER}], [page])])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        model.train()
        started = now(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            output = model(**batch, use_cache=False)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step_s = now(model.device) - started
        prompt = processor.collate([processor.encode(asked, [page], generation=True)], pad_left=True)
        prompt.pop("labels")
        prompt = {name: value.to(model.device) for name, value in prompt.items()}
        model.eval()
        started = now(model.device)
        limits = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "eos_token_id": []}
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16):
            model.generate(**prompt, **limits, do_sample=False)
        if number:
            kept = output.kept_tokens
            visual = int((batch["input_ids"] == model.config.image_token_id).sum())
            found["tokens"].append(visual if kept is None else int(kept.sum()))
            found["step_s"].append(step_s)
            found["answer_s"].append(now(model.device) - started)
    on_gpu = model.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "memory_gib": peak / 2**30}


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compare(options: argparse.Namespace) -> dict[str, float]:
    """Measure without and with, in a process each; print a row for each page."""
    words = [__file__, *sys.argv[1:], "--one"]
    without, collapsed = (
        json.loads(subprocess.run([sys.executable, *words, str(mass)], check=True, capture_output=True).stdout)
        for mass in (NONE, options.mass)
    )
    print("page  tokens  kept  step s, without and with  answer s, without and with")
    rows = zip(*(run[name] for name in ("tokens", "step_s", "answer_s") for run in (without, collapsed)), strict=True)
    for number, (tokens, kept, step, own_step, answer, own_answer) in enumerate(rows):
        times = f"{step:9.2f} {own_step:8.2f} {answer:17.2f} {own_answer:8.2f}"
        print(f"{number:4d} {tokens:7d} {kept:5d} {times}")
    names = {"tokens": "fewer_tokens", "step_s": "step_speedup", "answer_s": "answer_speedup"}
    return {
        **{title: round(sum(without[name]) / sum(collapsed[name]), 2) for name, title in names.items()},
        "memory_gib": round(without["memory_gib"], 2),
        "collapsed_memory_gib": round(collapsed["memory_gib"], 2),
    }


def curve(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Kept share and mean ANLS for each mass."""
    from alignvlm_pl.training.module import model_inputs
    from datamodules import DocDownstreamDataModule

    model, processor = load(options, NONE)
    collapse, results = model.connector.collapse, {}
    sets: dict[str, Any] = {folder.name: folder for folder in options.curve}
    data = DocDownstreamDataModule(benchmarks=sets, eval_batch_size=4, num_workers=0).attach(processor)
    for mass in options.masses:
        model.connector.collapse = replace(collapse, mass=mass)
        scores, kept, total = [], 0, 0
        for batch in (batch for name in sets for batch in data.benchmark_dataloader(name, limit=options.questions)):
            inputs = {name: value.to(model.device) for name, value in model_inputs(batch).items()}
            with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16):
                shown = model.embed_prompt(**{name: inputs[name] for name in EMBEDDED})
                ids = model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False)
            answers = processor.post_process_image_text_to_text(ids[:, inputs["input_ids"].shape[1] :])
            scores += [anls(answer, known) for answer, known in zip(answers, batch["references"], strict=True)]
            visual = len(inputs["pixel_values"]) * model.config.tokens_per_tile
            kept += visual if shown.kept is None else int(shown.kept.sum())
            total += visual
        results[f"{mass:g}"] = {"kept_share": round(kept / total, 4), "anls": round(sum(scores) / len(scores), 4)}
        print(f"mass {mass:g}: {results[f'{mass:g}']}", flush=True)
    return results


def main() -> int:
    """Print the comparison or the curve; exit with 1 if a target of the comparison is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained model, or box:NAME")
    parser.add_argument("--pages", type=Path, help="folder of images; default: synthetic receipts")
    parser.add_argument("--count", type=int, default=10, help="pages; default 10")
    parser.add_argument("--width", type=int, default=768, help="width of a page in px; default 768")
    parser.add_argument("--max-tiles", type=int, default=64, help="most tiles of a page; default 64")
    parser.add_argument("--tile", type=int, nargs=2, help="width and height of a tile in px; default: the model's")
    parser.add_argument("--min-run", type=int, help="connector.collapse.min_run; default: the model's, or 1")
    parser.add_argument("--mass", type=float, default=0.5, help="connector.collapse.mass; default 0.5")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer; default 16, with --curve 40")
    parser.add_argument("--curve", type=Path, nargs="+", help="datasets to score")
    parser.add_argument("--questions", type=int, default=32, help="questions of a dataset; default 32")
    parser.add_argument("--masses", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9, NONE])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options, options.one)))
        return 0
    if options.curve:
        options.tokens = max(options.tokens, 40)
        results: dict[str, Any] = curve(options)
    else:
        results = compare(options)
        print(results)
    if options.json:
        print(json.dumps(results))
    return int(not options.curve and (results["fewer_tokens"] < 3 or results["step_speedup"] < 2))


if __name__ == "__main__":
    raise SystemExit(main())
