"""What the shared cases do not show: bf16, memory, given picks, no gradient, checkpointing, a second backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from moba_train.attention import SequenceInfo, full_attention, moba_attention, select_blocks
from moba_train.context_parallel.layout import zigzag
from moba_train.context_parallel.wrap import STRATEGIES, wrap
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import assert_close

NUM_RANKS = 2
BOUNDS = [0, 101, 128]
HEADS, KEY_HEADS, HEAD_DIM = 8, 4, 16
ROUTING = {"block_size": 8, "top_k": 3}


def draw(heads: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BOUNDS[-1], heads, HEAD_DIM, dtype=torch.float64, generator=generator).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [draw(heads, dtype, seed) for seed, heads in enumerate((HEADS, KEY_HEADS, KEY_HEADS))]


def grad_out(dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(HEADS, dtype, 3)


def run(op, tensors: list[Tensor], seq: SequenceInfo, grad: Tensor, **options) -> list[Tensor]:
    """out and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, _ = op(*leaves, seq, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


class Rank:
    """One rank's rows, and the answers of one device."""

    def __init__(self, rank: int):
        self.positions = torch.tensor(zigzag(BOUNDS[-1], NUM_RANKS).positions(rank))
        self.whole, self.seq = SequenceInfo(BOUNDS), SequenceInfo(BOUNDS, self.positions)

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        return [x[self.positions] for x in tensors]

    def compare(self, got: list[Tensor], expected: list[Tensor]) -> None:
        for name, x, y in zip(("out", "dq", "dk", "dv"), got, self.local(expected), strict=True):
            assert_close(x, y, torch.float64, name)


def bf16_errors(me: Rank, strategy: str) -> dict[str, tuple[float, float]]:
    """Root mean square error against fp64, under context parallelism and on one device, of each tensor."""
    low, grad = inputs(torch.bfloat16), grad_out(torch.bfloat16)
    picks = select_blocks(low[0], low[1], me.whole, **ROUTING)
    exact = run(moba_attention, [x.double() for x in low], me.whole, grad.double(), picks=picks, **ROUTING)
    single = run(moba_attention, low, me.whole, grad, **ROUTING)
    wrapped = wrap(moba_attention, dist.group.WORLD, strategy, gather_heads=2)
    (grad_local,) = me.local([grad])
    several = run(wrapped, me.local(low), me.seq, grad_local, **ROUTING)

    def error(x: Tensor, y: Tensor) -> float:
        return float((x.double() - y).square().mean().sqrt())

    names = ("out", "dq", "dk", "dv")
    pairs = zip(names, several, me.local(single), me.local(exact), strict=True)
    return {name: (error(x, truth), error(y, truth)) for name, x, y, truth in pairs}


def given_picks(me: Rank, strategy: str) -> None:
    """Picks of the caller are used, not made anew: here those of other queries."""
    tensors = inputs()
    picks = select_blocks(-tensors[0], tensors[1], me.whole, **ROUTING)
    expected = run(moba_attention, tensors, me.whole, grad_out(), picks=picks, **ROUTING)
    wrapped = wrap(moba_attention, dist.group.WORLD, strategy, gather_heads=2)
    grad, local_picks = me.local([grad_out(), picks])
    me.compare(run(wrapped, me.local(tensors), me.seq, grad, picks=local_picks, **ROUTING), expected)


def composed_op(me: Rank, strategy: str) -> None:
    """An op of many autograd functions, which no saved out and lse can stand for."""
    routing = ROUTING | {"backend": "reference"}
    expected = run(moba_attention, inputs(), me.whole, grad_out(), **routing)
    wrapped = wrap(moba_attention, dist.group.WORLD, strategy, gather_heads=2)
    (grad,) = me.local([grad_out()])
    me.compare(run(wrapped, me.local(inputs()), me.seq, grad, **routing), expected)


def without_gradient(me: Rank, strategy: str) -> None:
    expected, _ = full_attention(*inputs(), me.whole)
    wrapped = wrap(full_attention, dist.group.WORLD, strategy)
    local = [x.requires_grad_() for x in me.local(inputs())]
    with torch.no_grad():
        out, _ = wrapped(*local, me.seq)
    assert not out.requires_grad
    assert_close(out, expected[me.positions], torch.float64)


def recomputed(me: Rank, strategy: str) -> None:
    wrapped = wrap(full_attention, dist.group.WORLD, strategy)
    for reentrant in (True, False):

        def op(q, k, v, seq, reentrant=reentrant):
            return checkpoint(wrapped, q, k, v, seq, use_reentrant=reentrant)

        leaves = [x.requires_grad_() for x in me.local(inputs())]
        out, _ = op(*leaves, me.seq)
        (grad,) = me.local([grad_out()])
        out.backward(grad)
        me.compare([out.detach(), *(x.grad for x in leaves)], run(full_attention, inputs(), me.whole, grad_out()))


def one_gradient_only(me: Rank, strategy: str) -> None:
    """Only the values want a gradient, and only lse-free outputs are used."""
    q, k, v = me.local(inputs())
    v.requires_grad_()
    out, _ = wrap(full_attention, dist.group.WORLD, strategy)(q, k, v, me.seq)
    (grad,) = me.local([grad_out()])
    (dv,) = torch.autograd.grad(out, v, grad)
    expected = run(full_attention, inputs(), me.whole, grad_out())[3]
    assert_close(dv, expected[me.positions], torch.float64)


def second_backward(me: Rank, strategy: str) -> None:
    leaves = [x.requires_grad_() for x in me.local(inputs())]
    out, _ = wrap(full_attention, dist.group.WORLD, strategy)(*leaves, me.seq)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        out.sum().backward()


def heads_alive(me: Rank) -> tuple[list[int], list[bool]]:
    """Key heads per call of the op under gather_heads=2, and whether K and V of the calls outlive forward."""
    storages, widths = [], []

    def op(q, k, v, seq):
        widths.append(k.shape[1])
        storages.extend(StorageWeakRef(x.untyped_storage()) for x in (k, v))
        return full_attention(q, k, v, seq)

    leaves = [x.requires_grad_() for x in me.local(inputs())]
    out, _ = wrap(op, dist.group.WORLD, gather_heads=2)(*leaves, me.seq)
    assert out.requires_grad
    return widths, [not storage.expired() for storage in storages]


CHECKS = [given_picks, composed_op, without_gradient, recomputed, one_gradient_only, second_backward]


def run_all(rank: int, num_ranks: int) -> dict:
    me = Rank(rank)
    results: dict = {"heads_alive": heads_alive(me)}
    for strategy in STRATEGIES:
        results["bf16", strategy] = bf16_errors(me, strategy)
        for check in CHECKS:
            try:
                results[check.__name__, strategy] = check(me, strategy)
            except (AssertionError, RuntimeError) as problem:
                results[check.__name__, strategy] = repr(problem)
    return results


@pytest.fixture(scope="module")
def results_of_all_ranks() -> list[dict]:
    return run_distributed(run_all, NUM_RANKS)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_details(results_of_all_ranks, check, strategy):
    problems = [results[check, strategy] for results in results_of_all_ranks]
    assert problems == [None] * NUM_RANKS


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_errs_little_more_than_on_one_device(results_of_all_ranks, strategy):
    for rank, results in enumerate(results_of_all_ranks):
        for name, (several, single) in results["bf16", strategy].items():
            assert several <= 1.5 * single, f"{name} of rank {rank}: {several:.2e} against {single:.2e}"


def test_gathered_heads_come_and_go(results_of_all_ranks):
    for widths, kept in (results["heads_alive"] for results in results_of_all_ranks):
        assert widths == [1] * KEY_HEADS  # one attended to, one arriving: two alive
        assert kept == [False] * 2 * KEY_HEADS
