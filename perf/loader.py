"""Samples per second of the training loader, over those of a bare loop that reads, decodes and cuts the same samples.

    python perf/loader.py [--json] [--rounds 3] [--samples 96] [--memory-samples 50000]

Pages of 1700 x 2200 pixels and photos of 512, in tiles of 384 (at most 9, and a thumbnail). The bare loop runs in this
process: tarfile, Pillow, resize, tiles; no text, no batches. The loader has one and two workers, and batches of 4
pages or 16 photos. All are timed in turns, and the ratios of the medians are the result. Then the share of real tokens
when samples of 1 and 9 tiles are packed, and the growth of the memory of loader and worker over many small samples.
With `--json` the last line is JSON.

Aims, with one and with two workers over the bare loop: pages 1.0 and 2.0, photos 0.85 and 1.7.
"""

import argparse
import io
import json
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignvlm_pl.utils.cpu import thread_variables

os.environ.update(thread_variables())

SIZES = {"pages": (1700, 2200), "photos": (512, 384)}
BATCH = {"pages": 4, "photos": 16}  # about 45 tiles
BUDGET = 16384


def main() -> int:
    """Print rates, ratios, share and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured; default 3")
    parser.add_argument("--samples", type=int, default=96, help="pages of a measurement, and 16 times as many photos")
    parser.add_argument("--memory-samples", type=int, default=50_000, help="samples of the memory test")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), options)
    for name, value in results.items():
        print(f"{name:32s} {value:g}")
    if options.json:
        print(json.dumps(results))
    return 0


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return all results."""
    import torch

    from alignvlm_pl.models.processing import AlignVLMProcessor
    from alignvlm_pl.models.tiny import tiny_tokenizer

    torch.set_num_threads(1)

    def processor_of(**tiling: Any) -> AlignVLMProcessor:
        sides = {"tile_height": 384, "tile_width": 384, "max_tiles": 9}
        return AlignVLMProcessor(tiny_tokenizer(), tiling=sides | tiling, chat_template="chatml")

    processor = processor_of()
    results: dict[str, float] = {}
    for name, size in SIZES.items():
        count = options.samples * (1 if name == "pages" else 16)
        write(folder / name, [draw_image(size, seed) for seed in range(24)], count)
        results |= {
            f"{name}_{key}": value for key, value in rates(folder / name, processor, count, options.rounds).items()
        }
    results |= real_tokens(folder, processor_of(thumbnail="none"))
    results |= memory(folder, processor, options.memory_samples)
    return {name: round(value, 3) for name, value in results.items()}


def draw_image(size: tuple[int, int], seed: int) -> bytes:
    """JPEG of (width, height) that compresses as a page or photo does: dark strokes on a shaded ground."""
    from PIL import Image, ImageDraw

    rng = random.Random(seed)
    image = Image.linear_gradient("L").resize(size).point(lambda value: 200 + value // 5).convert("RGB")
    draw = ImageDraw.Draw(image)
    for _ in range(size[0] * size[1] // 900):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        draw.line([x, y, x + rng.randint(2, 14), y + rng.randint(-8, 8)], fill=(rng.randrange(120),) * 3, width=2)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write(folder: Path, drawn: list[bytes], count: int) -> None:
    """Write `count` samples with a question and an answer each, and one of the images `drawn` if any."""
    from datamodules.shards.writer import ShardWriter

    with ShardWriter(folder, name=folder.name, source=folder.name, license="none", samples_per_shard=256) as out:
        for index in range(count):
            images = [drawn[index % len(drawn)]] if drawn else []
            question = [{"type": "image", "index": 0}] * len(images) + [{"type": "text", "text": "What is it?"}]
            answer = [{"type": "text", "text": f"Number {index}."}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.add({"messages": messages}, images, ["jpg"] * len(images))


def rates(folder: Path, processor: Any, count: int, rounds: int) -> dict[str, float]:
    """Samples per second of the bare loop, and of the loader over it with one and two workers."""
    bare: list[float] = []
    loaded: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        bare.append(bare_rate(folder, processor))
        for num_workers, found in loaded.items():
            found.append(loader_rate(folder, processor, count, num_workers))
    base = statistics.median(bare)
    return {
        "bare_per_s": base,
        "one_worker_over_bare": statistics.median(loaded[1]) / base,
        "two_workers_over_bare": statistics.median(loaded[2]) / base,
    }


def bare_rate(folder: Path, processor: Any) -> float:
    """Read, decode, resize and cut; nothing else."""
    from PIL import Image

    from alignvlm_pl.models.pixels import cut_tiles

    count, start = 0, time.perf_counter()
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    stream = tar.extractfile(member)
                    assert stream is not None, "a member is a file"
                    cut_tiles(Image.open(io.BytesIO(stream.read())).convert("RGB"), processor.geometry)
                    count += 1
    return count / (time.perf_counter() - start)


def module(sets: list[str | Path], processor: Any, **options: Any) -> Any:
    """A DataModule for training on some sets."""
    from datamodules import WebDataModule

    return WebDataModule(train=sets, **options).attach(processor)


def loader_rate(folder: Path, processor: Any, count: int, num_workers: int) -> float:
    """Take batches; the first of each worker are left out, with the start of the processes."""
    batch_size = BATCH[folder.name]
    data = module([folder], processor, batch_size=batch_size, num_workers=num_workers, shuffle_buffer=64)
    batches = iter(data.train_dataloader())
    # Batches prefetched before the start of the clock and at its end are equally many, so they cancel out.
    for _ in islice(batches, 4 * num_workers):
        pass
    start = time.perf_counter()
    taken = sum(len(batch["keys"]) for batch in islice(batches, count // batch_size - 4 * num_workers))
    rate = taken / (time.perf_counter() - start)
    data.teardown()
    return rate


def real_tokens(folder: Path, processor: Any) -> dict[str, float]:
    """Tokens over positions of packed batches, and over their budget; a third of the samples has nine tiles."""
    write(folder / "nine", [draw_image(SIZES["pages"], seed) for seed in range(8)], 40)
    write(folder / "one", [draw_image((384, 384), seed) for seed in range(8)], 80)
    data = module(
        [folder / "nine", folder / "one"],
        processor,
        batch_size=4,
        token_budget=BUDGET,
        pack_window=120,
        num_workers=1,
        shuffle_buffer=1024,
    )
    real = rows = positions = 0
    for batch in data.train_dataloader():  # an epoch: one window, its last row included
        real += int(batch["attention_mask"].sum())
        positions += batch["attention_mask"].numel()
        rows += len(batch["attention_mask"])
    data.teardown()
    return {"real_token_share": real / positions, "real_share_of_budget": real / (BUDGET * rows)}


def memory(folder: Path, processor: Any, count: int) -> dict[str, float]:
    """MiB that loader and worker have grown by between the first tenth of the samples and the last."""
    write(folder / "small", [draw_image((64, 64), seed) for seed in range(8)], 5000)
    data = module([folder / "small"], processor, batch_size=50, num_workers=1, shuffle_buffer=512)
    loader = data.train_dataloader()
    taken, after_tenth = 0, (0.0, 0.0)
    while taken < count:
        for batch in loader:
            taken += len(batch["keys"])
            if not any(after_tenth) and taken >= count // 10:
                after_tenth = resident(loader)
    own, worker = (now - before for now, before in zip(resident(loader), after_tenth, strict=True))
    data.teardown()
    return {"loader_growth_mib": own, "worker_growth_mib": worker, "memory_samples": float(taken)}


def resident(loader: Any) -> tuple[float, float]:
    """Resident MiB of this process and of the loader's worker."""
    (worker,) = loader.workers
    return tuple(_resident(pid) for pid in (os.getpid(), worker.pid))  # type: ignore[return-value]


def _resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    raise SystemExit(main())
