"""Rows of bench_attention.py as CSV, Markdown and a log-log picture."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Row", "line", "write"]

K = 1024


class Row(NamedTuple):
    """One measurement. Speed-ups are over the fastest dense kernel of the run at the same heads and length."""

    setting: str
    length: int
    kernel: str
    forward_ms: float | None
    both_ms: float | None  # forward and backward; None where only the forward is timed
    memory_gib: float | None
    memory_ratio: float | None  # to the leanest dense FlashAttention
    forward_speedup: float | None
    speedup: float | None
    flop_ratio: float | None  # dense over MoBA
    goal: float | None
    forward_goal: float | None
    repetitions: int
    note: str


_HEADER = (
    "| setting | length | kernel | forward ms | fwd + bwd ms | GiB | of dense | fwd x | fwd + bwd x | goal | "
    "FLOP ratio | runs | note |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """The row in Markdown."""
    goal = _number(row.goal) if row.forward_goal is None else f"fwd {row.forward_goal:g}"
    numbers = (row.forward_ms, row.both_ms, row.memory_gib, row.memory_ratio, row.forward_speedup, row.speedup)
    cells = [row.setting, f"{row.length // K}K", row.kernel, *map(_number, numbers), goal, _number(row.flop_ratio)]
    return "| " + " | ".join([*cells, str(row.repetitions), row.note]) + " |"


def write(rows: list[Row], sections: list[str], folder: Path) -> Path:
    """All files of the run; `sections` are Markdown that follows the table."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0]
    stem = folder / f"attention_{device}_{datetime.date.today()}"
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    text = [_head(), _HEADER + "\n" + "\n".join(map(line, rows)), *sections]
    stem.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    if any(row.both_ms for row in rows):
        _draw(rows, stem.with_suffix(".png"))
    return stem


def _head() -> str:
    import triton

    from moba_train.attention import flash_library

    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}"
    return (
        f"# Attention on {torch.cuda.get_device_name()}, {datetime.date.today()}\n\n{versions}, "
        f"cuDNN {torch.backends.cudnn.version()}, FlashAttention 4 {flash_library.version()}, "
        f"Python {platform.python_version()}. bf16, batch 1, random inputs. CUDA events, median of the runs;\n"
        "MoBA with gate and routing. Memory: peak with inputs, outputs and gradients.\n\n"
        f"Command: `python {re.sub(' --out [^ ]+', '', ' '.join(sys.argv))}`"
    )


def _draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.setting for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for kernel in dict.fromkeys(row.kernel for row in rows if row.setting == name):
            mine = [row for row in rows if (row.setting, row.kernel) == (name, kernel) and row.both_ms]
            axis.loglog([row.length for row in mine], [row.both_ms for row in mine], "o-", label=kernel)
        axis.set(title=name, xlabel="tokens", ylabel="forward + backward, ms")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"
