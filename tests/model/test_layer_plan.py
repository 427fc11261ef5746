"""The one place that decides full or MoBA."""

import pytest

from moba_train.config.schema import AttentionConfig, AttentionPhase, ConfigError, LayerOverride
from moba_train.model.layer_plan import LayerKind, describe, layer_plan, plan_phases


def kinds(num_layers: int, step: int = 0, **attention) -> str:
    """The plan as one letter a layer: m or f."""
    return "".join(layer.kind[0] for layer in layer_plan(AttentionConfig(**attention), num_layers, step))


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("moba", "mmmmmm"),
        ("full", "ffffff"),
        ("moba*3,full", "mmmfmm"),
        ("full,moba", "fmfmfm"),
        (" moba * 2 , full * 2 ", "mmffmm"),
        ("moba*9", "mmmmmm"),
    ],
)
def test_the_pattern_repeats_over_the_layers(pattern, expected):
    assert kinds(6, pattern=pattern) == expected


def test_dense_ends_win_over_the_pattern():
    assert kinds(6, pattern="moba", dense_first_layers=1, dense_last_layers=2) == "fmmmff"
    assert kinds(3, pattern="moba", dense_last_layers=3) == "fff"
    assert kinds(3, pattern="moba", dense_first_layers=3, dense_last_layers=3) == "fff"


def test_gate_options_reach_every_layer_and_the_description():
    forced = {"force_first_block": True, "force_previous_block": True}
    routing = {"block_size": 64, "top_k": 4, **forced, "share_picks_in_group": True}
    plan = layer_plan(AttentionConfig(pattern="moba,full", share_picks_in_group=True, **forced), 2)
    assert [layer.routing for layer in plan] == [routing, routing]
    assert describe(plan) == "moba*1(64,4,first,previous,shared), full*1"


def test_a_forced_previous_block_needs_two_picks():
    with pytest.raises(ConfigError) as caught:
        layer_plan(AttentionConfig(pattern="full,moba", top_k=1, force_previous_block=True), 2)
    assert caught.value.key == "attention.top_k"
    layer_plan(AttentionConfig(pattern="full", top_k=1, force_previous_block=True), 2)


def test_every_forced_block_needs_a_pick():
    with pytest.raises(ConfigError) as caught:
        layer_plan(AttentionConfig(top_k=2, force_first_block=True, force_previous_block=True), 2)
    assert (caught.value.key, caught.value.value) == ("attention.top_k", 2)
    layer_plan(AttentionConfig(top_k=2, force_first_block=True), 2)


def test_layers_carry_their_block_size_and_top_k():
    plan = layer_plan(AttentionConfig(pattern="moba,full", block_size=32, top_k=5), 2)
    assert [(layer.kind, layer.block_size, layer.top_k) for layer in plan] == [
        (LayerKind.MOBA, 32, 5),
        (LayerKind.FULL, 32, 5),
    ]


@pytest.mark.parametrize("pattern", ["", "dense", "moba*", "moba*0", "moba**2", "moba,,full", "moba full", "moba*-1"])
def test_a_pattern_that_is_no_pattern_is_refused_with_the_grammar(pattern):
    with pytest.raises(ConfigError, match="moba\\*3,full"):
        layer_plan(AttentionConfig(pattern=pattern), 4)


@pytest.mark.parametrize("key", ["dense_first_layers", "dense_last_layers"])
@pytest.mark.parametrize("count", [-1, 5])
def test_dense_counts_beyond_the_model_are_refused(key, count):
    with pytest.raises(ConfigError) as caught:
        layer_plan(AttentionConfig(**{key: count}), 4)
    assert caught.value.key == f"attention.{key}"


def test_auto_is_no_number_of_layers():
    with pytest.raises(ConfigError, match="measured at the start"):
        layer_plan(AttentionConfig(dense_last_layers="auto"), 4)


def test_describe_counts_neighbours():
    assert describe(layer_plan(AttentionConfig(pattern="moba*3,full", block_size=64, top_k=4), 5)) == (
        "moba*3(64,4), full*1, moba*1(64,4)"
    )


def test_full_layers_join_the_pattern_and_the_dense_ends():
    assert kinds(6, pattern="moba", full_layers=(0, 3), dense_last_layers=1) == "fmmfmf"
    assert kinds(4, pattern="full", full_layers=(0,)) == "ffff"


def test_overrides_give_layers_their_own_numbers():
    overrides = (LayerOverride((0, 2), block_size=32), LayerOverride((1,), block_size=16, top_k=9))
    plan = layer_plan(AttentionConfig(block_size=64, top_k=4, overrides=overrides), 4)
    assert [(layer.block_size, layer.top_k) for layer in plan] == [(32, 4), (16, 9), (32, 4), (64, 4)]
    assert describe(plan) == "moba*1(32,4), moba*1(16,9), moba*1(32,4), moba*1(64,4)"


def test_full_layers_are_counted_together_whatever_numbers_they_carry():
    plan = layer_plan(AttentionConfig(pattern="full", overrides=(LayerOverride((1,), top_k=2),)), 3)
    assert describe(plan) == "full*3"


@pytest.mark.parametrize(
    "attention, key, remedy",
    [
        ({"full_layers": (4,)}, "attention.full_layers", "0 to 3"),
        ({"full_layers": (-1,)}, "attention.full_layers", "from the end it is 3"),
        ({"full_layers": (1, 1)}, "attention.full_layers", "twice"),
        ({"overrides": (LayerOverride((4,), top_k=2),)}, "attention.overrides", "0 to 3"),
        ({"overrides": (LayerOverride((0,), top_k=2), LayerOverride((0,), block_size=8))}, "attention.overrides", "tw"),
        ({"overrides": (LayerOverride((), top_k=2),)}, "attention.overrides[0]", "name layers"),
        ({"overrides": (LayerOverride((0,)),)}, "attention.overrides[0]", "name layers"),
        ({"overrides": (LayerOverride((0,), top_k=0),)}, "attention.overrides[0].top_k", "at least 1"),
        ({"overrides": (LayerOverride((0,), block_size=-2),)}, "attention.overrides[0].block_size", "at least 1"),
        ({"pattern": "full", "overrides": (LayerOverride((0,), top_k=2),)}, "attention.overrides[0].layers", "never"),
        ({"full_layers": (2,), "overrides": (LayerOverride((2,), top_k=2),)}, "attention.overrides[0].layers", "never"),
        ({"schedule": (AttentionPhase(step=1, pattern="dens"),)}, "attention.schedule[0].pattern", "moba*3,full"),
        ({"schedule": (AttentionPhase(step=1, top_k=0),)}, "attention.schedule[0].top_k", "at least 1"),
        ({"schedule": (AttentionPhase(step=1, full_layers=(9,)),)}, "attention.schedule[0].full_layers", "0 to 3"),
        ({"schedule": (AttentionPhase(step=1, dense_last_layers=5),)}, "attention.schedule[0].dense_last_layers", "4"),
        ({"pattern": "x", "schedule": (AttentionPhase(step=0, pattern="full"),)}, "attention.pattern", "moba*3,full"),
        (
            {"schedule": (AttentionPhase(step=1, pattern="full", overrides=(LayerOverride((0,), top_k=2),)),)},
            "attention.schedule[0].overrides[0].layers",
            "never",
        ),
        (
            {"overrides": (LayerOverride((0,), top_k=2),), "schedule": (AttentionPhase(step=0, overrides=()),)},
            "attention.overrides[0].layers",
            "never",
        ),
    ],
)
def test_layers_overrides_and_phases_that_make_no_sense_are_refused_before_training(attention, key, remedy):
    with pytest.raises(ConfigError) as caught:
        plan_phases(AttentionConfig(**attention), 4)
    assert caught.value.key == key
    assert remedy in caught.value.remedy


SCHEDULE = (AttentionPhase(step=2, pattern="full"), AttentionPhase(step=5, top_k=7, full_layers=(0,)))


def test_each_phase_begins_at_its_step_and_inherits_from_attention_not_from_the_phase_before():
    attention = {"pattern": "moba,full", "schedule": SCHEDULE}
    assert [kinds(4, step, **attention) for step in (0, 1, 2, 4, 5, 10**9)] == ["mfmf"] * 2 + ["ffff"] * 2 + [
        "ffmf"
    ] * 2
    assert layer_plan(AttentionConfig(schedule=SCHEDULE, top_k=3), 2, 1)[1].top_k == 3
    assert layer_plan(AttentionConfig(schedule=SCHEDULE, top_k=3), 2, 5)[1].top_k == 7


def test_the_phases_are_the_plans_at_their_first_steps():
    attention = AttentionConfig(schedule=SCHEDULE)
    assert plan_phases(attention, 3) == [(step, layer_plan(attention, 3, step)) for step in (0, 2, 5)]
    assert plan_phases(AttentionConfig(), 3) == [(0, layer_plan(AttentionConfig(), 3))]
    from_the_start = AttentionConfig(schedule=(AttentionPhase(step=0, pattern="full"), *SCHEDULE[1:]))
    assert [step for step, _ in plan_phases(from_the_start, 3)] == [0, 5]


def test_an_override_that_one_phase_heeds_may_be_idle_in_another():
    attention = AttentionConfig(overrides=(LayerOverride((0,), top_k=2),), schedule=SCHEDULE[:1])
    assert [plan[0].top_k for _, plan in plan_phases(attention, 2)] == [2, 2]
