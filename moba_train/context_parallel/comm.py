"""Collectives on an explicit group along dim 0: started early and awaited late, or differentiable.

`start_*` return a `Pending`; its `wait()` gives the result. On NCCL the collective runs on the group's own stream and
`wait` only orders the present stream after it: the host never blocks. On gloo `wait` blocks until the data is there.
Sums over ranks are taken in rank order with fp32 (or wider) accumulation: exact to one rounding, and deterministic.

Letters: `R` rows of all ranks, `r` rows of one rank; trailing dims are free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.context_parallel.copies import contiguous

__all__ = [
    "Pending",
    "all_gather",
    "all_to_all",
    "pipelined",
    "reduce_scatter",
    "start_all_gather",
    "start_all_to_all",
    "start_reduce_scatter",
    "start_shift",
    "start_sum",
]

Splits = list[int] | None
# Renamed in torch 2.13; the old name warns there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending:
    """Communication under way. `wait()`, called once, orders the present stream after it and returns its result."""

    def __init__(self, finish: Callable[[], Any]):
        self._finish: Callable[[], Any] | None = finish

    def wait(self) -> Any:
        assert self._finish is not None, "waited for twice"
        finish, self._finish = self._finish, None  # the buffers that `finish` holds are freed with it
        return finish()

    def then(self, use: Callable[[Any], Any]) -> Pending:
        """The same, with `use` applied to the result when it is waited for."""
        return Pending(lambda: use(self.wait()))

    @staticmethod
    def of(work: dist.Work, result: Tensor) -> Pending:
        def finish() -> Tensor:
            work.wait()
            return result

        return Pending(finish)

    @staticmethod
    def all(pendings: list[Pending]) -> Pending:
        """Several at once; the result is the list of results."""
        return Pending(lambda: [pending.wait() for pending in pendings])


def start_all_gather(x_local: Tensor, group: dist.ProcessGroup) -> Pending:
    """Rows of all ranks in rank order: [r, ...] -> [R, ...]. Every rank has the same r."""
    x_local = contiguous(x_local)
    gathered = x_local.new_empty(group.size() * x_local.shape[0], *x_local.shape[1:])
    work = _all_gather_single(gathered, x_local, group=group, async_op=True)
    return Pending.of(work, gathered)


def start_all_to_all(
    x: Tensor, group: dist.ProcessGroup, output_splits: Splits = None, input_splits: Splits = None
) -> Pending:
    """Rank i gets the i-th split of everybody's rows, in rank order. Without splits, equal parts.

    `input_splits[j]` rows go to rank j, `output_splits[j]` rows come from it.
    """
    x = contiguous(x)
    rows = x.shape[0] if output_splits is None else sum(output_splits)
    received = x.new_empty(rows, *x.shape[1:])
    work = dist.all_to_all_single(received, x, output_splits, input_splits, group=group, async_op=True)
    return Pending.of(work, received)


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """The sum over ranks of this rank's rows: [R, ...] -> [r, ...].

    An all-to-all and a local sum: the bytes of a reduce-scatter, without rounding bf16 at every hop.
    """
    return start_all_to_all(x, group).then(lambda received: _sum_ranks(received, group.size()))


def start_shift(tensors: list[Tensor], group: dist.ProcessGroup) -> Pending:
    """Send these to the next rank of the ring; the result is what the rank before sent, of the same shapes."""
    rank, num_ranks = group.rank(), group.size()
    after, before = (dist.get_global_rank(group, (rank + step) % num_ranks) for step in (1, -1))
    received = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    transfers = []
    for sent, empty in zip(tensors, received, strict=True):
        if sent.numel():
            transfers.append(dist.P2POp(dist.isend, sent.contiguous(), after, group))
            transfers.append(dist.P2POp(dist.irecv, empty, before, group))
    works = dist.batch_isend_irecv(transfers) if transfers else []

    def finish() -> list[Tensor]:
        for work in works:
            work.wait()
        transfers.clear()  # what was sent must outlive the sending
        return received

    return Pending(finish)


def start_sum(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """The sum over ranks, in place."""
    return Pending.of(dist.all_reduce(x, group=group, async_op=True), x)


def pipelined(
    num_steps: int,
    fetch: Callable[[int], Pending],
    compute: Callable[[int, Any], Any],
    deliver: Callable[[int, Any], Pending] | None = None,
    *,
    overlap: bool = True,
) -> None:
    """For each step: what `fetch` brings goes through `compute`, and `deliver` takes its result away.

    With `overlap`, the next step's fetch and the last step's delivery run under the present compute.
    """
    arriving, leaving = fetch(0), None
    for step in range(num_steps):
        more = step + 1 < num_steps
        inputs = arriving.wait()
        if overlap and more:
            arriving = fetch(step + 1)
        result = compute(step, inputs)
        if leaving is not None:
            leaving.wait()
        leaving = deliver(step, result) if deliver is not None else None
        del inputs, result
        if not overlap and more:
            if leaving is not None:
                leaving.wait()
            leaving, arriving = None, fetch(step + 1)
    if leaving is not None:
        leaving.wait()


def all_gather(x_local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Differentiable: [r, ...] -> [R, ...] in rank order; the gradient is reduce-scattered."""
    return _AllGather.apply(x_local, group)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Differentiable: [R, ...] -> [r, ...], summed over ranks; the gradient is all-gathered."""
    return _ReduceScatter.apply(x, group)


def all_to_all(
    x: Tensor, group: dist.ProcessGroup, output_splits: Splits = None, input_splits: Splits = None
) -> Tensor:
    """Differentiable `start_all_to_all`; the gradient goes back the same way."""
    return _AllToAll.apply(x, group, output_splits, input_splits)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_local, group):
        ctx.group = group
        return start_all_gather(x_local, group).wait()

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return start_reduce_scatter(x, group).wait()

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad, ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, output_splits, input_splits):
        ctx.group, ctx.splits = group, (input_splits, output_splits)
        return start_all_to_all(x, group, output_splits, input_splits).wait()

    @staticmethod
    def backward(ctx, grad):
        return all_to_all(grad, ctx.group, *ctx.splits), None, None, None


def _sum_ranks(x: Tensor, num_ranks: int) -> Tensor:
    return x.unflatten(0, (num_ranks, -1)).sum(0) if x.numel() else x[: x.shape[0] // num_ranks]
