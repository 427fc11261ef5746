"""Which samples a rank gets, and that stopping anywhere and going on changes nothing."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from moba_train.data.batch import Batch
from moba_train.data.loader import Loader
from moba_train.data.packing import pack_row


class Numbers:
    """Row i holds the token i alone."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return pack_row(torch.full((3,), index), -1, "packed")


def take(loader: Loader, count: int) -> list[int]:
    return [int(next(loader).tokens[0]) for _ in range(count)]


def run(sizes: list[int], batch_size: int, length: int) -> list[list[int]]:
    """Samples of each step, as data-parallel groups of these sizes see them one after the other, each resuming."""
    steps, state = [], {"consumed_samples": 0}
    for dp_size in sizes:
        loaders = [
            Loader(Numbers(length), global_batch_size=batch_size, dp_rank=r, dp_size=dp_size) for r in range(dp_size)
        ]
        for loader in loaders:
            loader.load_state_dict(state)
        steps.append([sample for loader in loaders for sample in take(loader, batch_size // dp_size)])
        states = [loader.state_dict() for loader in loaders]
        assert all(s == states[0] for s in states)
        state = states[0]
    return steps


@given(st.lists(st.sampled_from([1, 2, 3, 6]), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_every_step_has_its_samples_on_any_number_of_ranks(sizes: list[int]) -> None:
    expected = [list(range(6 * step, 6 * step + 6)) for step in range(len(sizes))]
    assert run(sizes, 6, 6 * len(sizes)) == expected


@given(st.integers(0, 24), st.integers(1, 10))
@settings(max_examples=25, deadline=None)
def test_stopped_anywhere_it_goes_on_from_the_last_whole_step(taken: int, more: int) -> None:
    options = {"global_batch_size": 8, "dp_rank": 1, "dp_size": 2}
    straight = take(Loader(Numbers(100), **options), taken + more)
    stopped = Loader(Numbers(100), **options)
    take(stopped, taken)
    state = stopped.state_dict()
    assert state == {"consumed_samples": taken // 4 * 8}
    resumed = Loader(Numbers(100), **options, start_sample=state["consumed_samples"])
    assert take(resumed, taken % 4 + more) == straight[taken // 4 * 4 :]
    stopped.load_state_dict(state)  # a row was read ahead: it must be forgotten
    assert take(stopped, taken % 4 + more) == straight[taken // 4 * 4 :]


def test_a_changed_batch_size_goes_on_at_the_next_sample() -> None:
    loader = Loader(Numbers(20), global_batch_size=4, dp_rank=0, dp_size=1)
    take(loader, 4)
    larger = Loader(Numbers(20), global_batch_size=6, dp_rank=1, dp_size=2)
    larger.load_state_dict(loader.state_dict())
    assert take(larger, 4) == [7, 8, 9, 13]


def test_the_end_of_the_data_is_named() -> None:
    loader = Loader(Numbers(10), global_batch_size=4, dp_rank=0, dp_size=2)
    assert take(loader, 4) == [0, 1, 4, 5]
    with pytest.raises(IndexError, match=r"ends after 10 samples, and step 8\.\.11 was asked for"):
        next(loader)


def test_an_unequal_share_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 0 of 3 cannot take an equal part of 4"):
        Loader(Numbers(10), global_batch_size=4, dp_rank=0, dp_size=3)
