"""Rows of different lengths into contexts of one: packing algorithms. Pure, and the same result everywhere.

Letters: S tokens of a context.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["epoch_bins", "pack"]


def pack(lengths: Sequence[int], capacity: int, method: str) -> list[list[int]]:
    """Bins of item numbers, no bin longer than `capacity` (S); no item may be, and none may be empty.

    first_fit_decreasing: longest first, each into the first bin with room (at most 11/9 of the optimum and a bit:
    Johnson 1973). sequential: in order, a new bin when the next item does not fit. none: a bin for each.
    """
    if any(not 0 < length <= capacity for length in lengths):
        raise ValueError(f"lengths must lie in 1..{capacity}")
    if method == "none":
        return [[item] for item in range(len(lengths))]
    if method == "sequential":
        return _next_fit(lengths, capacity)
    if method == "first_fit_decreasing":
        order = sorted(range(len(lengths)), key=lambda item: -lengths[item])  # stable: ties in order
        return [[order[i] for i in items] for items in _first_fit([lengths[item] for item in order], capacity)]
    raise ValueError(f"no packing called {method!r}")


def epoch_bins(lengths: np.ndarray, capacity: int, method: str, seed: int, epoch: int) -> list[np.ndarray]:
    """Bins of one pass over the items: items shuffled, then packed, then the bins shuffled, by (seed, epoch) alone."""
    random = np.random.RandomState([seed, epoch])  # its stream is the same in every numpy
    order = random.permutation(len(lengths))
    bins = pack(lengths[order].tolist(), capacity, method)
    return [order[bins[i]] for i in random.permutation(len(bins))]


def _next_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room = 0
    for item, length in enumerate(lengths):
        if length > room:
            bins.append([])
            room = capacity
        bins[-1].append(item)
        room -= length
    return bins


def _first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Each item into the first bin with room, found in log time: room[node] is the most that a bin below it has."""
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    bins: list[list[int]] = []
    for item, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
