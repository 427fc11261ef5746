"""The memory formula against every storage that a CPU run allocates."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moba_train.attention import SequenceInfo
from moba_train.context_parallel.layout import zigzag
from moba_train.context_parallel.memory import peak_bytes
from moba_train.context_parallel.wrap import STRATEGIES, wrap
from tests.helpers.spawn import run_distributed

ROWS, HEADS, HEAD_DIM, NUM_RANKS = 4096, 8, 64, 2
SETTINGS = [
    (strategy, key_heads, overlap, gather_heads)
    for strategy in STRATEGIES
    for key_heads in (1, 4, 8)
    for overlap in (True, False)
    for gather_heads in ((None, 1, 2, 4) if strategy == "all_gather" else (None,))
]


class Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, from their birth to their death."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref | None] = {x.untyped_storage()._cdata: None for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type == "cpu":
                self._count(x.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return

        def died(_) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self.live += size
        self._seen[key] = weakref.ref(storage, died)

    def peak_of(self, call: Callable, *known: Tensor) -> tuple[int, object]:
        """Peak of `call` above what lives before, and its result."""
        self._seen.update({x.untyped_storage()._cdata: None for x in known})
        dist.barrier()
        time.sleep(0.01)  # until gloo's threads have let go of what the last call sent
        before = self.peak = self.live
        with self:
            result = call()
        return self.peak - before, result


class StandIn(torch.autograd.Function):
    """Saves and returns what attention does and allocates nothing else."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = torch.empty_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def measure(rank: int, num_ranks: int) -> dict[tuple, tuple[int, int]]:
    seq = SequenceInfo([0, ROWS], zigzag(ROWS, num_ranks).positions(rank))
    peaks = {}
    for strategy, key_heads, overlap, gather_heads in SETTINGS:
        op = wrap(
            lambda q, k, v, seq: StandIn.apply(q, k, v),
            dist.group.WORLD,
            strategy,
            overlap=overlap,
            gather_heads=gather_heads,
        )
        leaves = [
            torch.zeros(ROWS // num_ranks, heads, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True)
            for heads in (HEADS, key_heads, key_heads)
        ]
        op(*leaves, seq)  # builds the positions that all layers share
        # The least of several: within a call, too, those threads may hold what was sent a moment longer.
        runs = [_peaks(op, leaves, seq) for _ in range(5)]
        peaks[strategy, key_heads, overlap, gather_heads] = tuple(map(min, *runs))
    return peaks


def _peaks(op: Callable, leaves: list[Tensor], seq: SequenceInfo) -> tuple[int, int]:
    tracker = Tracker(leaves)
    forward, (out, _) = tracker.peak_of(partial(op, *leaves, seq))
    grad = torch.zeros_like(out)
    backward, _ = tracker.peak_of(partial(torch.autograd.grad, out, leaves, grad), grad)
    return forward, backward


@pytest.fixture(scope="module")
def peaks() -> dict[tuple, tuple[int, int]]:
    return run_distributed(measure, NUM_RANKS)[0]


@pytest.mark.parametrize("strategy, key_heads, overlap, gather_heads", SETTINGS)
def test_peak_is_below_its_formula_and_near_it(peaks, strategy, key_heads, overlap, gather_heads):
    bound = peak_bytes(
        strategy,
        rows=ROWS,
        num_ranks=NUM_RANKS,
        heads=HEADS,
        key_heads=key_heads,
        head_dim=HEAD_DIM,
        gather_heads=gather_heads,
        overlap=overlap,
    )
    measured = peaks[strategy, key_heads, overlap, gather_heads]
    for name, found, limit in zip(bound._fields, measured, bound, strict=True):
        assert 0.75 * limit <= found <= 1.15 * limit, f"{name}: {found / limit:.3f} of the formula"


def test_gathering_fewer_heads_needs_less():
    few, all_heads = (
        peak_bytes(
            "all_gather", rows=2**20, num_ranks=8, heads=32, key_heads=8, head_dim=128, gather_heads=gather_heads
        )
        for gather_heads in (2, None)
    )
    assert few.forward < 0.6 * all_heads.forward
    assert few.backward < 0.4 * all_heads.backward
