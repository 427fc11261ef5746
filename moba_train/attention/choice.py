"""Which backend `auto` takes for MoBA on a GPU: the faster one where both were measured, `triton` elsewhere.

The numbers are those of benchmarks/results; a new device or kernel means pasting a new table, not a new opinion.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["MEASURED", "Measured", "moba_backend"]


class Measured(NamedTuple):
    """Forward and backward of one shape, in milliseconds."""

    block_size: int
    length: int
    triton: float
    flash: float


# Source: none yet; written by the first run of benchmarks/bench_attention.py that times both.
MEASURED: tuple[Measured, ...] = ()


def moba_backend(block_size: int, length: int) -> str:
    """The faster backend at the measured shape that is nearest by ratio; `length` is that of the longest document."""
    if not MEASURED:
        return "triton"

    def distance(row: Measured) -> float:
        return abs(math.log(row.block_size / block_size)) + abs(math.log(row.length / max(1, length)))

    nearest = min(MEASURED, key=distance)
    return "flash" if nearest.flash < nearest.triton else "triton"
