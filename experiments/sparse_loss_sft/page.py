"""The page of the experiment: results_*.json of a folder -> README.md and a picture for each start."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.common import overrides_block, provenance, table, verdict
from moba_train.train.metrics import read_metrics

__all__ = [
    "OWN",
    "Arm",
    "draw",
    "gap_closed",
    "has_gap",
    "mean_density",
    "mean_losses",
    "publish",
    "read_arm",
    "write_section",
]

GAP_BOUND = 0.9  # of the gap between no full layer and all, closed by half of them
OWN = "own"  # name of the results of the model trained here

INTRODUCTION = """# Full layers at the end, for fine-tuning with few loss tokens

The MoBA report (arXiv 2502.13189, section 3.2) fine-tuned a MoBA model on sparse loss masks with its last 0, 1, 3, 5,
10 and all 32 layers full: the loss fell from layer to layer, and 10 full layers were as good as all. Here the rows are
real source code, then questions about it whose answers stand in it word for word (`build.py`): the default of an
argument, what a function returns, the value of a constant, the base of a class. Only the answers carry loss. All
trainings of a start have the same weights to begin with, the same rows and, by seed, the same order of them; they
differ in the number of full layers at the end alone, which are full in training and in evaluation. Loss is measured on
documents held out from pretraining here and from fine-tuning.

Gradient density is measured after the last step on a validation row
([definitions](../../moba_train/train/gradient_density.py)): direct, the share of (position, key head) pairs that the
loss tokens' own queries reach in a layer, meaned over layers; and through, the share that gets any gradient through
all layers."""


@dataclass(frozen=True)
class Arm:
    """One fine-tuning with the last `layers` layers full. Gradient density of each layer: gradient_density.py."""

    layers: int
    seed: int
    validation: float
    losses: list[float]  # of each step
    direct: list[float]
    through: list[float]
    loss_share: float  # of the labels of the validation row that was looked at


def publish(folder: Path) -> None:
    """README.md and a picture of each start from all results_*.json of the folder."""
    files = sorted(folder.glob("results_*.json"), key=lambda file: (file.stem != f"results_{OWN}", file.stem))
    sections = []
    for file in files:
        results = json.loads(file.read_text())
        arms = [Arm(**arm) for arm in results.pop("arms")]
        draw(arms, file.with_suffix(".png"))
        sections.append(write_section(arms, results, file.with_suffix(".png").name))
    (folder / "README.md").write_text("\n\n".join([INTRODUCTION, *sections]) + "\n")


def read_arm(folder: Path, layers: int, seed: int) -> Arm:
    """A fine-tuning's results from its metrics.jsonl."""
    records = read_metrics(folder)
    look = next(r for r in reversed(records) if "gradient_density/direct" in r)
    return Arm(
        layers=layers,
        seed=seed,
        validation=next(r["validation_loss"] for r in reversed(records) if "validation_loss" in r),
        losses=[round(r["loss"], 5) for r in records if "loss" in r],
        direct=look["gradient_density/direct"],
        through=look["gradient_density/pairs"],
        loss_share=look["gradient_density/loss"],
    )


def mean_losses(arms: list[Arm]) -> dict[int, tuple[float, float]]:
    """Final validation loss by number of full layers: mean over seeds, and its standard error (nan of one seed)."""
    found = {}
    for layers in sorted({arm.layers for arm in arms}):
        values = [arm.validation for arm in arms if arm.layers == layers]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        found[layers] = (statistics.fmean(values), error)
    return found


def gap_closed(losses: dict[int, tuple[float, float]], layers: int) -> float:
    """(loss of none - loss of `layers`) / (loss of none - loss of all); nan where there is no gap to close."""
    first, last = losses[min(losses)][0], losses[max(losses)][0]
    return (first - losses[layers][0]) / (first - last) if has_gap(losses) else math.nan


def has_gap(losses: dict[int, tuple[float, float]]) -> bool:
    """Whether all layers full are better than none, by more than twice the standard error where there are seeds."""
    (first, error), (last, other) = losses[min(losses)], losses[max(losses)]
    chance = 0.0 if math.isnan(error) else math.hypot(error, other)
    return first - last > 2 * chance


def mean_density(arms: list[Arm], layers: int) -> tuple[float, float]:
    """Direct and through, meaned over layers and seeds, of that many full layers."""
    chosen = [arm for arm in arms if arm.layers == layers]
    direct, through = ([statistics.fmean(getattr(arm, name)) for arm in chosen] for name in ("direct", "through"))
    return statistics.fmean(direct), statistics.fmean(through)


def write_section(arms: list[Arm], told: dict[str, Any], picture: str) -> str:
    """One start's part of the page, in Markdown; `told` is its results file without the arms."""
    losses, depth = mean_losses(arms), told["depth"]
    density = {layers: mean_density(arms, layers) for layers in losses}
    half = max((layers for layers in losses if layers <= depth // 2), default=0)
    closed = gap_closed(losses, half)
    rises = [(a, b) for a, b in itertools.pairwise(losses) if losses[b][0] > losses[a][0]]
    by_density = sorted(losses, key=lambda layers: density[layers][0])
    explained = all(losses[b][0] <= losses[a][0] for a, b in itertools.pairwise(by_density))
    correlation = rank_correlation([density[n][0] for n in losses], [mean for mean, _ in losses.values()])
    own, gap = told["name"] == OWN, has_gap(losses)

    def judged(met: bool) -> str:
        return verdict(met) if gap else "**cannot be told**"

    seeds, steps = len({arm.seed for arm in arms}), len(arms[0].losses)
    start = f"a model of {depth} layers pretrained here for {told['pretrain_steps']} steps" if own else told["name"]
    parts = [
        f"## From {start}",
        *provenance(told["environment"]),
        f"{steps} steps of fine-tuning, {seeds} seed{'s' * (seeds > 1)}. Documents of up to {told['characters']:,} "
        f"characters; {arms[0].loss_share:.2%} of the labels of the row that was looked at carry loss.",
        table(
            ["expected", "measured", "asked", ""],
            [
                "loss falls with every full layer added",
                "; ".join(f"rises from {a} to {b} by {losses[b][0] - losses[a][0]:.4f}" for a, b in rises) or "yes",
                "yes",
                judged(not rises),
            ],
            [
                f"share of the gap closed by {half} of {depth} layers",
                f"{closed:.2f}" if gap else "no gap",
                f">= {GAP_BOUND}",
                judged(closed >= GAP_BOUND),
            ],
            [
                "gradient density explains the order: the more of it, direct, the lower the loss",
                f"rank correlation {correlation:+.2f}",
                "-1",
                judged(explained),
            ],
        ),
        _reading(arms, losses, own),
        table(
            [
                "full layers at the end",
                "training loss at the first step",
                "validation loss, nats per loss token",
                *(["standard error over seeds"] * (seeds > 1)),
                "gap closed",
                "direct density",
                "through density",
            ],
            *(
                [
                    layers,
                    f"{_first_loss(arms, layers):.4f}",
                    f"{mean:.4f}",
                    *([f"{error:.4f}"] * (seeds > 1)),
                    f"{gap_closed(losses, layers):.2f}" if gap else "-",
                    *(f"{share:.1%}" for share in density[layers]),
                ]
                for layers, (mean, error) in losses.items()
            ),
        ),
        f"![validation loss by number of full layers and by gradient density, training loss]({picture})",
        overrides_block(told["environment"]["setting"]),
    ]
    return "\n\n".join(parts)


def _first_loss(arms: list[Arm], layers: int) -> float:
    """Loss of the first batch, before any step, meaned over seeds."""
    return statistics.fmean(arm.losses[0] for arm in arms if arm.layers == layers)


def _reading(arms: list[Arm], losses: dict[int, tuple[float, float]], own: bool) -> str:
    """What the numbers can say, and what they cannot."""
    none, most = min(losses), max(losses)
    before = _first_loss(arms, none), _first_loss(arms, most)
    start = (
        f"On the first batch, before any learning, the loss is {before[0]:.4f} with no full layer and {before[1]:.4f} "
        "with all."
    )
    if not has_gap(losses):
        (first, error), (last, other) = losses[none], losses[most]
        chance = "" if math.isnan(error) else f", where the standard error of that is {math.hypot(error, other):.4f}"
        return (
            f"Between no full layer and all the loss falls by {first - last:.4f}{chance}: there is no gap that could "
            f"be closed, and no order to explain. {start} A model that does not use far context, where the answers "
            "stand, gains nothing from layers that reach it."
        )
    parts = [start]
    if not own:
        parts.append(
            "A model that was pretrained with full attention alone has yet to get used to MoBA: what it lacks before "
            "any learning is part of the gap, beside what few loss tokens teach it. The numbers do not tell the two "
            "apart."
        )
    if len({arm.seed for arm in arms}) == 1:
        parts.append("One seed: how much chance there is in a loss is not known.")
    return " ".join(parts)


def rank_correlation(xs: list[float], ys: list[float]) -> float:
    """Spearman's, of values without ties; nan where there is no order."""
    if min(len(set(xs)), len(set(ys))) < 2:
        return math.nan
    places = [[sorted(values).index(value) for value in values] for values in (xs, ys)]
    return statistics.correlation(*places)


def draw(arms: list[Arm], path: Path) -> None:
    """Final loss by number of full layers and by direct density; training losses, smoothed over a tenth of the run."""
    figure = Figure(figsize=(15, 4.2), layout="tight")
    final, explained, training = figure.subplots(1, 3)
    losses = mean_losses(arms)
    means, errors = [m for m, _ in losses.values()], [0 if math.isnan(e) else e for _, e in losses.values()]
    final.errorbar(list(losses), means, errors, fmt="o-")
    final.set(xlabel="full layers at the end", ylabel="validation loss (nats per loss token)")
    explained.errorbar([mean_density(arms, n)[0] for n in losses], means, errors, fmt="o-")
    explained.set(xlabel="direct gradient density, mean over layers", ylabel="validation loss (nats per loss token)")
    for arm in (arm for arm in arms if arm.seed == 0):
        window = max(1, len(arm.losses) // 10)
        smooth = [statistics.fmean(arm.losses[max(0, i - window + 1) : i + 1]) for i in range(len(arm.losses))]
        training.plot(range(1, len(smooth) + 1), smooth, linewidth=1, label=f"{arm.layers} full")
    training.set(xlabel="step", ylabel="training loss (nats per loss token)")
    training.legend()
    figure.savefig(path, dpi=120)
