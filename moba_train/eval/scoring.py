"""How well a model predicts given tokens: one forward pass over a row, under any context or tensor layout.

Logits are formed for a few thousand rows at a time, and only where a label counts.
Letters: T tokens held here, R of them with a label that counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moba_train.data.batch import Batch
from moba_train.eval.model import Model, fit_length, hidden_states, logits
from moba_train.train.step import to_row

__all__ = ["Scores", "document_row", "score"]

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Scores:
    """This context rank's share. hits: whether the label is the likeliest token, which greedy decoding would choose."""

    losses_R: torch.Tensor  # fp32, nats
    hits_R: torch.Tensor  # bool
    positions_R: torch.Tensor  # int64


def document_row(text: torch.Tensor, first_loss: int = 0, end_loss: int | None = None) -> Batch:
    """A row of one document from S + 1 tokens; the labels of rows first_loss .. end_loss (None: S) count."""
    length = len(text) - 1
    positions = torch.arange(length)
    return Batch(
        tokens=text[:-1],
        labels=text[1:],
        loss_mask=((positions >= first_loss) & (positions < (length if end_loss is None else end_loss))).float(),
        positions=positions,
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
    )


@torch.no_grad()
def score(model: Model, batch: Batch) -> Scores:
    """Loss and hit of every label of the (whole, unsharded) row that counts, on the context rank that holds it."""
    fit_length(model, int(batch.cu_seqlens[-1]))
    row = to_row(model, batch)
    hidden_TX = hidden_states(model, row.batch.tokens, row.batch.positions, row.params)
    rows_R = row.batch.loss_mask.nonzero()[:, 0]
    losses, hits = [], []
    for rows in rows_R.split(_ROWS_AT_ONCE):
        logits_RV, labels_R = logits(model, hidden_TX[rows]), row.batch.labels[rows]
        losses.append(F.cross_entropy(logits_RV, labels_R, reduction="none"))
        hits.append(logits_RV.argmax(-1) == labels_R)
    none = rows_R.new_zeros(0)
    return Scores(
        torch.cat(losses) if losses else none.float(),
        torch.cat(hits) if hits else none.bool(),
        row.batch.positions[rows_R],
    )
