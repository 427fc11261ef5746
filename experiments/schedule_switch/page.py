"""The page of schedule_switch: what its trainings' losses say of the switch and of the last positions."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.common import overrides_block, provenance, table, verdict
from moba_train.train.metrics import read_metrics

EIGHTHS = 8
POSITION_BOUND = 0.01  # nats per token, hybrid from full in the last eighth of the context
SPIKE_BOUND = 2.0  # sigmas
NOISE_STEPS = 50  # before the switch, whose step-to-step changes make sigma
AFTER_STEPS = 10  # after the switch, in which a spike is looked for


@dataclass(frozen=True)
class Curve:
    """One training: its loss by step (the first is step 1), validation loss, whole and by eighths of the context."""

    losses: list[float]
    validation: float
    eighths: list[float]
    plans: list[tuple[int, str]]  # (first step, layers)


@dataclass(frozen=True)
class Switch:
    """The hybrid's loss around its switch: `step` steps are MoBA. sigma in nats, the others in sigmas."""

    step: int
    before: int
    after: int
    sigma: float
    jump: float
    rise: float
    excess: float
    apart: float  # nats: largest difference between hybrid and MoBA while both are MoBA
    chance: float  # nats: the mean of that, without sign, over the last `before` steps

    @property
    def largest(self) -> float:
        """The largest of the three measures of a spike."""
        return max(self.jump, self.rise, self.excess)


Seed = dict[str, Curve]  # by arm


def publish(folder: Path) -> None:
    """README.md and results.png from the folder's results.json."""
    results = json.loads((folder / "results.json").read_text())
    seeds = [{arm: Curve(**curve) for arm, curve in seed.items()} for seed in results["seeds"]]
    switches = [around_switch(seed["hybrid"], seed["moba"]) for seed in seeds]
    draw(seeds, switches[0], folder / "results.png")
    page = write_page(seeds, switches, results["environment"])
    earlier = folder / "earlier.md"  # written by hand, where another setting was tried before
    (folder / "README.md").write_text(page + ("\n" + earlier.read_text() if earlier.exists() else ""))


def read_curve(folder: Path) -> Curve:
    """A training's results from its metrics.jsonl."""
    records = read_metrics(folder)
    train = [record for record in records if "loss" in record]
    assert [record["step"] for record in train] == list(range(1, len(train) + 1))
    (*_, last) = (record for record in records if "validation_loss" in record)
    return Curve(
        losses=[round(record["loss"], 5) for record in train],
        validation=last["validation_loss"],
        eighths=last["validation_loss_by_position"],
        plans=[(record["step"], record["layer_plan"]) for record in train if "layer_plan" in record],
    )


def around_switch(hybrid: Curve, moba: Curve) -> Switch:
    """Sizes of the loss's changes at the switch.

    With s the last MoBA step and L_t the training loss of step t: sigma is the sample standard deviation of
    L_t - L_(t-1) over t = s - W + 1 .. s; jump = L_(s+1) - L_s; rise = max of L_(s+1) .. L_(s+K) less the mean of
    L_(s-K+1) .. L_s; excess = max over the same K steps of hybrid's loss less MoBA's, which sees the same batches.
    """
    step = next(step for (_, old), (step, plan) in itertools.pairwise(hybrid.plans) if plan != old) - 1
    losses = hybrid.losses  # losses[step] is L_(s+1)
    before = min(NOISE_STEPS, step - 1)
    after = min(AFTER_STEPS, len(losses) - step, step)
    sigma = statistics.stdev(losses[t] - losses[t - 1] for t in range(step - before, step))
    level = statistics.fmean(losses[step - after : step])
    return Switch(
        step=step,
        before=before,
        after=after,
        sigma=sigma,
        jump=(losses[step] - losses[step - 1]) / sigma,
        rise=(max(losses[step : step + after]) - level) / sigma,
        excess=max(losses[t] - moba.losses[t] for t in range(step, step + after)) / sigma,
        apart=max(abs(losses[t] - moba.losses[t]) for t in range(step)),
        chance=statistics.fmean(abs(losses[t] - moba.losses[t]) for t in range(step - before, step)),
    )


def write_page(seeds: list[Seed], switches: list[Switch], told: dict[str, Any]) -> str:
    """The results page in Markdown."""
    gaps = {arm: [seed[arm].eighths[-1] - seed["full"].eighths[-1] for seed in seeds] for arm in ("moba", "hybrid")}
    gap, largest = statistics.fmean(gaps["hybrid"]), max(switch.largest for switch in switches)
    sigmas, nats = "{:+.2f}".format, "{:+.4f}".format
    means = {arm: _mean_losses([seed[arm] for seed in seeds]) for arm in seeds[0]}
    first, steps = switches[0], len(seeds[0]["full"].losses)
    count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    parts = [
        "# MoBA, full attention, and MoBA that switches to full attention at nine tenths of training",
        "The MoBA report (arXiv 2502.13189, section 3.2) trained 1.5B parameters with MoBA for 90 % of the tokens and "
        "full attention for the rest: the loss by position ended at full attention's, and did not spike at the switch. "
        f"Here a small GPT, {steps} steps, {first.step} of them MoBA in the hybrid, {count}.",
        *provenance(told),
        "## What came out",
        table(
            ["expected", "measured", "bound", ""],
            [
                "hybrid less full in the last eighth of the context, nats per token, mean over seeds",
                nats(gap),
                f"within {POSITION_BOUND}",
                verdict(abs(gap) <= POSITION_BOUND) + " (lower)" * (gap < -POSITION_BOUND),
            ],
            [
                "largest rise of the loss at the switch over seeds, sigmas",
                sigmas(largest),
                f"at most {SPIKE_BOUND}",
                verdict(largest <= SPIKE_BOUND),
            ],
        ),
        f"In the last eighth MoBA alone is {nats(statistics.fmean(gaps['moba']))} nats per token from full attention, "
        f"the hybrid {nats(gap)}. {_noise(seeds)}",
        *_reading(statistics.fmean(gaps["moba"]), statistics.fmean(switch.chance for switch in switches)),
        f"## Validation loss, nats per token, whole and by eighths of the context: means over {count}",
        table(
            ["", "all", *(f"{i}/{EIGHTHS}" for i in range(1, EIGHTHS + 1))],
            *([arm, *(f"{loss:.4f}" for loss in losses)] for arm, losses in means.items()),
            *(
                [f"{arm} - full", *(nats(a - b) for a, b in zip(means[arm], means["full"], strict=True))]
                for arm in ("moba", "hybrid")
            ),
        ),
        "## The switch",
        table(
            ["sigmas", *(f"seed {i}" for i in range(len(seeds)))],
            ["jump: first step of full attention less the step before it", *(sigmas(s.jump) for s in switches)],
            [
                f"rise: highest of the first {first.after} full steps less the mean of the {first.after} before",
                *(sigmas(s.rise) for s in switches),
            ],
            [
                f"excess: highest of hybrid less MoBA on the same batch, of these {first.after} steps",
                *(sigmas(s.excess) for s in switches),
            ],
            ["one sigma, nats per token", *(f"{s.sigma:.4f}" for s in switches)],
            ["hybrid and MoBA at most apart before the switch, nats", *(f"{s.apart:.2g}" for s in switches)],
            [f"the same, mean of its last {first.before} steps", *(f"{s.chance:.2g}" for s in switches)],
        ),
        "One sigma is the sample standard deviation of the changes of the hybrid's training loss from step to step, "
        f"L_t - L_(t-1), over its last {first.before} steps of MoBA. The criterion takes the largest of the three. "
        "Jump and rise contain the difference between batches; in excess hybrid and MoBA see the same ones.",
        "![training loss of the first seed, the same around the switch, and validation loss by position, mean over "
        "seeds](results.png)",
        "## Settings of all trainings",
        overrides_block(told["setting"]),
    ]
    return "\n\n".join(parts) + "\n"


def draw(seeds: list[Seed], switch: Switch, path: Path) -> None:
    """Training loss of the first seed's arms, the same around the switch, and validation loss by position less full's,
    mean over seeds."""
    seed = seeds[0]
    figure = Figure(figsize=(15, 4.2), layout="tight")
    whole, near, position = figure.subplots(1, 3)
    window = range(max(1, switch.step - 30), min(switch.step + 31, len(seed["full"].losses) + 1))
    for arm, style in (("full", "-"), ("hybrid", "-"), ("moba", "--")):  # MoBA lies on the hybrid until the switch
        curve = seed[arm]
        for axes, steps in ((whole, range(1, len(curve.losses) + 1)), (near, window)):
            axes.plot(list(steps), [curve.losses[t - 1] for t in steps], style, linewidth=1, label=arm)
        centres = [(i + 0.5) / EIGHTHS for i in range(EIGHTHS)]
        means, base = (_mean_losses([each[name] for each in seeds])[1:] for name in (arm, "full"))
        apart = [a - b for a, b in zip(means, base, strict=True)]
        position.plot(centres, apart, f"o{style}", markersize=4, label=arm)
    position.axhline(POSITION_BOUND, color="0.4", linestyle=":", linewidth=0.8)
    for axes, title in ((whole, "training, first seed"), (near, "around the switch, first seed")):
        axes.axvline(switch.step + 0.5, color="0.4", linestyle="--", linewidth=0.8)
        axes.set(xlabel="step", ylabel="training loss (nats per token)", title=title)
    position.set(
        xlabel="position in the context",
        ylabel="validation loss less full's (nats)",
        title="by position, mean over seeds",
    )
    for axes in (whole, near, position):
        axes.legend()
    figure.savefig(path, dpi=120)


def _mean_losses(curves: list[Curve]) -> list[float]:
    """Validation loss, whole and by eighths, meaned over curves."""
    rows = [[curve.validation, *curve.eighths] for curve in curves]
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def _reading(moba_gap: float, chance: float) -> list[str]:
    """Paragraphs on what the numbers cannot say."""
    parts = []
    if moba_gap < -POSITION_BOUND:
        parts.append(
            "MoBA alone ends below full attention: so far in training, full attention is not what MoBA has to come up "
            "to. That the hybrid is not above it then says little of what a switch makes up for; a training in which "
            "full attention is ahead would."
        )
    if chance > POSITION_BOUND:
        parts.append(
            "Before the switch hybrid and MoBA are one training done twice, with the same weights, batches and layers, "
            f"and their training losses on the same batch end up {chance:.3f} apart on average, so far as the settings "
            "go by the order of additions in the kernels alone. How far chance moves a validation loss was not "
            "measured."
        )
    return parts


def _noise(seeds: list[Seed]) -> str:
    """How far trainings lie apart that should agree: what a gap has to be compared with."""
    if len(seeds) < 2:
        return "One seed: how much of this is chance is not known."
    ends = [seed["full"].eighths[-1] for seed in seeds]
    gaps = ", ".join(f"{seed['hybrid'].eighths[-1] - seed['full'].eighths[-1]:+.4f}" for seed in seeds)
    return f"By seed the hybrid's are {gaps}; full attention's own losses are {max(ends) - min(ends):.4f} apart there."
