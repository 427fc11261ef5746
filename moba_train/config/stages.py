"""Length activation: `stages`, parts of one run that differ in sequence length, RoPE scaling, layout and layer plan.

Stages follow one another in the order they are written; steps count through all of them, under one learning-rate
schedule. Every stage takes the same number of tokens a step, train.sequence_length x train.global_batch_size of the
run: its rows per step follow from its length. Values of a stage lie on top of the run's, key by key
(model.rope_scaling, data.blend and data.length_buckets as a whole). Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moba_train.config.schema import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    from_dict,
    unknown_key,
)
from moba_train.config.validate import padded_vocab_size

__all__ = ["Stage", "stages_of"]

_SECTIONS: dict[str, tuple[type, tuple[str, ...]]] = {
    "model": (ModelConfig, ("rope_base", "rope_scaling", "max_position_embeddings")),
    "attention": (
        AttentionConfig,
        tuple(
            field.name
            for field in dataclasses.fields(AttentionConfig)
            if field.name not in ("schedule", "key_conv", "dense_target")
        ),
    ),
    "parallel": (
        ParallelConfig,
        tuple(
            field.name
            for field in dataclasses.fields(ParallelConfig)
            if field.name not in ("distributed_optimizer", "timeout_s")
        ),
    ),
    "data": (DataConfig, ("path", "blend", "length_buckets")),
}


@dataclass(frozen=True)
class Stage:
    """Steps `start` to `end` of a run, and the configuration that holds in them; train.steps is that of the run.

    name: "" for a run without stages, which is one stage. before: the steps that earlier stages ended with.
    """

    config: RunConfig
    name: str = ""
    start: int = 0
    end: int = 0
    before: tuple[int, ...] = ()

    def after_another(self, folder: str) -> Stage:
        """The same, going on from the stage that was just trained, in the run folder chosen when the run began."""
        run = dataclasses.replace(self.config.run, dir=folder)
        checkpoint = dataclasses.replace(self.config.checkpoint, resume=True)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, run=run, checkpoint=checkpoint))


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run in order; without `stages` the run itself. ConfigError for what makes no sense together."""
    if not config.stages:
        return (Stage(config, end=config.train.steps),)
    _check_run(config)
    stages: list[Stage] = []
    for name, each in config.stages.items():
        start, longest = (stages[-1].end, stages[-1].config.train.sequence_length) if stages else (0, 1)
        key = f"stages.{name}"
        if each.steps < 1:
            raise ConfigError(f"{key}.steps", each.steps, "must be at least 1")
        if each.sequence_length < longest:
            remedy = f"must be at least {longest}: a stage is never shorter than the one before it"
            raise ConfigError(f"{key}.sequence_length", each.sequence_length, remedy)
        before = tuple(stage.end for stage in stages)
        stages.append(Stage(_config_of(config, name, each, len(stages)), name, start, start + each.steps, before))
        _check_padding(stages)
    if (total := stages[-1].end) != config.train.steps:
        remedy = f"the stages have {total} steps together: set it to {total}, or change stages.NAME.steps"
        raise ConfigError("train.steps", config.train.steps, remedy)
    return tuple(stages)


def _check_run(config: RunConfig) -> None:
    """What a run with stages cannot have beside them."""
    if config.sft.path is not None:
        raise ConfigError("sft.path", config.sft.path, "stages are for plain text: fine-tune in a run of its own")
    if config.attention.schedule:
        what = "every stage has attention.* of its own: write two stages of one length instead"
        raise ConfigError("attention.schedule", len(config.attention.schedule), what)


def _check_padding(stages: list[Stage]) -> None:
    """Optimizer state is stored with the padding of the vocabulary, which depends on parallel.tensor."""
    (was, now), name = (
        [
            padded_vocab_size(each.config.model.vocab_size, each.config.parallel.tensor)
            for each in (stages[0], stages[-1])
        ],
        stages[-1].name,
    )
    if was != now:
        remedy = (
            f"pads the vocabulary to {now}, and stage {stages[0].name} to {was}: optimizer state could not be carried"
        )
        raise ConfigError(f"stages.{name}.parallel.tensor", stages[-1].config.parallel.tensor, remedy)


def _config_of(config: RunConfig, name: str, each: StageConfig, index: int) -> RunConfig:
    key = f"stages.{name}"
    step_tokens = config.train.sequence_length * config.train.global_batch_size
    rows, rest = divmod(step_tokens, each.sequence_length)
    if rest:
        remedy = (
            f"must divide the tokens of a step, train.sequence_length x train.global_batch_size = {step_tokens}, "
            f"which all stages keep; rows of {math.gcd(step_tokens, each.sequence_length)} would"
        )
        raise ConfigError(f"{key}.sequence_length", each.sequence_length, remedy)
    changed: dict[str, Any] = {
        section: _changed(getattr(config, section), getattr(each, section), section, key) for section in _SECTIONS
    }
    if changed["attention"].dense_last_layers == "auto":
        where = f"{key}.attention" if "dense_last_layers" in each.attention else "attention"
        raise ConfigError(f"{where}.dense_last_layers", "auto", "stages take a number")
    # Rows of one length are dealt in one order: stages of the same length would see the same rows again.
    changed["data"] = dataclasses.replace(changed["data"], seed=config.data.seed + index)
    train = dataclasses.replace(config.train, sequence_length=each.sequence_length, global_batch_size=rows)
    return dataclasses.replace(config, train=train, stages=None, **changed)


def _changed(ours: Any, changes: Mapping[str, Any], section: str, key: str) -> Any:
    """A section of the run's configuration with a stage's values on top, typed and checked."""
    cls, names = _SECTIONS[section]
    for name, value in changes.items():
        if name not in {field.name for field in dataclasses.fields(cls)}:
            raise unknown_key(f"{key}.{section}.{name}", value, names)
        if name not in names:
            raise ConfigError(f"{key}.{section}.{name}", value, "cannot differ between stages: set it for the run")
    if section == "data":  # one of the two stands for the other
        ours = dataclasses.replace(
            ours, **{other: None for other in ("path", "blend") if {"path", "blend"} & set(changes)}
        )
    values = from_dict(dict(changes), cls, f"{key}.{section}.")
    return dataclasses.replace(ours, **{name: getattr(values, name) for name in changes})
