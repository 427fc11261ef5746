"""What bench_context_parallel.py found: Markdown, the scaling rows as CSV, and a picture of shares of the ideal."""

from __future__ import annotations

import csv
import datetime
import itertools
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from moba_train.attention import flash_library

__all__ = ["HEADER", "Row", "line", "series", "write"]

HEADER = (
    "| op | rows in all | devices | series | strategy | overlap | ms | one device | ideal | of ideal |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
_GOAL = 0.92  # of the ideal
_K = 1024


class Row(NamedTuple):
    """One line of the scaling table; `one_ms` is one device's time for all rows."""

    op: str
    rows_in_all: int
    devices: int
    series: str
    strategy: str
    overlap: bool
    ms: float
    one_ms: float
    ideal_ms: float
    share: float


def line(row: Row) -> str:
    """The row in Markdown."""
    overlap = "" if row.devices == 1 else "yes" if row.overlap else "no"
    share = "" if row.devices == 1 else f"{100 * row.share:.1f} %"
    times = [f"{time:.2f}" for time in (row.ms, row.one_ms, row.ideal_ms)]
    cells = [row.op, row.rows_in_all, row.devices, row.series, row.strategy, overlap, *times, share]
    return "| " + " | ".join(map(str, cells)) + " |"


def series(length: int, size: int) -> str:
    """What `length` rows on `size` devices show: the rows held a device, or in all."""
    weak = f"weak {length // size // _K}K" if length // size in (32 * _K, 128 * _K) else ""
    strong = f"strong {length // _K}K" if length in (128 * _K, 512 * _K) else ""
    return ", ".join(filter(None, (weak, strong)))


def write(rows: list[Row], sections: dict[str, list[str]], about: str, folder: Path) -> None:
    """Everything found so far, in `folder`; the picture once the section "end" is there."""
    folder.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    short, today = device.lower().replace("nvidia ", "").split()[0], datetime.date.today()
    size = torch.distributed.get_world_size()
    stem = folder / f"context_parallel_{size}x{short}_{today}"
    lines = [
        f"# Context parallelism on {size} x {device}, {today}",
        "",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, FlashAttention 4 "
        f"{flash_library.version() or 'not installed'}, Python {platform.python_version()}. {about}, random inputs; "
        "forward and backward; wall-clock time of the slowest rank.",
        "Ideal: one device's time for the same rows in all, over the number of devices.",
        "",
        f"Command: `{' '.join(sys.argv)}`",
    ]
    for section, text in sections.items():
        lines += ["", f"## {section.capitalize()}", "", *(_table(rows) if section == "scaling" else text)]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    if not rows:
        return
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    if "end" in sections:
        _draw(rows, stem.with_suffix(".png"))


def _table(rows: list[Row]) -> list[str]:
    """All rows by op and length, a strategy with and without overlap side by side."""
    cells: dict[tuple, dict[bool, Row]] = {}
    for row in sorted(rows, key=lambda row: (row.op, row.rows_in_all, row.devices)):
        cells.setdefault((row.op, row.rows_in_all, row.devices, row.series, row.strategy), {})[row.overlap] = row
    lines = [
        "| op | rows in all | devices | series | strategy | ms | of ideal | ms without overlap | of ideal | ideal |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (*names, devices, series, strategy), found in cells.items():
        if devices == 1:
            times = [f"{found[False].ms:.2f}", "", "", "", ""]
        else:
            pairs = [found.get(overlap) for overlap in (True, False)]
            times = [x for row in pairs for x in ((f"{row.ms:.2f}", f"{100 * row.share:.1f} %") if row else ("", ""))]
            times.append(f"{next(iter(found.values())).ideal_ms:.2f}")
        lines.append("| " + " | ".join(map(str, (*names, devices, series, strategy, *times))) + " |")
    return lines


def _draw(rows: list[Row], path: Path) -> None:
    """Share of the ideal over rows in all, one panel an op; dashed: without overlap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shared = [row for row in rows if row.devices > 1]
    if not shared:
        return
    names, strategies = (list(dict.fromkeys(row[i] for row in shared)) for i in (0, 4))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for (color, strategy), overlap in itertools.product(enumerate(strategies), (True, False)):
            chosen = [r for r in shared if (r.op, r.strategy, r.overlap) == (name, strategy, overlap)]
            points = sorted((row.rows_in_all, 100 * row.share) for row in chosen)
            if points:
                label = strategy if overlap else None
                axis.semilogx(*zip(*points, strict=True), "o-" if overlap else "o--", color=f"C{color}", label=label)
        axis.axhline(100 * _GOAL, color="black", linewidth=0.8)
        axis.set(title=name, xlabel="tokens in all", ylabel="% of the ideal")
        axis.grid(True, alpha=0.3)
    axes[0][0].legend()
    figure.savefig(path, dpi=110)
