"""Token text to rows: where documents begin and end inside a row, and which labels carry loss.

A document is what ends with an end-of-document token (EOD). Two modes:
  - packed: documents are kept apart. Positions restart after each EOD, and the label at an EOD input (the next
    document's first token) carries no loss. A document cut by the edge of a row starts anew in the next row.
  - concatenated: one document a row, positions 0..S-1, every label carries loss.
Filler after the end of the text is a document of its own without loss, known by its place and never by a token id.
Shapes: S tokens a row; a row is made from S + 1 tokens of text, so that every token has a label.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moba_train.data.batch import Batch

__all__ = ["pack_documents", "pack_row"]


def pack_row(text: torch.Tensor, eod_id: int, mode: str, num_real: int | None = None) -> Batch:
    """The Batch of one row from S + 1 tokens (int64); the first `num_real` (None: all) are text, the rest filler."""
    tokens, labels = text[:-1], text[1:]
    length = len(tokens)
    real = length + 1 if num_real is None else num_real
    loss_mask = torch.ones(length, dtype=torch.float32)
    ends = torch.empty(0, dtype=torch.int64)
    if mode == "packed":
        ends = torch.nonzero(tokens[:real] == eod_id).flatten() + 1
        loss_mask[ends - 1] = 0.0
    # The last real token has a filler label: it carries no loss either.
    loss_mask[max(real - 1, 0) :] = 0.0
    edges = torch.tensor([0, min(real, length), length])
    bounds = torch.unique(torch.cat([edges, ends]))  # sorted
    starts = bounds[:-1]
    positions = torch.arange(length) - torch.repeat_interleave(starts, bounds.diff())
    return Batch(tokens, labels, loss_mask, positions, cu_seqlens=bounds.to(torch.int32))


def pack_documents(documents: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int) -> Batch:
    """The Batch of S = `length` places that holds `documents` in turn, each kept apart.

    A document is its tokens (int64 [n], n > 1) and the loss weight of each as a label (float32 [n]); it takes n - 1
    places, as its last token is a label only. ValueError where they do not fit.
    """
    sizes = [len(tokens) - 1 for tokens, _ in documents]
    if sum(sizes) > length or any(size < 1 for size in sizes):
        raise ValueError(f"documents of {sizes} places do not fit into a row of {length}")
    none = torch.empty(0, dtype=torch.int64)  # a row of no document is all filler
    filled = Batch(
        tokens=torch.cat([none, *(tokens[:-1] for tokens, _ in documents)]),
        labels=torch.cat([none, *(tokens[1:] for tokens, _ in documents)]),
        loss_mask=torch.cat([none.float(), *(weights[1:] for _, weights in documents)]),
        positions=torch.cat([none, *(torch.arange(size) for size in sizes)]),
        cu_seqlens=torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32),
    )
    return filled.pad(length)
