"""attention.dense_last_layers=auto: how many last layers become full so that sparse loss masks teach enough keys.

Once, before the first step: rows of the training data give the density of the loss mask; the model as it starts gives
the picks, and from them follows the gradient density of every plan with more dense last layers (the layers below them
see the same inputs, so one look serves all). The smallest number is chosen whose direct density, meaned over layers, is
at least `attention.dense_target` of what full attention in every layer would have. Why the direct one, and what both
are: gradient_density.py. With a loss on every token each layer is as dense as it can be, and the answer is 0.

The number stands in the run's configuration from then on, so in its checkpoints: a resumed run takes it from there.
"""

from __future__ import annotations

import dataclasses
import logging

import torch.distributed as dist

from moba_train.config.schema import RunConfig
from moba_train.model.layer_plan import LayerAttention, LayerKind, layer_plan
from moba_train.train.checkpoint import find_start, read_metadata
from moba_train.train.gradient_density import GradientDensity, density_of
from moba_train.train.observe import observe, sample_rows
from moba_train.train.setup import Run

__all__ = ["DEFAULT_TARGET", "resolve_dense_layers"]

_LOG = logging.getLogger(__name__)
_SAMPLED_ROWS = 16
# A judgement: in the MoBA report (arXiv 2502.13189, layer-wise hybrid) SFT loss goes on falling up to many full layers.
DEFAULT_TARGET = 0.5


def resolve_dense_layers(run: Run) -> None:
    """Put a number in the place of `auto` in `run.config`; all ranks call it, between setup and the first step."""
    config = run.config
    if config.attention.dense_last_layers != "auto":
        return
    start = find_start(config)
    if start is not None and start.is_relative_to(run.folder):
        number = read_metadata(start).config["attention"]["dense_last_layers"]
        _LOG.info("dense_last_layers=auto: %d, as chosen when this run began", number)
    else:
        number = _choose(run)
    told = [number]
    dist.broadcast_object_list(told)
    run.config = config.with_dense_last_layers(told[0])


def _choose(run: Run) -> int:
    config = run.config
    layers = config.model.num_layers
    target = DEFAULT_TARGET if config.attention.dense_target is None else config.attention.dense_target
    base = _plan(config, 0, run.step)
    rows = [row for rows in sample_rows(run, run.data.train, _SAMPLED_ROWS) for row in observe(run, base, rows)]
    everything = density_of(run, rows, tuple(dataclasses.replace(layer, kind=LayerKind.FULL) for layer in base))
    if not everything.loss:
        _LOG.info("dense_last_layers=auto: no label of the sampled rows carries loss; chose 0")
        return 0
    tried: list[GradientDensity] = []
    for number in range(layers + 1):
        tried.append(density_of(run, rows, _plan(config, number, run.step)))
        if tried[-1].mean_direct >= target * everything.mean_direct:
            break
    _tell(tried, everything, target, len(rows) * run.groups.data.size)
    return len(tried) - 1


def _plan(config: RunConfig, number: int, step: int) -> tuple[LayerAttention, ...]:
    attention = dataclasses.replace(config.attention, dense_last_layers=number)
    return layer_plan(attention, config.model.num_layers, step)


def _tell(tried: list[GradientDensity], everything: GradientDensity, target: float, rows: int) -> None:
    lines = [
        f"dense_last_layers=auto: {everything.loss:.2%} of the labels of {rows} rows carry loss. Share of (position, "
        "key head) pairs with a gradient, mean over layers:",
        "  dense last layers   from the loss tokens' own queries   through all layers",
    ]
    for name, density in [*enumerate(tried), ("all", everything)]:
        through = sum(density.pairs) / len(density.pairs)
        lines.append(f"  {name!s:>17}   {density.mean_direct:>35.1%}   {through:>18.1%}")
    reached = tried[-1].mean_direct / everything.mean_direct
    lines.append(
        f"  chose {len(tried) - 1}: the fewest with {reached:.0%} of full attention's direct density "
        f"(attention.dense_target={target:g})"
    )
    _LOG.info("\n".join(lines))
