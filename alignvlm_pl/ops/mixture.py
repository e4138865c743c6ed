"""What every back-end returns."""

from typing import NamedTuple

from torch import Tensor


class Mixture(NamedTuple):
    """Result of a back-end.

    Args:
        embeds: (N, D) weighted averages of the table's rows; None where no table was given.
        log_probs: (N, columns) log P_vocab of the columns asked for, at least float32; None where none were.
    """

    embeds: Tensor | None
    log_probs: Tensor | None
