"""Which backend `auto` takes for MoBA on a GPU: the faster one of each pass where both were measured, else `triton`.

The numbers are those of benchmarks/results; a new device or kernel means pasting a new table, not a new opinion.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

__all__ = ["MEASURED", "Measured", "moba_backend"]


class Measured(NamedTuple):
    """One shape, its passes in milliseconds."""

    block_size: int
    length: int
    triton_forward: float
    triton_backward: float
    flash_forward: float
    flash_backward: float

    @property
    def fastest(self) -> str:
        """The backend with the least sum of both passes; `mixed` is triton's forward and flash's backward."""
        sums = {
            "triton": self.triton_forward + self.triton_backward,
            "flash": self.flash_forward + self.flash_backward,
            "mixed": self.triton_forward + self.flash_backward,
        }
        return min(sums, key=lambda name: sums[name])


# Source: benchmarks/results/attention_h100_2026-11-23.md (H100); flash as it was before entry 9 of benchmarks/LOG.md.
MEASURED: tuple[Measured, ...] = (
    Measured(128, 32768, 3.42, 3.68, 10.30, 23.43),
    Measured(128, 131072, 14.30, 14.69, 21.42, 44.51),
    Measured(512, 32768, 11.53, 28.13, 14.31, 37.46),
    Measured(512, 131072, 46.91, 120.1, 53.73, 128.3),
    Measured(4096, 131072, 162.0, 713.0, 145.0, 397.0),
)


@cache
def moba_backend(block_size: int, length: int) -> str:
    """The fastest backend at the measured shape that is nearest by ratio; `length` is that of the longest document."""

    def distance(row: Measured) -> float:
        return abs(math.log(row.block_size / block_size)) + abs(math.log(row.length / max(1, length)))

    return min(MEASURED, key=distance).fastest
