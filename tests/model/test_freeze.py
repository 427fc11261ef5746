"""Patterns of names that do not train: those that make no sense are refused before a model exists."""

from __future__ import annotations

import dataclasses

import pytest

from moba_train.config.schema import ConfigError, ModelConfig, RunConfig, TrainConfig
from moba_train.model.freeze import check_freeze, expected_names


def _config(*patterns: str, **model: object) -> RunConfig:
    return RunConfig(model=dataclasses.replace(ModelConfig(), **model), train=TrainConfig(freeze=patterns))


def test_transformer_engine_keeps_a_norm_with_the_matrix_after_it() -> None:
    names = expected_names(_config(transformer_impl="transformer_engine"))
    assert "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight" in names
    assert len(names) == len(expected_names(_config()))


@pytest.mark.parametrize(
    "patterns, said",
    [
        (("embedding.*", "decoder.layers.4.*"), "'decoder.layers.4.*' matches no parameter; they have names such as"),
        (("*.layer_norm_weight",), "matches no parameter"),
        (("*",), "nothing would train"),
        (("embedding.*", "decoder.*"), "nothing would train"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(patterns: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.freeze=") as refused:
        check_freeze(_config(*patterns))
    assert said in str(refused.value)


def test_patterns_that_make_sense_pass() -> None:
    check_freeze(_config())
    check_freeze(_config("embedding.*", "decoder.layers.[0-2].*"))
    check_freeze(_config("embedding.*", "decoder.*", tie_embeddings=False))
