"""Full or MoBA, per layer and per step: the only place that decides. Pure, no torch.

The plan covers all layers of the model, numbered from 0; a pipeline stage takes its slice. MoBA adds no parameters, so
the plan may change between steps without touching weights or optimizer state.

Pattern grammar, repeated over the layers:   pattern = item {"," item}   item = kind ["*" count]   kind = moba | full
    "moba"          every layer MoBA
    "moba*3,full"   three MoBA layers, then a full one, and again
`dense_first_layers` and `dense_last_layers` make the ends full afterwards: the remedy for sparse loss masks (MoBA
report, arXiv 2502.13189, section 3.2, layer-wise hybrid).
"""

from __future__ import annotations

import enum
import itertools
import re
from dataclasses import dataclass

from moba_train.config.schema import AttentionConfig, ConfigError

__all__ = ["LayerAttention", "LayerKind", "describe", "layer_plan"]


class LayerKind(enum.StrEnum):
    """What a layer's attention computes."""

    FULL = "full"
    MOBA = "moba"


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention; block_size (tokens) and top_k (blocks, own included) only matter to MoBA."""

    kind: LayerKind
    block_size: int
    top_k: int


def layer_plan(attention: AttentionConfig, num_layers: int, step: int = 0) -> tuple[LayerAttention, ...]:
    """What every layer computes at `step` (0-based). ConfigError on a pattern or a count that makes no sense.

    The plan is the same at every step today; callers ask per step so that a schedule needs no other change.
    """
    if step < 0:
        raise ValueError(f"step={step} is negative")
    kinds = list(itertools.islice(itertools.cycle(_parse(attention.pattern)), num_layers))
    first, last = attention.dense_first_layers, attention.dense_last_layers
    if isinstance(last, str):
        raise ConfigError("attention.dense_last_layers", last, "a number: what it stands for is measured at the start")
    for key, count in (("dense_first_layers", first), ("dense_last_layers", last)):
        if not 0 <= count <= num_layers:
            raise ConfigError(f"attention.{key}", count, f"choose 0 to model.num_layers={num_layers}")
    dense = {*range(first), *range(num_layers - last, num_layers)}
    kinds = [LayerKind.FULL if layer in dense else kind for layer, kind in enumerate(kinds)]
    return tuple(LayerAttention(kind, attention.block_size, attention.top_k) for kind in kinds)


def describe(plan: tuple[LayerAttention, ...]) -> str:
    """The plan in one line, equal neighbours counted: 'moba*3(64,4), full*1' with (block_size, top_k)."""
    runs = ((layer, len(list(group))) for layer, group in itertools.groupby(plan))
    return ", ".join(
        f"{layer.kind}*{count}" + (f"({layer.block_size},{layer.top_k})" if layer.kind is LayerKind.MOBA else "")
        for layer, count in runs
    )


def _parse(pattern: str) -> list[LayerKind]:
    kinds: list[LayerKind] = []
    for item in pattern.split(","):
        match = re.fullmatch(r"\s*(moba|full)\s*(?:\*\s*(\d+))?\s*", item)
        count = int(match[2] or 1) if match else 0
        if match is None or count == 0:
            raise ConfigError(
                "attention.pattern", pattern, 'write kinds with counts, repeated over the layers: "moba", "moba*3,full"'
            )
        kinds += [LayerKind(match[1])] * count
    return kinds
