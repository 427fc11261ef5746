"""Tile sizes, measured on an H100 (benchmarks/LOG.md), and how keys reach a kernel.

D head dim, DP head dim rounded up to a power of two.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "Tiles",
    "backward_tiles",
    "ceil_div",
    "check_supported",
    "forward_tiles",
    "gate_tiles",
    "key_argument",
    "own_tiles",
    "padded_dim",
    "power_of_two",
    "query_tiles",
    "uses_tma",
]


# Fixed when Triton compiles the kernels' modules; read once, as a compiled model cannot trace the question.
_INTERPRETED = bool(triton.knobs.runtime.interpret)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Tiles(NamedTuple):
    """`rows` queries by `cols` keys, for `warps` warps and `stages` pipeline stages."""

    rows: int
    cols: int
    warps: int
    stages: int


def check_supported(q_THD: Tensor) -> None:
    """Raises ValueError for what the kernels do not serve: another device, dtype or head dim."""
    if q_THD.device.type == "cpu" and not _INTERPRETED:
        raise ValueError("the triton backend needs a GPU, got tensors on the cpu; use backend='portable'")
    if q_THD.dtype not in _DTYPES:
        raise ValueError(
            f"the triton backend computes in bf16, fp16 or fp32, got {q_THD.dtype}; use backend='portable'"
        )
    if q_THD.shape[2] > 256:
        raise ValueError(f"the triton backend holds head dims up to 256, got {q_THD.shape[2]}; use backend='portable'")


def ceil_div(amount: int, size: int) -> int:
    """How many parts of `size` hold `amount`. (`triton.cdiv` costs the host microseconds a call.)"""
    return -(-amount // size)


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


@cache
def padded_dim(head_dim: int) -> int:
    """Width of a tile of this head dim: a power of two that the matrix units accept."""
    return max(16, power_of_two(head_dim))


@cache
def gate_tiles(dtype: torch.dtype, head_dim: int, num_tokens: int) -> Tiles:
    """Queries against block means."""
    wide = dtype == torch.float32 or padded_dim(head_dim) > 128
    return _fit(Tiles(64, 32, 4, 2) if wide else Tiles(64, 64, 4, 2), 1 << 20, num_tokens)


@cache
def forward_tiles(dtype: torch.dtype, head_dim: int, block_size: int, num_rows: int) -> Tiles:
    """Gathered queries against whole blocks; `num_rows` bounds the rows of the longest list."""
    if dtype == torch.float32 or padded_dim(head_dim) > 128:
        tiles = Tiles(32, 32, 4, 2) if dtype == torch.float32 else Tiles(64, 64, 4, 2)
    elif block_size <= 128:
        tiles = Tiles(64, 128, 4, 2)
    elif block_size <= 1024:
        tiles = Tiles(64, 64, 4, 3)
    else:
        tiles = Tiles(128, 128, 8, 3)
    return _fit(tiles, block_size, num_rows)


@cache
def own_tiles(dtype: torch.dtype, head_dim: int, block_size: int, num_rows: int) -> Tiles:
    """Causal attention in the own block, then the merge of the partial results."""
    if dtype == torch.float32 or padded_dim(head_dim) > 128:
        tiles = Tiles(32, 32, 4, 2) if dtype == torch.float32 else Tiles(64, 32, 4, 2)
    elif block_size <= 1024:
        tiles = Tiles(64, 64, 4, 2)
    else:
        tiles = Tiles(128, 64, 8, 3)
    return _fit(tiles, block_size, num_rows)


@cache
def query_tiles(dtype: torch.dtype, head_dim: int, block_size: int, num_rows: int) -> Tiles:
    """Gathered queries against whole blocks, for dQ alone."""
    if dtype == torch.float32 or padded_dim(head_dim) > 128:
        tiles = Tiles(32, 32, 4, 1) if dtype == torch.float32 else Tiles(64, 32, 4, 2)
    else:
        tiles = Tiles(128, 64, 8, 2)
    return _fit(tiles, block_size, num_rows)


@cache
def backward_tiles(dtype: torch.dtype, head_dim: int, block_size: int, num_rows: int) -> Tiles:
    """A tile of keys against all queries that picked its block."""
    if dtype == torch.float32 or padded_dim(head_dim) > 128:
        tiles = Tiles(16, 32, 4, 1) if dtype == torch.float32 else Tiles(32, 64, 8, 1)
    else:
        tiles = Tiles(64, 128, 8, 3)
    return _fit(tiles, block_size, num_rows)


def uses_tma(k_SGD: Tensor, v_SGD: Tensor) -> bool:
    """Whether keys and values can be read through tensor descriptors: Hopper or later, dense aligned heads."""
    if k_SGD.device.type != "cuda" or torch.cuda.get_device_capability(k_SGD.device)[0] < 9:
        return False
    head_dim = k_SGD.shape[2]
    aligned = all(
        tensor.stride(1) == head_dim
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
        for tensor in (k_SGD, v_SGD)
    )
    return aligned and padded_dim(head_dim) == head_dim and k_SGD.shape[0] > 0


def key_argument(x_SGD: Tensor, cols: int, tma: bool) -> Tensor | TensorDescriptor:
    """The kernel argument for keys or values: the tensor, or a descriptor of its [S, G * D] view."""
    if not tma:
        return x_SGD
    num_keys, num_kv_heads, head_dim = x_SGD.shape
    flat = x_SGD.as_strided((num_keys, num_kv_heads * head_dim), (x_SGD.stride(0), 1))
    return TensorDescriptor.from_tensor(flat, [cols, head_dim])


def _fit(tiles: Tiles, block_size: int, num_rows: int) -> Tiles:
    rows = min(tiles.rows, max(16, power_of_two(num_rows)))
    cols = min(tiles.cols, max(16, power_of_two(block_size)))
    return tiles._replace(rows=rows, cols=cols, warps=4 if rows * cols <= 64 * 64 else tiles.warps)
