"""The rows before a rank's own: who sends what, as integers; then the key convolution on ranks against one device."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moba_train.attention import SequenceInfo, convolve_keys
from moba_train.context_parallel.halo import HaloPlan, halo_plan, with_halo
from moba_train.context_parallel.layout import RULES, Layout
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import assert_close

# Lengths of documents, 48 rows in all; chunks of a balanced layout are shorter than some reaches.
PACKINGS = {
    "one_document": [48],
    "packed": [5, 0, 1, 13, 1, 1, 9, 0, 18],
    "bounds_on_chunks": [12, 12, 24],
    "single_tokens": [1] * 48,
}
WIDTHS = (1, 4, 9)
TEAMS = ((0, 1), (0, 1, 2))


def bounds_of(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def rows_of(chunks) -> list[int]:
    return [row for start, stop in chunks for row in range(start, stop)]


def exchanged(layout: Layout, plans: list[HaloPlan], rank: int) -> list[int]:
    """The global rows that `rank` holds after all ranks did as their plans say."""
    received: list[int] = []
    for source, plan in enumerate(plans):
        own = layout.positions(source)
        sent = [own[place] for place in rows_of(plan.sent)]
        before = sum(plan.sent_to[:rank])
        taken = sent[before : before + plan.sent_to[rank]]
        assert len(taken) == plans[rank].received_from[source]
        received += taken
    own = layout.positions(rank)
    return [row for arrived, *chunk in plans[rank].pieces for row in (received if arrived else own)[slice(*chunk)]]


@given(
    rule=st.sampled_from(sorted(RULES)),
    num_ranks=st.integers(1, 5),
    rows_per_chunk=st.integers(1, 9),
    reach=st.integers(0, 12),
    data=st.data(),
)
def test_every_row_has_those_before_it_in_its_document(rule, num_ranks, rows_per_chunk, reach, data) -> None:
    length = 2 * num_ranks * rows_per_chunk
    cuts = data.draw(st.lists(st.integers(0, length), max_size=8))
    bounds = [0, *sorted(cuts), length]
    layout = RULES[rule](length, num_ranks, bounds)
    plans = [halo_plan(layout, rank, bounds, reach) for rank in range(num_ranks)]
    for rank, plan in enumerate(plans):
        held, own = exchanged(layout, plans, rank), layout.positions(rank)
        assert held == rows_of(plan.rows) == sorted(held)
        needed = {
            before
            for row in own
            for before in range(max(row - reach, max(bound for bound in bounds if bound <= row)), row + 1)
        }
        assert set(held) == needed
        assert plan.needed == any(sum(other.received_from) for other in plans)


def test_a_zigzag_rank_asks_for_the_rows_before_both_its_chunks() -> None:
    plans = [halo_plan(RULES["zigzag"](16, 2, None), rank, [0, 16], 3) for rank in range(2)]
    assert plans[0].rows == ((0, 4), (9, 16))  # rows 12-15 need 9-11 of rank 1
    assert plans[1].rows == ((1, 12),)  # rows 4-7 need 1-3 of rank 0
    assert (plans[0].sent, plans[0].sent_to, plans[0].received_from) == (((1, 4),), [0, 3], [0, 3])
    assert (plans[1].sent, plans[1].sent_to, plans[1].received_from) == (((5, 8),), [3, 0], [3, 0])


def test_documents_that_end_with_chunks_exchange_nothing() -> None:
    plan = halo_plan(RULES["zigzag"](16, 2, None), 0, [0, 4, 8, 12, 16], 3)
    assert not plan.needed
    assert plan.rows == ((0, 4), (12, 16))


def differentiated(keys: Tensor, weight: Tensor, grad: Tensor, convolve) -> list[Tensor]:
    leaves = [keys.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = convolve(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def convolve_on_ranks(rank: int, num_ranks: int) -> None:
    groups = [(team, dist.new_group(list(team))) for team in TEAMS]
    generator = torch.Generator().manual_seed(0)
    keys, grad = (torch.randn(48, 2, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    for team, group in groups:
        if rank not in team:
            continue
        for name, rule in RULES.items():
            for packing, lengths in PACKINGS.items():
                bounds = bounds_of(lengths)
                positions = rule(48, len(team), bounds).positions(team.index(rank))
                local = SequenceInfo(bounds, positions)
                for width in WIDTHS:
                    weight = torch.randn(
                        2, 4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width)
                    )
                    whole = SequenceInfo(bounds)
                    expected = differentiated(keys, weight, grad, lambda k, w, whole=whole: convolve_keys(k, w, whole))

                    def convolve(k: Tensor, w: Tensor, local=local, group=group, rule=rule) -> Tensor:
                        held, seq = with_halo(k, local, group, rule, w.shape[2] - 1)
                        return convolve_keys(held, w, seq)

                    out, dk, dweight = differentiated(keys[positions], weight, grad[positions], convolve)
                    dist.all_reduce(dweight, group=group)
                    what = f"{name} {packing} {width}"
                    assert_close(out, expected[0][positions], torch.float64, f"out {what}")
                    assert_close(dk, expected[1][positions], torch.float64, f"dk {what}")
                    assert_close(dweight, expected[2], torch.float64, f"dweight {what}")
    with pytest.raises(ValueError, match="each of 3 context ranks holds 16"):
        with_halo(keys, SequenceInfo([0, 48], range(16)), groups[-1][1], RULES["zigzag"], 3)


def test_convolution_over_ranks_equals_one_device() -> None:
    run_distributed(convolve_on_ranks, 3)
