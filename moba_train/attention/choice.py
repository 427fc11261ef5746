"""Which backend `auto` takes for MoBA on a GPU: the faster one of each pass where both were measured, else `triton`.

The numbers are those of benchmarks/results; a new device or kernel means pasting a new table, not a new opinion.
"""

from __future__ import annotations

import math
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


# Source: benchmarks/results/attention_h200_2026-11-23.md, its rows of head dim 128. Other GPUs borrow the table: an
# H100, whose memory is slower, may lose some percent with `mixed` at (512, 128K).
MEASURED: tuple[Measured, ...] = (
    Measured(128, 8192, 1.2, 1.4, 3.2, 6.6),
    Measured(128, 32768, 2.7, 3.6, 6.3, 20.1),
    Measured(128, 131072, 12.7, 14.1, 20.2, 26.2),
    Measured(128, 524288, 90.5, 57.9, 122.2, 102.8),
    Measured(512, 8192, 3.7, 6.5, 7.2, 12.8),
    Measured(512, 32768, 10.0, 27.9, 12.8, 22.1),
    Measured(512, 131072, 42.3, 118.4, 55.2, 87.3),
    Measured(512, 524288, 205.3, 487.5, 247.6, 354.7),
    Measured(4096, 65536, 60.1, 286.5, 57.3, 145.6),
    Measured(4096, 131072, 155.7, 717.1, 144.3, 368.9),
    Measured(4096, 262144, 348.4, 1587.0, 315.8, 811.5),
    Measured(4096, 524288, 744.4, 3372.3, 672.1, 1689.0),
    Measured(4096, 1048576, 1554.2, 6978.2, 1410.6, 3496.1),
)


# Up to here, decoding and chunks of a prefill, Triton's forward is the fastest in every setting (that page's tables of
# serving). A context rank with so few rows is trained with it too, which was not timed.
FEW_QUERIES = 2048


def moba_backend(block_size: int, length: int, queries: int) -> str:
    """The fastest backend for so many queries, at the measured shape that is nearest by ratio.

    Args:
        length: of the longest document.
        queries: rows of q, which may be a part of the documents' rows.
    """
    if queries <= FEW_QUERIES < length:
        return "triton"

    def distance(row: Measured) -> float:
        return abs(math.log(row.block_size / block_size)) + abs(math.log(row.length / max(1, length)))

    return min(MEASURED, key=distance).fastest
