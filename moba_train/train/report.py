"""The pictures of a run: loss.png, loss_by_position.png and gate.png. Imports matplotlib: import it where one draws."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moba_train.train.gate_picture import draw_gate
from moba_train.train.metrics import read_metrics

__all__ = ["draw"]


def draw(folder: Path, sequence_length: int) -> list[Path]:
    """Draw the pictures of a run from its metrics.jsonl; the paths of those that had data."""
    records = read_metrics(folder)
    pictures = []
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    validation = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    if train or validation:
        figure, axes = _figure()
        if train:
            axes.plot(*zip(*train, strict=True), label="train", linewidth=1)
        if validation:
            axes.plot(*zip(*validation, strict=True), "o-", label="validation", markersize=4)
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.name)
        axes.legend(loc="upper right")
        _mark_switches(axes, records)
        pictures.append(_save(figure, folder / "loss.png"))
    by_position = [r for r in records if "validation_loss_by_position" in r]
    if by_position:
        figure, axes = _figure()
        for record in by_position[:: -max(1, len(by_position) // 4)][:5][::-1]:  # the last one always
            losses = record["validation_loss_by_position"]
            width = record.get("validation_length", sequence_length) / len(losses)  # stages differ in it
            points = [((i + 0.5) * width, loss) for i, loss in enumerate(losses) if loss is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=f"step {record['step']}")
        axes.set(
            xlabel="position in the document (tokens)", ylabel="validation loss (nats per token)", title=folder.name
        )
        axes.legend()
        pictures.append(_save(figure, folder / "loss_by_position.png"))
    gate = next((r for r in reversed(records) if "gate/pick_rate" in r), None)
    if gate is not None:
        pictures.append(draw_gate(gate, folder / "gate.png"))
    return pictures


def _mark_switches(axes: Any, records: list[dict[str, Any]]) -> None:
    """A labelled vertical line before the first step of every new layer plan."""
    plans = [(r["step"], r["layer_plan"]) for r in records if "layer_plan" in r]
    for (_, before), (step, plan) in itertools.pairwise(plans):
        if plan != before:  # a resumed run tells its plan again
            axes.axvline(step - 0.5, color="0.4", linestyle="--", linewidth=0.8)
            label = textwrap.shorten(plan, 48, placeholder=" ...")
            place = {"rotation": 90, "ha": "right", "va": "bottom", "fontsize": 7}
            axes.text(step - 0.5, 0.02, label, transform=axes.get_xaxis_transform(), **place)


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, 4.5), layout="tight")  # without pyplot: no display, no global state
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
