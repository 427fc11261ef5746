"""Work beside that of the current stream, for kernels of which one waits for memory while the other multiplies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import torch

__all__ = ["SecondStream"]


class SecondStream:
    """A stream next to the one that is current when this is made; without a GPU, where one follows the other, none.

    Tensors made within `work` must be let go of there, behind a `follow` that comes after their last use elsewhere, or
    after the last `join`.
    """

    def __init__(self, device: torch.device) -> None:
        self._first, self._second = None, None
        if device.type == "cuda":
            self._first, self._second = torch.cuda.current_stream(device), _second(device)

    def follow(self) -> None:
        """What is put into the second stream from now on starts after all that is in the first one now."""
        if self._first is not None and self._second is not None:
            self._second.wait_stream(self._first)

    def join(self) -> None:
        """What is put into the first stream from now on starts after all that is in the second one now."""
        if self._first is not None and self._second is not None:
            self._first.wait_stream(self._second)

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Kernels launched within go into the second stream."""
        with torch.cuda.stream(self._second):  # None: nothing changes
            yield


@cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
