"""One call of an op recorded in a graph of its own, to be differentiated by hand later.

A strategy runs the op this way inside its own autograd function: its backward then decides when collectives happen,
not the autograd engine, whose order could differ between ranks (a rank may hold no query of some document).

The graph owns no memory. What the op saves is handed to the strategy, which keeps it with its own saved tensors (so
that checkpointing and offloading see it) and brings it back for `gradients`. Of inputs that only *pass by* (keys and
values of other ranks) nothing is kept: the strategy brings those again, and where it likes the outputs too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

__all__ = ["Subgraph", "record", "take_graphs"]


@dataclass(frozen=True)
class _View:
    """What the op saved of a passing input: where it lies in that input's memory."""

    index: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Slots:
    """Where the graph finds its saved tensors: not on the Subgraph, which the graph would hold, and itself with it."""

    kept: list[Tensor] = field(default_factory=list)
    passing: list[Tensor] = field(default_factory=list)

    def find(self, handle: int | _View) -> Tensor:
        if isinstance(handle, int):
            return self.kept[handle]
        x = self.passing[handle.index]
        return x.as_strided(handle.size, handle.stride, x.storage_offset() + handle.offset)


def record(
    fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], passing: Sequence[Tensor] = ()
) -> tuple[Subgraph, list[Tensor]]:
    """Run `fn(*inputs, *passing)` and return its graph and its detached outputs. `passing` must be contiguous."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, *passing)]
    passing = leaves[len(inputs) :]
    slots = _Slots()

    def pack(x: Tensor) -> int | _View:
        for index, leaf in enumerate(passing):
            offset = (x.data_ptr() - leaf.data_ptr()) // leaf.element_size()
            if x.dtype == leaf.dtype and 0 <= offset < leaf.numel():
                return _View(index, tuple(x.shape), x.stride(), offset)
        slots.kept.append(x.detach())
        return len(slots.kept) - 1

    with torch.enable_grad(), saved_tensors_hooks(pack, slots.find):
        outputs = list(fn(*leaves))
    return Subgraph(leaves, slots, outputs), [x.detach() for x in outputs]


class Subgraph:
    """The graph of one call, made by `record`."""

    def __init__(self, leaves: list[Tensor], slots: _Slots, outputs: list[Tensor]):
        self._leaves, self._slots = leaves, slots
        self._shapes = [x.shape for x in leaves]
        for leaf in leaves:
            leaf.data = leaf.new_empty(0)
        self._edges = [get_gradient_edge(x) if x.requires_grad else None for x in outputs]
        self._num_kept = len(slots.kept)
        # Saved outputs: position among what was kept -> position among the outputs.
        self._saved_outputs = {
            i: j for i, x in enumerate(slots.kept) for j, y in enumerate(outputs) if _same_memory(x, y)
        }

    @property
    def works_from_outputs(self) -> bool:
        """Whether one autograd function made all outputs and saved them, as fused attention does.

        Its gradients follow from out and lse: given those of a larger softmax, it yields its own part of the larger
        gradients.
        """
        nodes = {edge.node for edge in self._edges if edge is not None}
        made_by_one = len(nodes) == 1 and all(isinstance(node, BackwardCFunction) for node in nodes)
        return made_by_one and set(self._saved_outputs.values()) == set(range(len(self._edges)))

    def take_saved(self, *, outputs: bool = True) -> list[Tensor]:
        """What the op saved, for the caller to keep and to give back to `gradients`; with its outputs or without."""
        kept, self._slots.kept = self._slots.kept, []
        return [x for i, x in enumerate(kept) if outputs or i not in self._saved_outputs]

    def gradients(
        self,
        grad_outputs: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        passing: Sequence[Tensor] = (),
        outputs: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Gradients of all inputs, given None for an output that was not used. Frees the graph: call it once.

        `outputs` are used for the saved ones, where those were not taken.
        """
        leaves, edges, slots = self._leaves, self._edges, self._slots
        self._leaves, self._edges = [], []
        pairs = [(x, g) for x, g in zip(edges, grad_outputs, strict=True) if x is not None and g is not None]
        grads: Sequence[Tensor | None] = [None] * len(leaves)
        if pairs:
            rest = iter(saved)
            place = {} if outputs is None else {i: outputs[j] for i, j in self._saved_outputs.items()}
            slots.kept = [place[i] if i in place else next(rest) for i in range(self._num_kept)]
            slots.passing = list(passing)
            used, weights = zip(*pairs, strict=True)
            grads = torch.autograd.grad(used, leaves, weights, allow_unused=True)
            slots.kept, slots.passing = [], []
        like = zip(leaves, grads, self._shapes, strict=True)
        return [x.new_zeros(shape) if grad is None else grad for x, grad, shape in like]


def take_graphs(ctx: Any) -> list:
    """`ctx.graphs` of an autograd function for its backward, once; before any communication, so that nobody waits."""
    graphs, ctx.graphs = ctx.graphs, None
    if graphs is None:
        raise RuntimeError("differentiated twice: a context-parallel attention frees its graph the first time")
    return graphs


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.numel() > 0 and x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
