"""A benchmark as a torchmetrics metric: answers of all ranks in, figures of the whole set out."""

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from alignvlm_pl.benchmarks import Benchmark

from .records import Record, merge_records, to_answers, unread
from .run import score_answers


class BenchmarkMetric(Metric):
    """Score a benchmark over all ranks.

    The state is the answers themselves, as bytes: sums of rounded scores would depend on which rank had which
    answer, and a document's fields may lie on several ranks. What `compute` returns is therefore equal, to the last
    digit, on one process and on any number of uneven ones. 10,000 answers are about 3 MB.

    Args:
        benchmark: What to score.
        expected: Questions the set has; None: the benchmark's own sizes.
        **kwargs: Of `torchmetrics.Metric`.
    """

    full_state_update = False
    lines: list[Tensor] | Tensor

    def __init__(self, benchmark: Benchmark, *, expected: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.benchmark = benchmark
        self.expected = expected
        self.problems: list[str] = []
        self.add_state("lines", [], dist_reduce_fx="cat")

    def update(self, records: Iterable[Record]) -> None:
        """Add prediction records."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        new = torch.tensor(bytearray(text.encode()), dtype=torch.uint8)
        self.lines = [*self._held(), new.to(self.device)]

    def sync(self, *arguments: Any, **named: Any) -> None:
        """Gather the state of all ranks; a rank that answered nothing takes part, or the others would wait for it."""
        self.lines = [torch.empty(0, dtype=torch.uint8, device=self.device), *self._held()]
        super().sync(*arguments, **named)

    def compute(self) -> dict[str, float]:
        """Return `num`, the figures, as fractions of 1, and `complete`: 1, or 0 where `problems` says why not."""
        records = self.records()
        scored = score_answers(
            self.benchmark,
            to_answers(records),
            expected=self.expected,
            resamples=0,
            problems=unread(records),
        )
        self.problems = scored.problems
        return {"num": float(scored.num), **scored.figures, "complete": float(not scored.problems)}

    def gather(self) -> list[Record]:
        """Return the records of all ranks, each key once, in key order, on every rank."""
        with self.sync_context():
            return self.records()

    def records(self) -> list[Record]:
        """Return the records held here, each key once, in key order."""
        text = b"".join(bytes(lines.cpu().numpy()) for lines in self._held()).decode()
        return merge_records(json.loads(line) for line in text.splitlines())

    def _held(self) -> list[Tensor]:
        # A list before the gathering, one tensor after it.
        return [self.lines] if isinstance(self.lines, Tensor) else self.lines
