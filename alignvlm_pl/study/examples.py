"""`examples`, as the paper shows them of VCR: the first pages of each benchmark, with the answer of every arm."""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..scoring.records import file_name
from ..scoring.report import markdown_text
from .measure import Trained, benchmark_samples, measured, png_of, write_png
from .plan import Study
from .results import Results
from .tables import table


def measure(trained: Trained, settings: Mapping[str, Any], run: Callable[..., None]) -> Any:
    """Return the first `settings["count"]` samples of each benchmark: its name, `page` (a PNG in base64), `question`,
    `references` and `prediction`.
    """
    if settings.keys() != {"count"} or not (isinstance(settings["count"], int) and settings["count"] > 0):
        raise ConfigError(f"measures.examples={dict(settings)}: expected count, a number above 0")
    found = []
    for name, samples in benchmark_samples(trained).items():
        path = trained.tested / "predictions" / f"{file_name(name)}.jsonl"
        records = {one["key"]: one for one in map(json.loads, path.read_text("utf-8").splitlines())}
        for sample in islice((one for one in samples if one.images and one.key in records), settings["count"]):
            record = records[sample.key]
            shown = {key: record.get(key, "") for key in ("question", "references", "prediction")}
            found.append({"dataset": name, "page": png_of(sample.images[0].convert("RGB")), **shown})
    return found


def section(study: Study, results: Results, folder: Path) -> Iterator[str]:
    """Write a table of the pages, the answers of each arm's first seed beside them."""
    found = {arm: by_seed for arm, by_seed in measured(study, "examples", results).items() if by_seed}
    answers = {arm: next(iter(by_seed.values()))["measures"]["examples"]["found"] for arm, by_seed in found.items()}
    yield "## Examples"
    if not answers:
        yield "No arm has been measured."
        return
    rows = []
    for index, one in enumerate(next(iter(answers.values()))):
        write_png(folder / f"example-{index}.png", one["page"])
        texts = [one["dataset"], f"![page](example-{index}.png)", markdown_text(" | ".join(one["references"]))]
        rows.append([*texts, *(markdown_text(of_arm[index]["prediction"]) for of_arm in answers.values())])
    yield table(["dataset", "page", "reference", *answers], rows)
