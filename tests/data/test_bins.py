"""Packing: nothing lost, nothing too long, as good as first-fit decreasing promises, the same at every call."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from moba_train.data.bins import epoch_bins, pack

METHODS = ("first_fit_decreasing", "sequential", "none")


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 70))
@settings(max_examples=60, deadline=None)
def test_every_item_once_and_no_bin_too_full(lengths: list[int], capacity: int) -> None:
    for method in METHODS:
        bins = pack(lengths, capacity, method)
        assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
        assert all(0 < sum(lengths[item] for item in items) <= capacity for items in bins)


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook's quadratic loop."""
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        for items in bins:
            if sum(lengths[i] for i in items) + lengths[item] <= capacity:
                items.append(item)
                break
        else:
            bins.append([item])
    return bins


@given(st.lists(st.integers(1, 50), max_size=60))
@settings(max_examples=60, deadline=None)
def test_first_fit_decreasing_is_the_textbooks(lengths: list[int]) -> None:
    assert pack(lengths, 64, "first_fit_decreasing") == first_fit_decreasing(lengths, 64)


def test_hand_made() -> None:
    lengths = [4, 8, 1, 4, 2, 1]
    assert pack(lengths, 10, "first_fit_decreasing") == [[1, 4], [0, 3, 2, 5]]
    assert pack(lengths, 10, "sequential") == [[0], [1, 2], [3, 4, 5]]
    assert pack(lengths, 10, "none") == [[0], [1], [2], [3], [4], [5]]
    assert all(pack([], 10, method) == [] for method in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_fit_is_refused(method: str) -> None:
    for lengths in ([11], [3, 0]):
        with pytest.raises(ValueError, match=r"1\.\.10"):
            pack(lengths, 10, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_pass_depends_on_seed_and_number_alone(method: str) -> None:
    lengths = np.random.RandomState(0).randint(1, 40, size=200)
    passes = {
        (seed, epoch): [items.tolist() for items in epoch_bins(lengths, 64, method, seed, epoch)]
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert all(sorted(item for items in bins for item in items) == list(range(200)) for bins in passes.values())
    assert [items.tolist() for items in epoch_bins(lengths, 64, method, 1, 1)] == passes[1, 1]
    assert len({str(bins) for bins in passes.values()}) == 4
