"""One row of training data, and how it is padded and cut for context parallelism.

Invariant: `cu_seqlens` always speaks of the S rows of the whole (global) row of tokens, also after `shard`.
Shapes: S tokens of the whole row, T of them held here (T == S before `shard`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from moba_train.context_parallel.layout import Layout

__all__ = ["Batch"]


@dataclass(frozen=True, eq=False)
class Batch:
    """A row: what the model reads, what it should answer, and which answers count.

    Bounds and query positions stay on the host: whoever needs a size must not ask the device for it.
    """

    tokens: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T]; the token after each one, also where loss_mask is 0
    loss_mask: torch.Tensor  # float32 [T]; weight of the label in the loss, 0 where it does not count
    positions: torch.Tensor  # int64 [T]; counted from the start of each document
    cu_seqlens: torch.Tensor  # int32 [documents + 1], host; 0, ..., S
    q_positions: torch.Tensor | None = None  # int64 [T], host; global row of each token, None: all of them

    def pad(self, length: int) -> Batch:
        """The whole row, on the host, with filler up to `length` tokens: one document more, without loss.

        ValueError for a shard, and for a row that is longer.
        """
        filler = length - len(self.tokens)
        if self.q_positions is not None:
            raise ValueError("this batch is a shard already; pad the whole row")
        if filler < 0:
            raise ValueError(f"a row of {len(self.tokens)} tokens cannot be padded to {length}")
        if filler == 0:
            return self
        return replace(
            self,
            tokens=F.pad(self.tokens, (0, filler)),  # any id would do
            labels=F.pad(self.labels, (0, filler)),
            loss_mask=F.pad(self.loss_mask, (0, filler)),
            positions=torch.cat([self.positions, torch.arange(filler)]),
            cu_seqlens=torch.cat([self.cu_seqlens, self.cu_seqlens.new_tensor([length])]),
        )

    def shard(self, layout: Layout, rank: int) -> Batch:
        """The rows that context-parallel `rank` holds under `layout`; ValueError where their lengths differ."""
        if self.q_positions is not None:
            raise ValueError("this batch is a shard already; shard the whole row")
        if layout.length != len(self.tokens):
            raise ValueError(f"the layout is for {layout.length} rows, the batch has {len(self.tokens)}")
        rows = torch.tensor(layout.positions(rank), dtype=torch.int64)
        return replace(
            self,
            tokens=self.tokens[rows],
            labels=self.labels[rows],
            loss_mask=self.loss_mask[rows],
            positions=self.positions[rows],
            q_positions=rows,
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`; bounds and query positions stay on the host."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            loss_mask=self.loss_mask.to(device),
            positions=self.positions.to(device),
        )
