"""Dense causal parts of a batch as calls of a varlen kernel: no padding, no mask, no gather in the common case.

A varlen kernel takes neighbouring groups of query rows and of key rows, one group of each a *sequence*, causal from the
bottom right. A run of queries (`SequenceInfo.runs`, `own_runs`) is one sequence. Keys between the runs belong to
sequences without queries, so that key groups cover every row; long ones are cut, since a library keeps memory for every
sequence as if it were the longest. Runs that read the same keys, as those of a zigzag shard do, go to different calls;
a whole batch is one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moba_train.attention.sequence import DenseRun, SequenceInfo, copy_to

__all__ = ["VarlenCall", "dense_calls", "own_calls", "pack", "unpack"]

_NUMBERS = 5  # of a packed call


class VarlenCall(NamedTuple):
    """Queries first .. last, or `rows` of them where not empty, against all held keys, cut at `queries` and `keys`."""

    queries: Tensor  # int32 [sequences + 1], from 0
    keys: Tensor  # int32 [sequences + 1], from 0 to the held rows
    rows: Tensor  # int64, empty where the queries are neighbours
    first: int
    last: int
    max_queries: int  # of the longest sequence, with queries or without
    max_keys: int
    causal: bool


def dense_calls(seq: SequenceInfo, device: torch.device) -> list[VarlenCall]:
    """Full causal attention of the batch; built once per device."""
    return seq.once(("dense calls", device), lambda: _calls(seq.runs, seq.num_held, device))


def own_calls(seq: SequenceInfo, block_size: int, device: torch.device) -> list[VarlenCall]:
    """Causal attention within every query's own block; built once per block size and device."""
    key = ("own calls", block_size, device)
    return seq.once(key, lambda: _calls(seq.own_runs(block_size), seq.num_held, device))


def pack(calls: list[VarlenCall]) -> tuple[list[Tensor], list[int]]:
    """Calls as lists of tensors and of whole numbers, which custom ops take."""
    tensors = [tensor for call in calls for tensor in call[:3]]
    return tensors, [int(number) for call in calls for number in call[3:]]


def unpack(tensors: list[Tensor], numbers: list[int]) -> Iterator[VarlenCall]:
    """The calls that `pack` took apart."""
    for i in range(len(tensors) // 3):
        queries, keys, rows = tensors[3 * i : 3 * i + 3]
        first, last, max_queries, max_keys, causal = numbers[i * _NUMBERS : (i + 1) * _NUMBERS]
        yield VarlenCall(queries, keys, rows, first, last, max_queries, max_keys, bool(causal))


def _calls(runs: list[DenseRun], num_held: int, device: torch.device) -> list[VarlenCall]:
    rounds: list[list[DenseRun]] = []
    for run in runs:
        if run.k_start == run.k_end:
            continue  # sees nothing
        for taken in rounds:
            if _causal(taken[-1]) == _causal(run) and taken[-1].k_end <= run.k_start:
                taken.append(run)
                break
        else:
            rounds.append([run])
    return [_call(taken, num_held, device) for taken in rounds]


def _causal(run: DenseRun) -> bool:
    return run.k_diagonal < run.k_end


def _call(runs: list[DenseRun], num_held: int, device: torch.device) -> VarlenCall:
    queries, keys, rows = [0], [0], []
    # No less than makes about as many sequences without queries as with: a run may be of one key.
    max_keys = max(-(-num_held // (len(runs) + 1)), *(run.k_end - run.k_start for run in runs))

    def skip(end: int) -> None:
        while keys[-1] < end:
            queries.append(queries[-1])
            keys.append(min(keys[-1] + max_keys, end))

    for run in runs:
        skip(run.k_start)
        queries.append(queries[-1] + run.q_end - run.q_start)
        keys.append(run.k_end)
        rows.append(torch.arange(run.q_start, run.q_end))
    skip(num_held)
    first, last = runs[0].q_start, runs[-1].q_end
    neighbours = last - first == queries[-1]
    return VarlenCall(
        queries=copy_to(torch.tensor(queries, dtype=torch.int32), device),
        keys=copy_to(torch.tensor(keys, dtype=torch.int32), device),
        rows=copy_to(torch.empty(0, dtype=torch.int64) if neighbours else torch.cat(rows), device),
        first=first,
        last=last,
        max_queries=max(run.q_end - run.q_start for run in runs),
        max_keys=max_keys,
        causal=_causal(runs[0]),
    )
