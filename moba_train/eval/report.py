"""An evaluation for a person: tables on the terminal, loss_by_position.png and passkey.png (a heat map)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from moba_train.eval.passkey import Cell
from moba_train.eval.position_loss import PositionLoss

__all__ = ["draw", "print_tables"]

_PARTS = 8  # in the table of losses; the picture and the JSON have every bucket


def print_tables(title: str, losses: Sequence[PositionLoss], cells: Sequence[Cell]) -> None:
    """Loss in eighths of each length, and a line of depths for each length of the passkey grid."""
    console = Console()
    if losses:
        console.print(f"{title}: loss by position, nats per token", highlight=False, soft_wrap=True)
        table = Table()
        for heading in ("part of the length", *(_tokens(loss) for loss in losses)):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_row("documents", *(str(loss.documents) for loss in losses))
        table.add_row("all", *(f"{loss.loss:.4f}" for loss in losses), end_section=True)
        for part, row in enumerate(zip(*(_coarse(loss.by_position) for loss in losses), strict=True), start=1):
            table.add_row(f"{part}/{_PARTS}", *(f"{value:.4f}" for value in row))
        console.print(table)
    for name, show in _measures(cells):
        depths = sorted({cell.depth for cell in cells})
        console.print(f"{title}: passkey, {name}", highlight=False, soft_wrap=True)
        table = Table()
        for heading in ("length", *(f"depth {depth:g}" for depth in depths)):
            table.add_column(heading, justify="right", no_wrap=True)
        for length in sorted({cell.length for cell in cells}):
            table.add_row(f"{length:,}", *(show(_at(cells, length, depth)) for depth in depths))
        console.print(table)


def draw(
    folder: Path, title: str, losses: Sequence[PositionLoss], cells: Sequence[Cell], trained_length: int
) -> list[Path]:
    """Draw what was measured; the paths of the pictures."""
    pictures = []
    if losses:
        figure = Figure(figsize=(8, 4.5), layout="tight")
        axes = figure.subplots()
        for loss in losses:
            width = loss.length / len(loss.by_position)
            places = [(i + 0.5) * width for i in range(len(loss.by_position))]
            label = f"{_tokens(loss)} tokens, {loss.documents} documents"
            axes.plot(places, loss.by_position, "o-", markersize=3, label=label)
        if max(loss.length for loss in losses) > trained_length:
            axes.axvline(trained_length, color="grey", linestyle=":", label="length it was made for")
        axes.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)", title=title)
        axes.legend()
        pictures.append(folder / "loss_by_position.png")
        figure.savefig(pictures[-1], dpi=120)
    if cells:
        pictures.append(folder / "passkey.png")
        _heat_map(title, cells).savefig(pictures[-1], dpi=120)
    return pictures


def _tokens(loss: PositionLoss) -> str:
    return f"{loss.length:,}" if loss.context is None else f"{loss.length:,}, last {loss.context:,} shown"


def _heat_map(title: str, cells: Sequence[Cell]) -> Figure:
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    panels: list[tuple[str, Callable[[Cell], float | None]]] = [("exact match", lambda cell: cell.exact)]
    if cells[0].preferred is not None:
        panels.append(("key preferred to distractors", lambda cell: cell.preferred))
    figure = Figure(figsize=(1.5 + 0.9 * len(lengths) * len(panels) + 1.5, 1.8 + 0.45 * len(depths)), layout="tight")
    figure.suptitle(title)
    for axes, (name, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        grid = [[value(_at(cells, length, depth)) for length in lengths] for depth in depths]
        axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", alpha=0.7, aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30)
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set(xlabel="length (tokens)", ylabel="depth", title=name)
        for y, row in enumerate(grid):
            for x, share in enumerate(row):
                axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8)
    return figure


def _measures(cells: Sequence[Cell]) -> list[tuple[str, Callable[[Cell], str]]]:
    if not cells:
        return []
    measures: list[tuple[str, Callable[[Cell], str]]] = [("exact match", lambda cell: f"{cell.exact:.0%}")]
    if cells[0].margin is not None:
        name = "key preferred to distractors, mean margin in nats"
        measures.append((name, lambda cell: f"{cell.preferred:.0%} {cell.margin:+.2f}"))
    return measures


def _at(cells: Sequence[Cell], length: int, depth: float) -> Cell:
    return next(cell for cell in cells if (cell.length, cell.depth) == (length, depth))


def _coarse(values: Sequence[float]) -> list[float]:
    """The values in `_PARTS` runs of neighbours, each run's mean; nan where there are too few for a run."""
    bounds = [i * len(values) // _PARTS for i in range(_PARTS + 1)]
    runs = [values[start:end] for start, end in pairwise(bounds)]
    return [sum(run) / len(run) if run else float("nan") for run in runs]
