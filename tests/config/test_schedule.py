"""Phases given in steps, tokens or fractions of training become steps, in one place and at composition."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moba_train.config.compose import compose, group_options
from moba_train.config.schedule import PLAN_KEYS, attention_of_phase, resolve_schedule
from moba_train.config.schema import (
    AttentionConfig,
    AttentionPhase,
    ConfigError,
    LayerOverride,
    RunConfig,
    TrainConfig,
    from_dict,
    to_dict,
)

TRAIN = TrainConfig(steps=10, sequence_length=16, global_batch_size=4)  # 64 tokens a step


def steps_of(*phases: AttentionPhase, train: TrainConfig = TRAIN) -> list[int | None]:
    resolved = resolve_schedule(RunConfig(attention=AttentionConfig(schedule=phases), train=train))
    assert all(phase.tokens is None and phase.fraction is None for phase in resolved.attention.schedule)
    assert resolve_schedule(resolved) == resolved
    return [phase.step for phase in resolved.attention.schedule]


@pytest.mark.parametrize(
    "phase, step",
    [
        (AttentionPhase(step=0), 0),
        (AttentionPhase(step=9), 9),
        (AttentionPhase(tokens=0), 0),
        (AttentionPhase(tokens=1), 1),
        (AttentionPhase(tokens=64), 1),
        (AttentionPhase(tokens=65), 2),
        (AttentionPhase(fraction=0.0), 0),
        (AttentionPhase(fraction=0.3), 3),  # 0.3 * 10 in floating point rounds up to 4 steps
        (AttentionPhase(fraction=0.31), 4),
        (AttentionPhase(fraction=0.9), 9),
        (AttentionPhase(fraction=0.999), 9),  # the last step at the latest
    ],
)
def test_a_phase_begins_as_soon_as_its_point_is_reached(phase, step):
    assert steps_of(phase) == [step]


def test_units_may_differ_between_phases_that_increase():
    assert steps_of(AttentionPhase(step=1), AttentionPhase(tokens=300), AttentionPhase(fraction=0.7)) == [1, 5, 7]


@given(fraction=st.floats(0, 1, exclude_max=True), steps=st.integers(1, 10**6))
def test_a_fraction_is_never_outside_training_nor_a_step_off(fraction, steps):
    (step,) = steps_of(AttentionPhase(fraction=fraction), train=TrainConfig(steps=steps))
    assert step is not None
    assert 0 <= step < steps
    assert fraction * steps - 1 - 1e-6 <= step <= fraction * steps + 1 + 1e-6


@pytest.mark.parametrize(
    "phases, key, remedy",
    [
        ([{}], "attention.schedule[0]", "one of step, tokens or fraction"),
        ([{"step": 1, "fraction": 0.5}], "attention.schedule[0]", "one of step, tokens or fraction"),
        ([{"step": -1}], "attention.schedule[0].step", "at least 0"),
        ([{"fraction": 1.0}], "attention.schedule[0].fraction", "less than 1"),
        ([{"fraction": float("nan")}], "attention.schedule[0].fraction", "less than 1"),
        ([{"step": 10}], "attention.schedule[0].step", "train.steps=10"),
        ([{"tokens": 577}], "attention.schedule[0].tokens", "train.steps=10"),
        ([{"step": 5}, {"step": 5}], "attention.schedule[1].step", "begin later"),
        ([{"fraction": 0.5}, {"step": 2}], "attention.schedule[1].step", "begin later"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(phases, key, remedy):
    with pytest.raises(ConfigError) as caught:
        steps_of(*(AttentionPhase(**phase) for phase in phases))
    assert caught.value.key == key
    assert remedy in caught.value.remedy


def test_a_phase_can_set_every_key_of_a_plan_and_keeps_the_others():
    assert set(PLAN_KEYS) < set(AttentionConfig.__dataclass_fields__)
    attention = AttentionConfig(pattern="moba", top_k=3, full_layers=(1,), backend="portable")
    phase = AttentionPhase(step=2, top_k=5, full_layers=(), overrides=(LayerOverride((0,), top_k=2),))
    assert attention_of_phase(attention, phase) == AttentionConfig(
        pattern="moba", top_k=5, full_layers=(), backend="portable", overrides=(LayerOverride((0,), top_k=2),)
    )


class TestCommandLine:
    def test_lists_of_layers_overrides_and_phases(self):
        attention = compose(
            [
                "attention.full_layers=[0,3]",
                "attention.overrides=[{layers: [1,2], block_size: 32}]",
                "attention.schedule=[{tokens:81920,top_k:2},{fraction:0.5,pattern:'moba*3,full',overrides:[]}]",
            ]
        ).attention
        assert attention.full_layers == (0, 3)
        assert attention.overrides == (LayerOverride((1, 2), block_size=32),)
        assert attention.schedule == (
            AttentionPhase(step=20, top_k=2),
            AttentionPhase(step=120, pattern="moba*3,full", overrides=()),
        )

    def test_tokens_may_be_written_with_an_exponent(self):
        assert compose(["attention.schedule=[{tokens: 1e5, pattern: full}]"]).attention.schedule[0].step == 25

    def test_a_composed_schedule_survives_its_own_dictionary(self):
        config = compose(["attention=growing_top_k", "attention.overrides=[{layers:[0],top_k:2}]"])
        assert from_dict(to_dict(config)) == config

    @pytest.mark.parametrize("recipe", ["tiny", "128k"])
    @pytest.mark.parametrize(
        "name, steps", [("moba_then_full", [90]), ("dense_warmup", [0, 10]), ("growing_top_k", [0, 25, 50])]
    )
    def test_the_named_schedules(self, recipe, name, steps):
        config = compose([f"recipe={recipe}", f"attention={name}", "train.steps=100"])
        assert [phase.step for phase in config.attention.schedule] == steps
        moba = compose([f"recipe={recipe}", "attention=moba"]).attention
        assert dataclasses.replace(config.attention, schedule=()) == moba
        assert name in group_options("attention")

    @pytest.mark.parametrize(
        "override, key, remedy",
        [
            ("attention.full_layers=3", "attention.full_layers", "list"),
            ("attention.full_layers=[a]", "attention.full_layers[0]", "int"),
            ("attention.overrides=[{layers:[0],topk:2}]", "attention.overrides[0].topk", "top_k"),
            ("attention.overrides=[3]", "attention.overrides[0]", "group of keys"),
            ("attention.schedule=[{fraction:0.5,patern:full}]", "attention.schedule[0].patern", "pattern"),
            ("attention.schedule=[{tokens:1.5}]", "attention.schedule[0].tokens", "int"),
        ],
    )
    def test_a_mistake_in_a_list_is_named_with_its_place(self, override, key, remedy):
        with pytest.raises(ConfigError) as caught:
            compose([override])
        assert caught.value.key == key
        assert remedy in caught.value.remedy
