"""Differentiable collectives on gloo ranks, against what they mean on the tensors of all ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist

from moba_train.context_parallel.comm import Pending, all_gather, all_to_all, pipelined, reduce_scatter, start_shift
from tests.helpers.spawn import run_distributed

NUM_RANKS = 2
ROWS = 6  # of one rank
SPLITS = [[2, 4], [6, 0]]  # rows of rank i for rank j
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def everyone(dtype: torch.dtype, seed: int, rows: int = ROWS) -> list[torch.Tensor]:
    """One tensor per rank, small whole numbers: sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-8, 8, (rows, 2), generator=generator).to(dtype) for _ in range(NUM_RANKS)]


def compare(function, inputs, expected, grad_outputs, expected_grads, rank) -> bool:
    x = inputs[rank].clone().requires_grad_()
    out = function(x)
    (grad,) = torch.autograd.grad(out, x, grad_outputs[rank])
    return torch.equal(out, expected[rank]) and torch.equal(grad, expected_grads[rank])


def run_all(rank: int, num_ranks: int) -> dict[str, bool]:
    group, results = dist.group.WORLD, {}
    for dtype in DTYPES:
        small, wide = everyone(dtype, 0), everyone(dtype, 1, ROWS * NUM_RANKS)
        gathered = [torch.cat(small)] * NUM_RANKS
        summed = list(sum(wide).chunk(NUM_RANKS))
        results[f"all_gather {dtype}"] = compare(partial(all_gather, group=group), small, gathered, wide, summed, rank)
        scatter = partial(reduce_scatter, group=group)
        results[f"reduce_scatter {dtype}"] = compare(scatter, wide, summed, small, gathered, rank)
        parts = [x.split(rows) for x, rows in zip(small, SPLITS, strict=True)]
        swapped = [torch.cat([parts[i][j] for i in range(NUM_RANKS)]) for j in range(NUM_RANKS)]
        swap = partial(all_to_all, group=group, output_splits=[row[rank] for row in SPLITS], input_splits=SPLITS[rank])
        results[f"all_to_all {dtype}"] = compare(swap, small, swapped, swapped, small, rank)
        shifted = start_shift([small[rank], wide[rank]], group).wait()
        before = (rank - 1) % NUM_RANKS
        results[f"shift {dtype}"] = torch.equal(shifted[0], small[before]) and torch.equal(shifted[1], wide[before])
    empty = torch.zeros(0, 2)
    results["nothing"] = all_gather(empty, group).shape == reduce_scatter(empty, group).shape == (0, 2)
    return results


@pytest.fixture(scope="module")
def results_of_all_ranks() -> list[dict[str, bool]]:
    return run_distributed(run_all, NUM_RANKS)


@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter", "all_to_all", "shift", "nothing"])
def test_collectives_and_their_gradients(results_of_all_ranks, name):
    for rank, results in enumerate(results_of_all_ranks):
        chosen = {key: right for key, right in results.items() if key.startswith(name)}
        assert chosen
        assert all(chosen.values()), f"rank {rank}: {chosen}"


@pytest.mark.parametrize("overlap, expected", [(True, "f0 w0 f1 c0 d0 w1 f2 c1 e0 d1 w2 c2 e1 d2 e2"), (False, None)])
def test_pipelined_keeps_one_fetch_and_one_delivery_under_way(overlap, expected):
    expected = expected or "f0 w0 c0 d0 e0 f1 w1 c1 d1 e1 f2 w2 c2 d2 e2"
    log: list[str] = []

    def step(started: str, waited: str):
        def start(i, *_):
            log.append(f"{started}{i}")
            return Pending(lambda: log.append(f"{waited}{i}"))

        return start

    pipelined(3, step("f", "w"), lambda i, _: log.append(f"c{i}"), step("d", "e"), overlap=overlap)
    assert " ".join(log) == expected
