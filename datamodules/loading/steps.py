"""Micro batches of an optimizer step, fetched together.

The loss of a step is a mean over the supervised tokens of all its micro batches on all ranks, so their number must be
known before the first backward pass: the first micro batch of a step has a summary of all, `step`.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

from alignvlm_pl.preprocessing.batch import Batch, StepSummary


def summary(batch: Batch) -> StepSummary:
    """Return the fields of a micro batch that determine its number of supervised tokens and characters."""
    return {
        "num_supervised": batch["num_supervised"],
        "lines": batch["lines"],
        "sizes": batch["sizes"],
        "tiles": batch["tiles"],
    }


def with_steps(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Group the micro batches of a custom DataLoader into optimizer steps.

    Args:
        batches: Micro batches, as `Collator` makes them.
        size: Micro batches of a step, `trainer.accumulate_grad_batches`.

    Yields:
        The micro batches with `step`: in the first one of a step the summaries of all of it, in the others None.
    """
    rest = iter(batches)
    while step := list(islice(rest, size)):
        summaries = [summary(batch) for batch in step]
        for number, batch in enumerate(step):
            batch["step"] = None if number else summaries
            yield batch
