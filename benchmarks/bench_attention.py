"""Time MoBA's attention, gate and routing included, against the fastest dense kernel of the machine.

    python benchmarks/bench_attention.py [--settings small medium ...] [--lengths 8192 32768 ...] [--out FOLDER]

Every backend is first held to fp64 on a small case of its setting, and one that fails is not timed. Writes
attention_<device>_<date>.csv, .md and .png: milliseconds (CUDA events, median) of forward and of forward with backward,
peak memory of forward with backward (inputs, outputs and gradients counted), and the speed-up over dense.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from moba_train.attention import SequenceInfo, moba_attention, reference, select_blocks

try:
    from flash_attn.cute.interface import flash_attn_func as flash_attention_4
except ImportError:
    flash_attention_4 = None

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Setting(NamedTuple):
    """A row of the table: what is attended to, at which lengths, and the speed-ups it must reach (length -> factor)."""

    heads: int
    key_heads: int
    head_dim: int
    block_size: int
    top_k: int
    lengths: tuple[int, ...]
    goals: dict[int, float]


K = 1024
SETTINGS = {
    "small": Setting(
        16, 16, 128, 128, 8, (8 * K, 32 * K, 128 * K, 512 * K), {8 * K: 1, 32 * K: 3, 128 * K: 10, 512 * K: 30}
    ),
    "medium": Setting(32, 8, 128, 512, 12, (8 * K, 32 * K, 128 * K, 512 * K), {32 * K: 1.6, 128 * K: 6, 512 * K: 24}),
    "1m": Setting(32, 8, 128, 4096, 12, (64 * K, 128 * K, 512 * K), {128 * K: 1.36, 512 * K: 4.64}),
    "small-heads": Setting(32, 8, 64, 512, 12, (32 * K, 128 * K, 256 * K), {}),
}


class Row(NamedTuple):
    """One measurement. `speedup` is of forward with backward over the fastest dense kernel of the same run."""

    setting: str
    length: int
    kernel: str
    forward_ms: float
    both_ms: float
    memory_gib: float
    speedup: float
    goal: float | None


def main() -> None:
    options = _options()
    rows: list[Row] = []
    for name in options.settings:
        setting = SETTINGS[name]
        error = check_moba(setting)
        print(
            f"{name}: error {error:.2f} x same-dtype torch's, {'timed' if error <= 3 else 'FAILED, not timed'}",
            flush=True,
        )
        for length in options.lengths or setting.lengths:
            measured = measure(name, setting, length, options, moba=error <= 3)
            print("\n".join(map(_line, measured)), flush=True)
            rows += measured
        write(rows, options.out)


def check_moba(setting: Setting) -> float:
    """The largest error of out and gradients against fp64, in multiples of same-dtype torch's (3 is the limit)."""
    torch.manual_seed(1)
    heads = setting.heads // setting.key_heads
    length = 2 * setting.block_size + 700
    seq, block_size = SequenceInfo([0, length - 300, length]), setting.block_size
    q, k, v = _inputs(length, setting._replace(heads=heads, key_heads=1))
    dout = torch.randn_like(q)
    picks = select_blocks(q, k, seq, block_size=block_size, top_k=2, backend="portable")
    mask = reference.moba_mask(seq, picks, block_size)

    def run(attend: Attention, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout.to(dtype))

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.masked_attention(q, k, v, mask, setting.head_dim**-0.5)[0]

    def moba(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, seq, block_size=block_size, top_k=2, picks=picks)[0]

    exact, same_dtype = run(masked, torch.float64), run(masked, torch.bfloat16)
    actual = run(moba, torch.bfloat16)
    if not all(torch.isfinite(tensor).all() for tensor in actual):
        return float("inf")
    errors = [
        float((got.double() - want).abs().max() / (base.double() - want).abs().max())
        for got, base, want in zip(actual, same_dtype, exact, strict=True)
    ]
    # Outputs may err twice as much as torch, gradients thrice: scaled, one limit serves.
    return max(1.5 * errors[0], *errors[1:])


def measure(name: str, setting: Setting, length: int, options: argparse.Namespace, *, moba: bool) -> list[Row]:
    """Rows of all dense kernels and of MoBA at one length; a kernel that runs out of memory or is absent has none."""
    seq = SequenceInfo([0, length])
    timed: dict[str, tuple[float, float, float]] = {}
    for kernel, attend in dense_kernels():
        if length <= options.dense_to:
            timed[kernel] = time_kernel(attend, setting, length)
    bar = min((both for _, both, _ in timed.values()), default=float("nan"))
    if moba:

        def attend_moba(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return moba_attention(q, k, v, seq, block_size=setting.block_size, top_k=setting.top_k)[0]

        timed["moba"] = time_kernel(attend_moba, setting, length)
    return [
        Row(name, length, kernel, *times, bar / times[1], setting.goals.get(length) if kernel == "moba" else None)
        for kernel, times in timed.items()
    ]


def dense_kernels() -> Iterator[tuple[str, Attention]]:
    """Causal attention of one document by every dense kernel that is installed."""
    if flash_attention_4 is not None:

        def by_flash_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attention_4(q[None], k[None], v[None], causal=True)
            return (out[0] if isinstance(out, tuple) else out)[0]

        yield "FlashAttention 4", by_flash_4
    for kernel, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention 2", SDPBackend.FLASH_ATTENTION)):

        def by_torch(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            grouped = q.shape[1] != k.shape[1]
            q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return out[0].transpose(0, 1)

        yield kernel, by_torch


def time_kernel(attend: Attention, setting: Setting, length: int) -> tuple[float, float, float]:
    """(forward ms, forward and backward ms, peak GiB of both)."""
    q, k, v = _inputs(length, setting)
    dout = torch.randn_like(q)

    def both() -> None:
        q.grad = k.grad = v.grad = None
        attend(q, k, v).backward(dout)

    both()
    torch.cuda.synchronize()
    q.grad = k.grad = v.grad = None
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() / 2**30
    with torch.no_grad():
        forward_ms = _median(lambda: attend(q, k, v))
    return forward_ms, _median(both), peak


def write(rows: list[Row], folder: Path) -> None:
    """The CSV, the Markdown table and the log-log picture."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0]
    stem = folder / f"attention_{device}_{datetime.date.today()}"
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}"
    header = [
        f"# Attention on {torch.cuda.get_device_name()}, {datetime.date.today()}",
        "",
        f"{versions}, Python {platform.python_version()}. bf16, batch 1, random inputs.",
        "CUDA events, median; MoBA with gate and routing.",
        "",
        f"Command: `python {' '.join(sys.argv)}`",
        "",
        "| setting | length | kernel | forward ms | forward + backward ms | peak GiB | speed-up over dense | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    stem.with_suffix(".md").write_text("\n".join([*header, *map(_line, rows)]) + "\n")
    draw(rows, stem.with_suffix(".png"))


def draw(rows: list[Row], path: Path) -> None:
    """Forward and backward time over length, one panel a setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.setting for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for kernel in dict.fromkeys(row.kernel for row in rows if row.setting == name):
            points = [(row.length, row.both_ms) for row in rows if (row.setting, row.kernel) == (name, kernel)]
            axis.loglog(*zip(*points, strict=True), "o-", label=kernel)
        axis.set(title=name, xlabel="tokens", ylabel="forward + backward, ms")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _line(row: Row) -> str:
    goal = "" if row.goal is None else f"{row.goal:g}"
    return (
        f"| {row.setting} | {row.length // K}K | {row.kernel} | {row.forward_ms:.2f} | {row.both_ms:.2f} | "
        f"{row.memory_gib:.2f} | {row.speedup:.2f} | {goal} |"
    )


def _inputs(length: int, setting: Setting) -> list[Tensor]:
    heads = (setting.heads, setting.key_heads, setting.key_heads)
    return [
        torch.randn(length, count, setting.head_dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for count in heads
    ]


def _median(run: Callable[[], object]) -> float:
    times: list[float] = []
    # About half a second of work, at least three runs: a step at 512K takes seconds.
    while len(times) < 3 or (sum(times) < 500 and len(times) < 20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--lengths", nargs="+", type=int, help="instead of each setting's own")
    parser.add_argument("--dense-to", type=int, default=1 << 20, help="longest length at which dense kernels run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
