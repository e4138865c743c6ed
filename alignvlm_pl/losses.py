"""Next-token loss over supervised positions only."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .chat import IGNORE_INDEX
from .errors import DataError


def supervised_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
    """Sum of the next-token cross entropy; only supervised positions meet the LM head.

    Args:
        hidden: (B, L, D) last hidden states.
        labels: (B, L) token ids, `IGNORE_INDEX` where there is no loss. Position t is predicted from t - 1.
        head: The LM head, (n, D) -> (n, V).

    Returns:
        The sum in float32 and the number of supervised positions.

    Raises:
        DataError: If nothing is supervised.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    count = supervised.sum()
    if int(count) == 0:
        raise DataError("the batch has no supervised token: every label is masked")
    logits = head(hidden[:, :-1][supervised])
    return F.cross_entropy(logits.float(), targets[supervised], reduction="sum"), count.to(torch.float32)
