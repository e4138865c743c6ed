"""Registered benchmarks through `validate` and `test`: the same on one and two processes, reports, what is missing."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from alignvlm_pl.benchmarks import get_benchmark
from datamodules.shards.writer import ShardWriter
from tests.integration.command import cli

ROOT = Path(__file__).parents[2]
FIELDS = ("advertiser", "flight_from")
# Question, accepted answers and meta; the tiny model answers nonsense, which the scores of some rules tell apart.
SETS = {
    "docvqa": [("who?", ["Lund", "lund"], {}), ("when?", ["1998"], {}), ("how much?", ["12.50"], {})],
    "chartqa": [("max?", ["12"], {"split": "test_human"}), ("min?", ["3"], {"split": "test_augmented"})],
    "wtq": [("which two?", ["Oslo", "Rome"], {}), ("how many?", ["7"], {"canonical": ["7.0"]})],
    "tabfact": [("oslo be in norway", ["True"], {}), ("rome be in norway", ["False"], {})],
    "deepform": [
        (
            f"What is the value for the {field}?",
            ["x"],
            {"document": name, "gold": [{"key": key, "values": [{"value": "x"}]} for key in FIELDS]},
        )
        for name in ("a", "b")
        for field in FIELDS
    ],
    "mmvet": [("describe", ["a page"], {"category": "ocr"})],
}


def write(folder: Path, name: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), "white").save(buffer, "PNG")
    with ShardWriter(folder, name=name, source="made", license="CC0-1.0", samples_per_shard=2) as out:
        for question, references, meta in SETS[name]:
            content = [{"type": "image", "index": 0}, {"type": "text", "text": question}]
            record = {
                "messages": [{"role": "user", "content": content}],
                "references": references,
                "meta": meta,
            }
            out.add(record, [buffer.getvalue()], ["png"])
        if name == "tabfact":  # the header of a picture, which the writer looks at, without the rest
            cut = io.BytesIO()
            Image.effect_noise((56, 56), 90).save(cut, "JPEG")
            out.add(record, [cut.getvalue()[:-200]], ["jpg"])
        out.extra["skipped"] = {"bad_base64": 2} if name == "docvqa" else {}
    return str(folder)


@pytest.mark.slow
def test_registered_benchmarks_on_one_and_two_processes(world, tmp_path):
    sets = json.dumps({name: write(tmp_path / name, name) for name in SETS})
    options = world.options("--data.class_path=BenchmarkDataModule", "--data.init_args.benchmarks", sets)
    options = [option for option in options if not option.startswith("--data=")]
    options += ["--data.init_args.eval_batch_size=2", "--data.init_args.num_workers=0"]
    from alignvlm_pl.cli import main

    assert main(["validate", *options, "--run_dir", str(tmp_path / "one")]) == 0
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--run_dir", tmp_path / "two"]
    cli("test", *options, *two, ranks=2)
    one, both = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one == both
    scores = one["benchmarks"]
    sizes = {name: len(rows) for name, rows in SETS.items()} | {"mmvet": 0}  # which is not scored
    assert {name: scores[name]["num"] for name in SETS} == sizes
    assert {"anls", "anls@due"} <= set(scores["docvqa"])
    assert {"relaxed_accuracy/test_human", "relaxed_accuracy@vlmevalkit-2025-02"} <= set(scores["chartqa"])
    assert {"f1", "precision", "recall"} <= set(scores["deepform"])
    assert scores["mmvet"] == {"num": 0}
    assert one["incomplete"]["docvqa"] == [
        "2 rows skipped when it was prepared: bad_base64",
        "3 of 5,349 questions",
    ]
    unread, size = one["incomplete"]["tabfact"]
    assert unread.startswith("1 samples could not be read, undecodable_image: tabfact-00000002 (sample 'tabfact-")
    assert size == "2 of 12,779 questions"
    problems = json.loads((tmp_path / "two/problems.json").read_text())
    assert [entry["problem"] for entry in problems["tabfact"]] == [unread, size]
    assert [item.split(" ")[0] for item in problems["tabfact"][0]["items"]] == ["tabfact-00000002"]
    lines = (tmp_path / "two/predictions/tabfact.jsonl").read_text().splitlines()
    assert json.loads(lines[2])["error"][0] == "undecodable_image"
    assert one["incomplete"]["mmvet"] == ["1 predictions have no grade: set benchmark.judge"]

    record = json.loads((tmp_path / "two/predictions/wtq.jsonl").read_text().splitlines()[1])
    assert record["meta"] == {"canonical": ["7.0"]}
    assert set(record) >= {"key", "question", "prediction", "references", "wtq", "wtq@official-canonical"}
    assert record["question"] == "how many?"  # the benchmark's prompt is not part of it
    for name in ("report.html", "report.md"):
        text = (tmp_path / "two" / name).read_text()
        assert all(get_benchmark(benchmark).title in text for benchmark in SETS)


@pytest.mark.slow
def test_score_gives_the_scores_of_the_run_again(world, tmp_path, capsys):
    sets = json.dumps({"docvqa": write(tmp_path / "docvqa", "docvqa")})
    assert world.run("validate", "--run_dir", tmp_path / "run", "--data.init_args.benchmarks", sets) == 0
    scores = json.loads((tmp_path / "run/results.json").read_text())["benchmarks"]["docvqa"]
    from alignvlm_pl.cli import main

    path = tmp_path / "run/predictions/docvqa.jsonl"
    assert main(["score", "--benchmark=docvqa", f"--predictions={path}", "--json"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: again[name] for name in scores} == scores
