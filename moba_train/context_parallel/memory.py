"""What context-parallel communication needs on a rank at its peak, beside the attention op itself. Plain arithmetic.

README.md derives the terms. Letters: `S` rows of all ranks, `t` rows of one, `H` query heads, `G` key heads, `D` head
dim, `c` ranks.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Peak", "peak_bytes"]


class Peak(NamedTuple):
    """Upper bounds in bytes above q, k, v (forward) and above what forward left and the output's gradient (backward).

    Outputs and gradients count; what the op itself allocates for its results counts, its workspace does not.
    """

    forward: int
    backward: int


def peak_bytes(
    strategy: str,
    *,
    rows: int,
    num_ranks: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    element_size: int = 2,
    gather_heads: int | None = None,
    overlap: bool = True,
) -> Peak:
    """The peak of one attention layer under `strategy`; `rows` are those of all ranks, heads those of this tensor rank.

    Raises ValueError for an unknown strategy.
    """
    wide = max(4, element_size)
    row = head_dim * element_size
    q = rows // num_ranks * heads * row  # a rank's q; as large are its out and their gradients
    kv = 2 * rows // num_ranks * key_heads * row  # its k and v
    lse = rows // num_ranks * heads * wide
    if strategy == "all_gather":
        width = key_heads if gather_heads is None else min(gather_heads, key_heads)
        streamed = overlap and gather_heads is not None and width > 1
        width = width // 2 if streamed else width
        slice_kv = 2 * rows * width * row  # k and v of one slice, all rows
        sent = slice_kv // num_ranks
        slices = -(-key_heads // width)
        out = q + lse
        if streamed:
            return Peak(out + max(out, 2 * slice_kv + sent), kv + q + 5 * slice_kv + sent)
        earlier, joined = out * (slices - 1) // slices, out if slices > 1 else 0
        forward = max(earlier + slice_kv + slice_kv // 2 + sent // 2, out + max(joined, slice_kv + sent))
        return Peak(forward, kv + q + 3 * slice_kv + sent)
    if strategy == "all_to_all":
        kv_taken = 2 * rows * max(1, key_heads // num_ranks) * row  # of the heads that this rank attends with
        slices = max(1, key_heads // num_ranks) if overlap else 1
        moving = (2 * q + kv_taken) // slices if slices > 1 else 2 * q
        forward = 3 * q + kv_taken + moving + 4 * lse
        if slices == 1:
            return Peak(forward, q + kv + 3 * (q + kv_taken))
        return Peak(forward, q + kv + 3 * (q + kv_taken) // slices + 3 * q // slices)
    if strategy == "ring":
        scale = wide // element_size
        arriving = kv if num_ranks == 2 or not overlap else 2 * kv
        return Peak((scale + 1) * q + arriving + 4 * lse, (scale + 1) * q + (1 + 2 * scale) * kv + arriving)
    raise ValueError(f"context strategy {strategy!r} has no memory formula")
