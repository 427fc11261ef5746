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


# Source: benchmarks/results/attention_h200_2026-11-23.md, its rows of head dim 128. Left out: (4096, 256K), where flash
# was not warmed up. At (512, 32K) all three are within 1 %. Other GPUs borrow the table: an H100, whose memory is
# slower, may lose some percent with `mixed` at (512, 128K).
MEASURED: tuple[Measured, ...] = (
    Measured(128, 8192, 1.3, 1.3, 1.9, 3.1),
    Measured(128, 32768, 2.9, 3.6, 5.8, 12.1),
    Measured(128, 131072, 13.4, 14.0, 19.9, 30.6),
    Measured(128, 524288, 93.2, 57.6, 120.8, 120.6),
    Measured(512, 8192, 3.0, 6.0, 5.2, 10.8),
    Measured(512, 32768, 10.7, 27.9, 10.7, 27.7),
    Measured(512, 131072, 45.7, 117.2, 50.9, 98.0),
    Measured(512, 524288, 219.8, 483.2, 245.7, 421.9),
    Measured(4096, 65536, 61.5, 285.9, 56.5, 146.2),
    Measured(4096, 131072, 158.9, 718.9, 142.9, 382.7),
    Measured(4096, 524288, 752.9, 3623.1, 672.2, 1769.8),
    Measured(4096, 1048576, 2125.1, 6969.2, 1438.9, 3657.8),
)


# Up to here, decoding and chunks of a prefill, Triton's forward is the fastest in every setting of that page.
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
