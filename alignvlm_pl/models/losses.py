"""Next-token loss over supervised positions only."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..ops.linear_cross_entropy import check_loss_backend as check_loss_backend
from ..ops.linear_cross_entropy import head_losses
from ..preprocessing.batch import supervised_positions
from ..preprocessing.chat import IGNORE_INDEX


class TokenLoss(NamedTuple):
    """Cross entropy of a batch, in float32; the sums in float64 for a model in float64.

    `total` is the sum over the supervised positions, with gradient, and `supervised` their number; of each document in
    reading order, (documents,), `document_sums` has no gradient. `kept_tokens` (tiles,) are the visual tokens of each
    tile that the LLM ran on; None: all, or the LLM did not run.
    """

    total: Tensor
    supervised: Tensor
    document_sums: Tensor
    document_supervised: Tensor
    kept_tokens: Tensor | None = None


def check_labels(labels: Tensor, size: torch.Size, *, vocabulary: int | None) -> Tensor:
    """Return labels (B, L) as int64, for an input of this `size`.

    With the size V of a `vocabulary` the ids are looked at, for which a GPU is waited for.

    Raises:
        DataError: They have another shape or type, or an id that is neither below V nor `IGNORE_INDEX`.
    """
    if labels.shape != size:
        raise DataError(
            f"labels have shape {tuple(labels.shape)}, expected {tuple(size)}, as the input; they are shifted inside "
            "the model"
        )
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise DataError(f"labels are of {labels.dtype}, expected ids of torch.int64")
    labels = labels.long()
    if vocabulary is not None:
        invalid = labels[(labels >= vocabulary) | ((labels < 0) & (labels != IGNORE_INDEX))]
        if len(invalid):
            raise DataError(
                f"labels have the id {int(invalid[0])}, expected 0 to {vocabulary - 1} of the LLM's vocabulary, or "
                f"{IGNORE_INDEX} where a position is not supervised"
            )
    return labels


def supervised_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    *,
    segment_ids: Tensor | None = None,
    positions: Tensor | None = None,
    num_documents: int | None = None,
    backend: str = "auto",
    chunk_tokens: int | None = None,
) -> TokenLoss:
    """Compute the summed next-token cross entropy; the LM head runs on supervised positions only. A batch without them
    has loss 0 and zero gradients.

    `hidden` are the last hidden states (B, L, D), `labels` (B, L) token ids, `IGNORE_INDEX` where not supervised:
    position t is predicted from t - 1. `segment_ids` (B, L) are the numbers of the documents of packed rows, from 1, 0
    for padding; None: each row is one document. For the others see `linear_cross_entropy.head_losses`.

    `positions` (n,) are the indices of the labels to look at, see `preprocessing.batch.supervised_positions`; those of
    them that are `IGNORE_INDEX` have no loss. They and `num_documents` are else found in the tensors, for which a GPU
    is waited for.

    Raises:
        ConfigError: The back-end is unknown, or does not support this head, device or precision.
    """
    if positions is None:
        positions = supervised_positions(labels)
    targets = labels.flatten().index_select(0, positions)
    ignored = targets == IGNORE_INDEX
    states, known = hidden.flatten(0, 1).index_select(0, positions - 1), targets.masked_fill(ignored, 0)
    losses = head_losses(states, known, head, backend=backend, chunk_tokens=chunk_tokens).masked_fill(ignored, 0)
    supervised = (~ignored).to(losses.dtype)
    if segment_ids is None:
        document, documents = positions // labels.shape[1], len(labels)
    else:
        per_row = segment_ids.amax(dim=1)
        numbers = segment_ids + (per_row.cumsum(0) - per_row - 1)[:, None]  # of documents in the batch
        document = numbers.flatten().index_select(0, positions)
        documents = int(per_row.sum()) if num_documents is None else num_documents
    sums, counts = losses.new_zeros(2, documents)
    sums.index_add_(0, document, losses.detach())
    counts.index_add_(0, document, supervised)
    return TokenLoss(losses.sum(), supervised.sum().to(torch.float32), sums, counts)
