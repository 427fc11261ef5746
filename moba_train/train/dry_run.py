"""`dry_run=true`: what a run would be, printed without building any of it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from moba_train.config.schema import RunConfig, to_dict
from moba_train.config.stages import Stage, stages_of
from moba_train.config.validate import data_parallel_size, padded_length
from moba_train.model.layer_plan import LayerKind, Plan, describe, plan_phases
from moba_train.model.rope import describe_rope
from moba_train.train.estimate import memory_gib, parameter_count
from moba_train.train.flops import matmul_flops_per_token, training_flops
from moba_train.train.setup import planned
from moba_train.train.table import print_table

__all__ = ["print_plan"]


def print_plan(config: RunConfig, world_size: int) -> None:
    """Resolved recipe, layer plan, layout, parameters, FLOPs per token and estimated memory of a validated run."""
    print(json.dumps(to_dict(config), indent=2))
    for stage in stages_of(config):
        _print_stage(stage, world_size)


def _print_stage(stage: Stage, world_size: int) -> None:
    config, steps = stage.config, stage.end - stage.start
    model, parallel, train = config.model, config.parallel, config.train
    dp = data_parallel_size(config, world_size)
    length, padded = train.sequence_length, padded_length(train.sequence_length, config)
    attention = planned(config).attention
    phases = plan_phases(attention, model.num_layers)
    ends = [*(start for start, _ in phases[1:]), steps]
    costs = [training_flops(model, plan, [length], attention.key_conv) / length for _, plan in phases]
    shares = [(end - start) / steps for (start, _), end in zip(phases, ends, strict=True)]
    flops = sum(cost * share for cost, share in zip(costs, shares, strict=True))
    full = tuple(dataclasses.replace(layer, kind=LayerKind.FULL) for layer in phases[0][1])
    dense = training_flops(model, full, [length], attention.key_conv) / length
    tokens = train.global_batch_size * length

    which = f", stage {stage.name}: steps {stage.start + 1} to {stage.end}" if stage.name else ""
    print_table(
        f"{config.recipe}: {model.name} on {world_size} GPUs{which}",
        [
            *_plan_rows(phases, ends, costs, "" if attention == config.attention else ", before auto chooses"),
            ("rotary embedding", describe_rope(model, length)),
            (
                "tensor x pipeline x context x data",
                f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} x {dp}",
            ),
            ("layers per pipeline stage", model.num_layers // parallel.pipeline),
            ("tokens per row", length if padded == length else f"{length:,}, padded to {padded:,}"),
            ("tokens per GPU and row", padded // parallel.context),
            ("micro-batches per step and rank", train.global_batch_size // dp),
            ("tokens per step", tokens),
            ("tokens in all", tokens * steps),
            ("parameters", parameter_count(model, attention.key_conv)),
            ("FLOPs per token, forward and backward", f"{flops:.4g}" + (", mean over training" if ends[1:] else "")),
            ("  of these in matrix products", f"{3 * matmul_flops_per_token(model):.4g}"),
            ("  if every layer were full", f"{dense:.4g} ({dense / flops:.2f} x)"),
        ],
    )
    rows = [(name, f"{size:.2f}") for name, size in memory_gib(config, world_size).items()]
    print_table("Estimated memory per GPU, GiB", rows)


def _plan_rows(
    phases: list[tuple[int, Plan]], ends: list[int], costs: list[float], remark: str
) -> list[tuple[str, Any]]:
    """The layers, and of a schedule every phase with its steps (counted from 1, both ends included) and FLOPs."""
    rows: list[tuple[str, Any]] = []
    for (start, plan), end, cost in zip(phases, ends, costs, strict=True):
        steps = f", steps {start + 1} to {end}" if ends[1:] else ""
        full = ", ".join(str(i) for i, layer in enumerate(plan) if layer.kind is LayerKind.FULL)
        rows += [(f"layer plan{steps}", describe(plan) + remark), ("  full layers", full or "none")]
        if steps:
            rows.append(("  FLOPs per token", f"{cost:.4g}"))
    return rows
