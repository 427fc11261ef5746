"""The one place that decides full or MoBA."""

import pytest

from moba_train.config.schema import AttentionConfig, ConfigError
from moba_train.model.layer_plan import LayerKind, describe, layer_plan


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
