"""What the wrapper refuses, and what a context of one rank costs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from moba_train.attention import SequenceInfo, full_attention, moba_attention
from moba_train.context_parallel.layout import zigzag
from moba_train.context_parallel.wrap import STRATEGIES, wrap

ROWS = 24


@pytest.fixture
def pair():
    """Rank 0 of 2, of a backend that moves nothing: enough for what is refused before any communication."""
    dist.init_process_group("fake", rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


def arguments(heads: int = 4, key_heads: int = 2, rows: int = ROWS // 2, **changes):
    q, k = torch.zeros(rows, heads, 8), torch.zeros(rows, key_heads, 8)
    return q, k, k, SequenceInfo([0, ROWS], **({"q_positions": zigzag(ROWS, 2).positions(0)} | changes))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("op", [full_attention, moba_attention])
def test_a_context_of_one_rank_is_the_op_itself(strategy, op):
    assert wrap(op, None, strategy) is op


def test_unknown_strategy():
    with pytest.raises(ValueError, match="'rink' is not one of all_gather, all_to_all, ring"):
        wrap(full_attention, None, "rink")


def test_no_heads_to_gather():
    with pytest.raises(ValueError, match="gather_heads = 0: give a number of key heads of at least 1"):
        wrap(full_attention, None, gather_heads=0)


def test_all_to_all_twice(pair):
    with pytest.raises(ValueError, match="one all_to_all: drop inner_group"):
        wrap(full_attention, pair, "all_to_all", inner_group=pair)


@pytest.mark.parametrize(
    "heads, key_heads, refused",
    [(4, 2, False), (2, 1, False), (4, 4, False), (6, 3, True), (3, 1, True)],
)
def test_all_to_all_names_heads_that_cannot_be_dealt(pair, heads, key_heads, refused):
    op = wrap(lambda q, k, v, seq: (q, q[..., 0]), pair, "all_to_all")
    with pytest.raises(ValueError, match="use all_gather or ring") if refused else nullcontext():
        op(*arguments(heads, key_heads))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": 11}, "q has 11 rows, but each of 2 context ranks holds 12 of 24"),
        ({"heads": 5}, "5 query heads are not divisible by 2 key heads"),
        ({"q_positions": None}, r"use layout.positions\(0\)"),
        ({"q_positions": zigzag(ROWS, 2).positions(1)}, r"not the rows of context rank 0"),
        ({"k_positions": zigzag(ROWS, 2).positions(0)}, "k_positions are the wrapper's own business"),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inputs_that_do_not_fit(pair, strategy, changes, message):
    with pytest.raises(ValueError, match=message):
        wrap(full_attention, pair, strategy)(*arguments(**changes))


def test_a_length_that_does_not_divide_names_the_padding(pair):
    with pytest.raises(ValueError, match="pad the batch to 24 rows"):
        wrap(full_attention, pair)(*arguments()[:3], SequenceInfo([0, 22], q_positions=range(11)))
