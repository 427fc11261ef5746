"""gate.png: which blocks the gate picks, layer by layer, with the layer's other numbers beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

__all__ = ["draw_gate"]

# Panels on the right: key of the record, title. All are shares.
_LINES = {
    "gate/sink_share": "picks on the\nfirst block",
    "gate/mass_covered": "dense mass\non picks",
    "gradient_density/pairs": "gradient\ndensity",
    "gradient_density/direct": "... direct",
}


def draw_gate(record: dict[str, Any], path: Path) -> Path:
    """Draw a record of gate_metrics.gate_record: a row per layer, from 0 at the top, a cell per block."""
    rates, widths = record["gate/pick_rate"], record["gate/pick_rate_tokens"]
    num_layers = len(rates)
    height = min(14.0, 1.6 + 0.22 * max(num_layers, 6))
    figure = Figure(figsize=(11, height), layout="constrained")  # without pyplot: no display, no global state
    axes = figure.subplots(1, 1 + len(_LINES), sharey=True, width_ratios=[6, *[1] * len(_LINES)])

    heat = axes[0]
    values = [x for row in rates for x in row or [] if x is not None]
    norm = PowerNorm(0.5, vmin=0, vmax=max([*values, 1e-9]))  # the sink is far above all other blocks
    mesh = None
    for layer, (row, width) in enumerate(zip(rates, widths, strict=True)):
        if row is None:
            heat.axhspan(layer - 0.5, layer + 0.5, facecolor="0.9", hatch="///", edgecolor="0.75", linewidth=0)
            continue
        edges = [i * width for i in range(len(row) + 1)]
        cells = [[math.nan if x is None else x for x in row]]
        mesh = heat.pcolormesh(edges, [layer - 0.5, layer + 0.5], cells, norm=norm, cmap="viridis")
    heat.set(xlabel="place of the block in its document (tokens)", ylabel="layer", ylim=(num_layers - 0.5, -0.5))
    length = max((len(row) * width for row, width in zip(rates, widths, strict=True) if row), default=1)
    heat.set_xlim(0, length)
    heat.xaxis.set_major_locator(MultipleLocator(2 ** max(0, math.ceil(math.log2(length / 8)))))
    heat.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    heat.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"))
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=heat, location="left", pad=0.02, shrink=min(1.0, 12 / num_layers))
        bar.set_label("share of the queries that could\npick it and do")
    if any(row is None for row in rates):
        full = Patch(facecolor="0.9", hatch="///", edgecolor="0.75", label="full attention")
        heat.legend(handles=[full], loc="lower right", framealpha=0.9, fontsize=8)

    for axis, (key, title) in zip(axes[1:], _LINES.items(), strict=True):
        points = [(x, layer) for layer, x in enumerate(record[key]) if x is not None]
        if points:
            axis.barh([y for _, y in points], [x for x, _ in points], height=0.7, color="tab:blue")
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
        axis.grid(axis="x", linewidth=0.5)
        axis.set_axisbelow(True)
    figure.suptitle(
        f"{path.parent.name}, step {record['step']}: the blocks that each layer's queries pick", fontsize=11
    )
    figure.savefig(path, dpi=120)
    return path
