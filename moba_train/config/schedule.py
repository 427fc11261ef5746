"""`attention.schedule` in steps: the one place that turns tokens and fractions of training into steps.

A phase begins as soon as its point is reached: `step: s` when s steps are done, `tokens: t` (of B x S a step) when
ceil(t / (B x S)) are, `fraction: f` of N steps when ceil(f x N) are, at the latest with the last one. Everything
downstream sees steps alone.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

from moba_train.config.schema import AttentionConfig, AttentionPhase, ConfigError, RunConfig

__all__ = ["PLAN_KEYS", "attention_of_phase", "resolve_schedule"]

_UNITS = ("step", "tokens", "fraction")
# What a layer plan is made of; a phase may set each of them.
PLAN_KEYS = tuple(field.name for field in dataclasses.fields(AttentionPhase) if field.name not in _UNITS)


def resolve_schedule(config: RunConfig) -> RunConfig:
    """`config` with every phase of attention.schedule beginning at a step, in increasing order within training.

    ConfigError for a phase without beginning or with several, outside training, or not after the one before it.
    """
    phases: list[AttentionPhase] = []
    for index, phase in enumerate(config.attention.schedule):
        unit, step = _beginning(config, index)
        key, value = f"attention.schedule[{index}].{unit}", getattr(phase, unit)
        if step >= config.train.steps:
            raise ConfigError(
                key, value, f"begins after all of train.steps={config.train.steps}; begin earlier or leave it out"
            )
        if phases and step <= (before := phases[-1].step or 0):
            raise ConfigError(
                key, value, f"begins at step {step}, the phase before it at {before}: each must begin later"
            )
        phases.append(dataclasses.replace(phase, step=step, tokens=None, fraction=None))
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, schedule=tuple(phases)))


def attention_of_phase(attention: AttentionConfig, phase: AttentionPhase) -> AttentionConfig:
    """What holds during `phase`: its own keys over those of `attention`, without a schedule."""
    own = {key: value for key in PLAN_KEYS if (value := getattr(phase, key)) is not None}
    return dataclasses.replace(attention, schedule=(), **own)


def _beginning(config: RunConfig, index: int) -> tuple[str, int]:
    """(unit, step) of a phase."""
    phase, key = config.attention.schedule[index], f"attention.schedule[{index}]"
    given = {unit: value for unit in _UNITS if (value := getattr(phase, unit)) is not None}
    if len(given) != 1:
        found = ", ".join(f"{unit}={value}" for unit, value in given.items()) or "none of them"
        raise ConfigError(key, found, "a phase begins at one of step, tokens or fraction")
    (unit, value), *_ = given.items()
    if value < 0:
        raise ConfigError(f"{key}.{unit}", value, "must be at least 0")
    if unit == "fraction":
        if not value < 1:
            raise ConfigError(f"{key}.{unit}", value, "must be less than 1, the end of training")
        # Exactly what was written: 0.3 x 10 is 3 steps, though not in floating point.
        return unit, min(math.ceil(Fraction(str(value)) * config.train.steps), config.train.steps - 1)
    if unit == "tokens":
        return unit, -(-int(value) // max(1, config.train.global_batch_size * config.train.sequence_length))
    return unit, int(value)
