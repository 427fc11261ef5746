"""attention.dense_last_layers=auto: how many last layers become full so that sparse loss masks teach enough keys.

Once, before the first step: rows of the training data give the density of the loss mask; the model as it starts gives
the picks, and from them follows the gradient density of every plan with more dense last layers (the layers below them
see the same inputs, so one look serves all). The smallest number is chosen whose direct density, meaned over layers, is
at least `attention.dense_target` of what full attention in every layer would have. Why the direct one, and what both
are: gradient_density.py. With a loss on every token each layer is as dense as it can be, and the answer is 0. Under a
schedule every phase that does not set the number itself is measured, with the model as it is now; the most wins.

The number stands in the run's configuration from then on, so in its checkpoints: a resumed run takes it from there.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch.distributed as dist

from moba_train.model.layer_plan import LayerKind, Plan, describe, plan_phases
from moba_train.train.gradient_density import GradientDensity, density_of
from moba_train.train.observe import ObservedRow, observe, sample_rows
from moba_train.train.setup import Run

__all__ = ["resolve_dense_layers"]

_LOG = logging.getLogger(__name__)
_SAMPLED_ROWS = 16
# A judgement: in the MoBA report (arXiv 2502.13189, layer-wise hybrid) SFT loss goes on falling up to many full layers.
_DEFAULT_TARGET = 0.5


def resolve_dense_layers(run: Run) -> None:
    """Put a number in the place of `auto` in `run.config`; all ranks call it, between setup and the first step."""
    if run.config.attention.dense_last_layers != "auto":
        return
    by_number = [_plans(run, number) for number in range(run.config.model.num_layers + 1)]
    # Per phase its plans by number; phases that `auto` cannot change have nothing to say.
    phases = [plans for plans in dict.fromkeys(zip(*by_number, strict=True)) if plans[0] != plans[-1]]
    if not phases:
        _LOG.info("attention.dense_last_layers=auto: no layer is left to make full; 0")
    told = [max((_choose(run, plans) for plans in phases), default=0)]
    dist.broadcast_object_list(told)
    run.config = run.config.with_dense_last_layers(told[0])


def _plans(run: Run, number: int) -> list[Plan]:
    """The plan of every phase with that many dense last layers."""
    attention = run.config.with_dense_last_layers(number).attention
    return [plan for _, plan in plan_phases(attention, run.config.model.num_layers)]


def _choose(run: Run, plans: Sequence[Plan]) -> int:
    """The smallest index into `plans`, which differ in their dense last layers, with enough density; says why."""
    target = run.config.attention.dense_target or _DEFAULT_TARGET
    rows = _look(run, plans[0])
    everything = density_of(run, rows, tuple(dataclasses.replace(layer, kind=LayerKind.FULL) for layer in plans[0]))
    tried: list[GradientDensity] = []
    for plan in plans:
        tried.append(density_of(run, rows, plan))
        if tried[-1].mean_direct >= target * everything.mean_direct:
            break
    _tell(plans[0], tried, everything, target, len(rows) * run.groups.data.size)
    return len(tried) - 1


def _look(run: Run, plan: Plan) -> list[ObservedRow]:
    return [row for rows in sample_rows(run, run.data.train, _SAMPLED_ROWS) for row in observe(run, plan, rows)]


def _tell(base: Plan, tried: list[GradientDensity], everything: GradientDensity, target: float, rows: int) -> None:
    lines = [
        f"attention.dense_last_layers=auto on {describe(base)}: {everything.loss:.2%} of the labels of {rows} rows "
        "carry loss. Share of (position, key head) pairs with a gradient, mean over layers:",
        "  dense last layers   from the loss tokens' own queries   through all layers",
    ]
    for name, density in [*enumerate(tried), ("all", everything)]:
        through = sum(density.pairs) / len(density.pairs)
        lines.append(f"  {name!s:>17}   {density.mean_direct:>35.1%}   {through:>18.1%}")
    reached = tried[-1].mean_direct / everything.mean_direct if everything.loss else 1.0
    lines.append(
        f"  chose {len(tried) - 1}: the fewest with {reached:.0%} of full attention's direct density "
        f"(attention.dense_target={target:g})"
    )
    _LOG.info("\n".join(lines))
