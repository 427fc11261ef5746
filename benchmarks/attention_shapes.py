"""What bench_attention.py times: settings and goals, the kernels, their work by arithmetic, and their errors.

Work is counted in (query, key) pairs of one head, exactly, causal: a pair costs 4 * D FLOPs forward and 2.5 times that
backward.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from moba_train.attention import (
    SequenceInfo,
    flash_library,
    full_attention,
    moba_attention,
    reference,
    select_blocks,
)

__all__ = [
    "DENSE",
    "GRAPH",
    "LIMIT",
    "MOBA",
    "SETTINGS",
    "Attention",
    "K",
    "Setting",
    "error_of",
    "inputs",
    "is_moba",
    "kernel",
    "median_ms",
]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
K = 1024
DENSE = ("FlashAttention 4", "cuDNN", "FlashAttention 2")
MOBA = ("triton", "flash", "mixed")
LIMIT = 3.0  # of an error, in multiples of same-dtype torch's
GRAPH = " in a graph"  # behind a kernel's name: captured into CUDA graphs


class Setting(NamedTuple):
    """A row of the table: what is attended to, at which lengths, and the speed-ups it must reach (length -> factor)."""

    heads: int
    key_heads: int
    head_dim: int
    block_size: int
    top_k: int
    lengths: tuple[int, ...]
    goals: dict[int, float]
    forward_goals: dict[int, float]

    def dense_pairs(self, length: int) -> int:
        return length * (length + 1) // 2

    def moba_pairs(self, length: int) -> int:
        block, pairs = self.block_size, 0
        for start in range(0, length, block):
            rows = min(block, length - start)
            pairs += rows * min(self.top_k - 1, start // block) * block + rows * (rows + 1) // 2
        return pairs

    def flops(self, pairs: int, *, backward: bool) -> float:
        return 4 * self.head_dim * self.heads * pairs * (2.5 if backward else 1)

    def ratio(self, length: int) -> float:
        """FLOPs of dense attention over those of MoBA, gate not counted."""
        return self.dense_pairs(length) / self.moba_pairs(length)


def _settings() -> dict[str, Setting]:
    longest = Setting(32, 8, 128, 4096, 12, (64 * K, 128 * K, 256 * K, 512 * K, 1024 * K), {}, {1024 * K: 9})
    goals = {length: 0.8 * longest.ratio(length) for length in (128 * K, 256 * K, 512 * K)}
    lengths = (8 * K, 32 * K, 128 * K, 512 * K)
    return {
        "small": Setting(16, 16, 128, 128, 8, lengths, {8 * K: 1, 32 * K: 3, 128 * K: 10, 512 * K: 30}, {}),
        "medium": Setting(32, 8, 128, 512, 12, lengths, {32 * K: 1.6, 128 * K: 6, 512 * K: 24}, {}),
        "1m": longest._replace(goals=goals),
        "small-heads": Setting(32, 8, 64, 512, 12, (32 * K, 128 * K, 256 * K), {}, {}),
    }


SETTINGS = _settings()


def inputs(length: int, setting: Setting) -> list[Tensor]:
    """Random q, k, v, leaves."""
    heads = (setting.heads, setting.key_heads, setting.key_heads)
    return [
        torch.randn(length, count, setting.head_dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for count in heads
    ]


def is_moba(name: str) -> bool:
    """Whether a kernel's name is a backend of MoBA, whatever is behind it."""
    return name.partition(" ")[0] in MOBA


def kernel(name: str, setting: Setting, length: int) -> Attention | None:
    """Causal attention of one document of `length` tokens by the kernel of that name; None where it is absent."""
    if is_moba(name):
        backend, _, variant = name.removesuffix(GRAPH).partition(" ")
        seq, sizes = SequenceInfo([0, length]), {"block_size": setting.block_size, "top_k": setting.top_k}
        sample = torch.empty(0, 1, setting.head_dim, dtype=torch.bfloat16, device="cuda")
        if backend != "triton" and flash_library.refusal(sample) is not None:
            return None
        options = {"backend": backend, "deterministic": variant == "deterministic"}
        return lambda q, k, v: moba_attention(q, k, v, seq, **sizes, **options)[0]
    if name.startswith("FlashAttention 4"):
        return _flash_attention_4()
    backend = SDPBackend.CUDNN_ATTENTION if name.startswith("cuDNN") else SDPBackend.FLASH_ATTENTION

    def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return by_torch


@cache
def _flash_attention_4() -> Attention | None:
    try:
        from flash_attn.cute.interface import flash_attn_func
    except ImportError:
        return None

    def by_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q[None], k[None], v[None], causal=True)
        return (out[0] if isinstance(out, tuple) else out)[0]

    return by_flash


def error_of(backend: str, setting: Setting, *, sparse: bool = True) -> float:
    """The largest error of MoBA's out and gradients against fp64 (not `sparse`: full attention's), in multiples of
    same-dtype torch's (`LIMIT`).

    The case has the setting's blocks and one group of its heads, in a packed batch with a short document.
    """
    torch.manual_seed(1)
    heads = setting.heads // setting.key_heads
    length = 2 * setting.block_size + 700
    seq, block_size = SequenceInfo([0, length - 300, length]), setting.block_size
    q, k, v = inputs(length, setting._replace(heads=heads, key_heads=1))
    dout = torch.randn_like(q)
    picks = select_blocks(q, k, seq, block_size=block_size, top_k=2, backend="portable")
    mask = reference.moba_mask(seq, picks, block_size)
    if not sparse:
        mask = reference.full_mask(seq).to(mask.device)[:, None].expand_as(mask)

    def run(attend: Attention, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout.to(dtype))

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.masked_attention(q, k, v, mask, setting.head_dim**-0.5)[0]

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not sparse:
            return full_attention(q, k, v, seq, backend=backend)[0]
        return moba_attention(q, k, v, seq, block_size=block_size, top_k=2, picks=picks, backend=backend)[0]

    exact, same_dtype = run(masked, torch.float64), run(masked, torch.bfloat16)
    actual = run(kernel, torch.bfloat16)
    if not all(torch.isfinite(tensor).all() for tensor in actual):
        return float("inf")
    errors = [
        float((got.double() - want).abs().max() / (base.double() - want).abs().max())
        for got, base, want in zip(actual, same_dtype, exact, strict=True)
    ]
    # Outputs may err twice as much as torch, gradients thrice: scaled, one limit serves.
    return max(1.5 * errors[0], *errors[1:])


def median_ms(run: Callable[[], Tensor]) -> float:
    """Milliseconds of the device, the median of ten after two to warm up."""
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])
