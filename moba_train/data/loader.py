"""Rows of a dataset to one data-parallel rank, in an order that depends on the sample number alone.

A step takes the next `global_batch_size` samples; of these, rank r of n takes the r-th contiguous n-th part, one row a
micro-batch. So the samples of a step do not depend on the number of ranks, and a run goes on exactly where it stopped,
also on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from moba_train.data.batch import Batch

__all__ = ["Loader", "RowDataset"]


class RowDataset(Protocol):
    """What a loader reads from: rows by number, the same row for the same number each time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


class Loader(Iterator[Batch]):
    """Endless iterator of this rank's micro-batches from sample `start_sample` on; the next row is read ahead.

    IndexError when a step asks for more samples than the dataset has.
    """

    def __init__(
        self, dataset: RowDataset, *, global_batch_size: int, dp_rank: int, dp_size: int, start_sample: int = 0
    ) -> None:
        if global_batch_size % dp_size or not 0 <= dp_rank < dp_size:
            raise ValueError(f"rank {dp_rank} of {dp_size} cannot take an equal part of {global_batch_size} samples")
        self._dataset, self._batch_size = dataset, global_batch_size
        self.micro_batches_per_step = global_batch_size // dp_size
        self._offset = dp_rank * self.micro_batches_per_step
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="row-reader")
        self._step_start = self._taken = 0  # first sample of the step at hand, rows of it already handed out here
        self._ahead: Future[Batch] | None = None
        self._go_to(start_sample)

    def __next__(self) -> Batch:
        if self._ahead is None:
            raise IndexError(
                f"the data ends after {len(self._dataset)} samples, and step {self._step_start}.."
                f"{self._step_start + self._batch_size - 1} was asked for; build the dataset with more samples"
            )
        batch = self._ahead.result()
        self._taken += 1
        if self._taken == self.micro_batches_per_step:
            self._step_start, self._taken = self._step_start + self._batch_size, 0
        self._ahead = self._read_ahead()
        return batch

    def state_dict(self) -> dict[str, int]:
        """Samples that all ranks together have consumed, in whole steps: an unfinished step is taken again."""
        return {"consumed_samples": self._step_start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._go_to(state["consumed_samples"])

    def _go_to(self, sample: int) -> None:
        self._step_start, self._taken = sample, 0
        self._ahead = self._read_ahead()

    def _read_ahead(self) -> Future[Batch] | None:
        # A step is whole or not at all: no rank may start one that another cannot finish.
        if self._step_start + self._batch_size > len(self._dataset):
            return None
        return self._executor.submit(self._dataset.__getitem__, self._step_start + self._offset + self._taken)
