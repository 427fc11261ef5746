"""Full or MoBA, per layer and per step: the only place that decides. Pure, no torch.

The plan covers all layers of the model, numbered from 0; a pipeline stage takes its slice. MoBA adds no parameters, so
the plan may change between steps without touching weights or optimizer state.

Pattern grammar, repeated over the layers:   pattern = item {"," item}   item = kind ["*" count]   kind = moba | full
    "moba"          every layer MoBA
    "moba*3,full"   three MoBA layers, then a full one, and again
Afterwards `dense_first_layers` and `dense_last_layers` make the ends full: the remedy for sparse loss masks (MoBA
report, arXiv 2502.13189, section 3.2, layer-wise hybrid); `full_layers` makes any others full; `overrides` gives MoBA
layers another block size or top-k. `schedule` changes all of these at given steps (the report's MoBA/full hybrid
training).
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from moba_train.config.schedule import attention_of_phase
from moba_train.config.schema import AttentionConfig, ConfigError

__all__ = ["LayerAttention", "LayerKind", "Plan", "describe", "layer_plan", "plan_phases"]


class LayerKind(enum.StrEnum):
    """What a layer's attention computes."""

    FULL = "full"
    MOBA = "moba"


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention; all but the kind only matters to MoBA. top_k counts blocks, the own one included."""

    kind: LayerKind
    block_size: int
    top_k: int
    force_first_block: bool = False
    force_previous_block: bool = False
    share_picks_in_group: bool = False

    @property
    def routing(self) -> dict[str, Any]:
        """What attention's `moba_attention` and `select_blocks` take to pick blocks."""
        names = (
            "block_size",
            "top_k",
            "force_first_block",
            "force_previous_block",
            "share_picks_in_group",
        )
        return {name: getattr(self, name) for name in names}


Plan = tuple[LayerAttention, ...]


def layer_plan(attention: AttentionConfig, num_layers: int, step: int = 0) -> Plan:
    """What every layer computes at `step` (0-based). ConfigError on a pattern, count or layer that makes no sense.

    Phases begin at steps: config/schedule.py has turned other units into them.
    """
    if step < 0:
        raise ValueError(f"step={step} is negative")
    key = "attention"
    active = attention
    for index, phase in enumerate(attention.schedule):
        assert phase.step is not None, "resolve_schedule comes first"
        if phase.step <= step:
            key, active = f"attention.schedule[{index}]", attention_of_phase(attention, phase)
    return _plan(active, num_layers, key)


def plan_phases(attention: AttentionConfig, num_layers: int) -> list[tuple[int, Plan]]:
    """(first step, plan) of every phase of training, in order; one, from step 0, without a schedule.

    ConfigError for anything in any phase that `layer_plan` would refuse, and for an override that no phase heeds.
    """
    base = _plan(attention, num_layers, "attention")  # checked also where a phase begins at step 0 and hides it
    starts = [phase.step or 0 for phase in attention.schedule]
    phases = [(step, layer_plan(attention, num_layers, step)) for step in starts]
    unscheduled = [] if 0 in starts else [(0, base)]
    inherited = [plan for phase, (_, plan) in zip(attention.schedule, phases, strict=True) if phase.overrides is None]
    _check_heeded(attention, [*(plan for _, plan in unscheduled), *inherited], "attention")
    for index, (phase, (_, plan)) in enumerate(zip(attention.schedule, phases, strict=True)):
        if phase.overrides is not None:
            _check_heeded(attention_of_phase(attention, phase), [plan], f"attention.schedule[{index}]")
    return unscheduled + phases


def describe(plan: Plan) -> str:
    """The plan in one line, equal neighbours counted: 'moba*3(64,4), full*1' with (block_size, top_k).

    Gate options follow where they are on: 'moba*3(64,4,previous,shared)'.
    """
    runs = ((name, len(list(group))) for name, group in itertools.groupby((x.kind, _details(x)) for x in plan))
    return ", ".join(f"{kind}*{count}{details}" for (kind, details), count in runs)


def _details(layer: LayerAttention) -> str:
    if layer.kind is LayerKind.FULL:
        return ""
    named = {
        "first": layer.force_first_block,
        "previous": layer.force_previous_block,
        "shared": layer.share_picks_in_group,
    }
    options = [name for name, on in named.items() if on]
    return f"({','.join([str(layer.block_size), str(layer.top_k), *options])})"


def _plan(attention: AttentionConfig, num_layers: int, key: str) -> Plan:
    """The plan of one phase; `key` is where its settings are, for messages."""
    kinds = list(itertools.islice(itertools.cycle(_parse(attention.pattern, f"{key}.pattern")), num_layers))
    first, last = attention.dense_first_layers, attention.dense_last_layers
    if isinstance(last, str):
        raise ConfigError(f"{key}.dense_last_layers", last, "a number: what it stands for is measured at the start")
    for name, count in (("dense_first_layers", first), ("dense_last_layers", last)):
        if not 0 <= count <= num_layers:
            raise ConfigError(f"{key}.{name}", count, f"choose 0 to model.num_layers={num_layers}")
    _check_layers(f"{key}.full_layers", attention.full_layers, num_layers)
    _check_sizes(key, attention.block_size, attention.top_k)
    dense = {*range(first), *range(num_layers - last, num_layers), *attention.full_layers}
    gate = LayerAttention(
        LayerKind.MOBA,
        attention.block_size,
        attention.top_k,
        attention.force_first_block,
        attention.force_previous_block,
        attention.share_picks_in_group,
    )
    plan = [replace(gate, kind=LayerKind.FULL if i in dense else kind) for i, kind in enumerate(kinds)]
    _check_layers(f"{key}.overrides", [layer for each in attention.overrides for layer in each.layers], num_layers)
    for index, override in enumerate(attention.overrides):
        where = f"{key}.overrides[{index}]"
        changes = {name: getattr(override, name) for name in ("block_size", "top_k")}
        changes = {name: value for name, value in changes.items() if value is not None}
        if not override.layers or not changes:
            raise ConfigError(
                where, override, "name layers and what is other there: {layers: [0, 1], block_size: 128, top_k: 8}"
            )
        _check_sizes(where, **changes)
        for layer in override.layers:
            plan[layer] = replace(plan[layer], **changes)
    least = min((each.top_k for each in plan if each.kind is LayerKind.MOBA), default=None)
    forced = [name for name in ("force_first_block", "force_previous_block") if getattr(attention, name)]
    if least is not None and least < 1 + len(forced):
        what = " and ".join(f"attention.{name}" for name in forced)
        remedy = f"with {what} it must be at least {1 + len(forced)}: the own block and what is forced"
        raise ConfigError(f"{key}.top_k", least, remedy)
    return tuple(plan)


def _check_layers(key: str, layers: Iterable[int], num_layers: int) -> None:
    """Refuse layers that the model does not have, and layers named twice."""
    layers = list(layers)
    for layer in layers:
        if not 0 <= layer < num_layers:
            hint = f"; counted from the end it is {num_layers + layer}" if -num_layers <= layer < 0 else ""
            raise ConfigError(key, layer, f"layers are numbered 0 to {num_layers - 1}{hint}")
        if layers.count(layer) > 1:
            raise ConfigError(key, layer, "this layer is named twice; name it once")


def _check_sizes(key: str, block_size: int = 1, top_k: int = 1) -> None:
    for name, value in (("block_size", block_size), ("top_k", top_k)):
        if value < 1:
            raise ConfigError(f"{key}.{name}", value, "must be at least 1")


def _check_heeded(attention: AttentionConfig, plans: list[Plan], key: str) -> None:
    """Refuse an override of a layer that is MoBA in none of the plans it is for."""
    for index, override in enumerate(attention.overrides):
        for layer in override.layers:
            if all(plan[layer].kind is LayerKind.FULL for plan in plans):
                raise ConfigError(
                    f"{key}.overrides[{index}].layers",
                    layer,
                    "this layer is never MoBA under these settings; leave it out of the override",
                )


_MOST_LAYERS = 10_000  # of one kind in a pattern: a slip is refused rather than expanded


def _parse(pattern: str, key: str) -> list[LayerKind]:
    kinds: list[LayerKind] = []
    for item in pattern.split(","):
        match = re.fullmatch(r"\s*(moba|full)\s*(?:\*\s*(\d+))?\s*", item)
        count = int(match[2] or 1) if match else 0
        if match is None or not 0 < count <= _MOST_LAYERS:
            raise ConfigError(key, pattern, 'write kinds with counts, repeated over the layers: "moba", "moba*3,full"')
        kinds += [LayerKind(match[1])] * count
    return kinds
