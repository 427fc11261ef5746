"""Rotary embedding: against transformers' own functions for every scaling kind, and by its defining property."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from moba_train.config.compose import compose
from moba_train.config.huggingface import ROPE_FIELDS, check_rope, parse_config, rope_parameters
from moba_train.config.schema import ConfigError, ModelConfig, RopeScaling
from moba_train.model.rope import describe_rope, fixed_scaling, inverse_frequencies, rotary_table, rotate
from tests.helpers.tolerance import assert_close

PAIRS = 16
SHORT, LONG = (tuple(1.0 + slope * i for i in range(PAIRS)) for slope in (0.1, 0.9))
# Every kind with every field that changes it; 4096 is the model's length, 512 that of its first training.
SCALINGS = {
    "default": RopeScaling(),
    "linear": RopeScaling("linear", factor=4.0),
    "dynamic": RopeScaling("dynamic", factor=2.0),
    "dynamic, factor one": RopeScaling("dynamic", factor=1.0),
    "llama3": RopeScaling("llama3", 8.0, 512, low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": RopeScaling("yarn", 4.0, 512),
    "yarn, no factor": RopeScaling("yarn", None, 512),
    "yarn, attention factor": RopeScaling("yarn", 4.0, 512, attention_factor=1.3),
    "yarn, betas": RopeScaling("yarn", 16.0, 512, beta_fast=16.0, beta_slow=2.0),
    "yarn, one pair": RopeScaling("yarn", 16.0, 512, beta_fast=4.0, beta_slow=4.0, truncate=False),
    "yarn, mscale": RopeScaling("yarn", 40.0, 512, mscale=0.707, mscale_all_dim=1.0),
    "yarn, not truncated": RopeScaling("yarn", 8.0, 512, truncate=False),
    "longrope": RopeScaling("longrope", 8.0, 512, short_factor=SHORT, long_factor=LONG),
    "longrope, no factor": RopeScaling("longrope", None, 512, short_factor=SHORT, long_factor=LONG),
    "longrope, attention factor": RopeScaling(
        "longrope", 8.0, 512, short_factor=SHORT, long_factor=LONG, attention_factor=1.2
    ),
}


def small(scaling: RopeScaling) -> ModelConfig:
    return ModelConfig(head_dim=2 * PAIRS, rope_base=50000.0, rope_scaling=scaling, max_position_embeddings=4096)


def theirs(model: ModelConfig) -> LlamaConfig:
    """The same model in transformers' words, written by hand rather than by our exporter."""
    set_fields = {name: value for name, value in dataclasses.asdict(model.rope_scaling).items() if value is not None}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in set_fields.items()}
    return LlamaConfig(
        hidden_size=model.num_attention_heads * model.head_dim,
        num_attention_heads=model.num_attention_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters={"factor": None, **fields, "rope_theta": model.rope_base},
    )


@pytest.mark.parametrize("length", [256, 4096, 20000])
@pytest.mark.parametrize("name", SCALINGS)
def test_every_kind_equals_transformers(name, length):
    model = small(SCALINGS[name])
    config = theirs(model)
    kind = model.rope_scaling.rope_type
    if kind == "default":
        expected, factor = LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    found = inverse_frequencies(model, length)
    assert_close(found.angles.float(), expected, torch.float32)
    assert found.attention_factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_the_table_equals_transformers_cos_and_sin(name):
    """The attention temperature included: it multiplies cos and sin. Near the start, where their fp32 angles are exact
    enough."""
    model, positions = small(SCALINGS[name]), torch.arange(64)
    rotary = LlamaRotaryEmbedding(theirs(model))
    cos, sin = rotary(torch.zeros(1), positions[None])
    ours = rotary_table(positions, inverse_frequencies(model, 64))
    for found, expected in zip(ours, (cos, sin), strict=True):
        assert_close(found[:, 0], expected[0, :, :PAIRS], torch.float32)


@pytest.mark.parametrize("name", ["llama3.2-1b", "llama3.1-8b", "qwen3-8b"])
def test_frequencies_of_the_recipes_models_equal_transformers(name):
    model = compose([f"model={name}"]).model
    expected = LlamaRotaryEmbedding(theirs(model)).inv_freq
    assert_close(inverse_frequencies(model).angles.float(), expected, torch.float32)


def test_dynamic_scaling_at_a_length_is_a_larger_base():
    model = small(SCALINGS["dynamic"])
    fixed = fixed_scaling(model, 16384)
    assert fixed.rope_scaling == RopeScaling()
    assert fixed.rope_base == pytest.approx(50000 * (2 * 16384 / 4096 - 1) ** (32 / 30))
    assert torch.equal(inverse_frequencies(fixed).angles, inverse_frequencies(model, 16384).angles)
    assert fixed_scaling(small(SCALINGS["yarn"]), 16384) == small(SCALINGS["yarn"])
    for kind in ("dynamic", "longrope"):
        with pytest.raises(ValueError, match="give one"):
            inverse_frequencies(small(SCALINGS[kind]))


def test_base_and_scale_are_described():
    assert describe_rope(small(RopeScaling()), 100) == "default, base 50000"
    text = describe_rope(small(SCALINGS["yarn"]), 4096)
    assert text == (
        "yarn, base 50000, frequencies divided by 1 (fastest) to 4 (slowest), "
        f"attention factor {0.1 * math.log(4) + 1:.6g}"
    )
    assert f"base {50000 * (2 * 4 - 1) ** (32 / 30):.10g}" in describe_rope(small(SCALINGS["dynamic"]), 16384)


@pytest.mark.parametrize("name", SCALINGS)
def test_both_spellings_of_config_json_are_read_back(name):
    model = small(SCALINGS[name])
    new = json.loads(json.dumps(rope_parameters(model.rope_base, model.rope_scaling)))
    old = {key: value for key, value in new.items() if key != "rope_theta"}
    old["type"] = old.pop("rope_type")
    shape = {
        **{"model_type": "llama", "vocab_size": 8, "hidden_size": 128, "intermediate_size": 8, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "max_position_embeddings": 4096},
    }
    for spelling in ({"rope_parameters": new}, {"rope_scaling": old, "rope_theta": model.rope_base}):
        found = parse_config({**shape, **spelling}, "m", "SRC")
        assert (found.rope_base, found.rope_scaling) == (model.rope_base, model.rope_scaling)
        check_rope(found)


@pytest.mark.parametrize(
    "scaling, key, remedy",
    [
        (RopeScaling("ntk"), "rope_type", "longrope"),
        (RopeScaling("linear"), "factor", "needs it"),
        (RopeScaling("linear", 0.5), "factor", "at least 1"),
        (RopeScaling("linear", 2.0, low_freq_factor=1.0), "low_freq_factor", "set it to null"),
        (RopeScaling("default", 2.0), "factor", "set it to null"),
        (RopeScaling("llama3", 8.0, 512, low_freq_factor=4.0, high_freq_factor=4.0), "high_freq_factor", "exceed"),
        (RopeScaling("llama3", 8.0, 512, high_freq_factor=4.0), "low_freq_factor", "needs it"),
        (RopeScaling("yarn", 4.0), "original_max_position_embeddings", "needs it"),
        (RopeScaling("yarn", 4.0, 512, beta_fast=1.0, beta_slow=2.0), "beta_fast", "beta_slow"),
        (RopeScaling("yarn", 4.0, 512, attention_factor=1.1, mscale=1.0), "mscale", "overrides"),
        (RopeScaling("yarn", 4.0, -1), "original_max_position_embeddings", "positive"),
        (
            RopeScaling("longrope", 4.0, 512, short_factor=(1.0,), long_factor=LONG),
            "short_factor",
            "16 dimension pairs",
        ),
    ],
)
def test_scalings_that_make_no_sense_are_refused(scaling, key, remedy):
    with pytest.raises(ConfigError) as caught:
        check_rope(small(scaling))
    assert caught.value.key == f"model.rope_scaling.{key}"
    assert remedy in caught.value.remedy


def test_kinds_computed_from_the_models_length_need_it():
    for name in ("dynamic", "yarn, no factor", "longrope, no factor"):
        with pytest.raises(ConfigError) as caught:
            check_rope(dataclasses.replace(small(SCALINGS[name]), max_position_embeddings=None))
        assert caught.value.key == "model.max_position_embeddings"
    assert {scaling.rope_type for scaling in SCALINGS.values()} == set(ROPE_FIELDS)


def test_scores_depend_on_the_distance_alone_even_far_out():
    frequencies = inverse_frequencies(ModelConfig(head_dim=32))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 32, generator=generator, dtype=torch.float64)

    def score(q_at: int, k_at: int) -> torch.Tensor:
        turned = [rotate(x, *rotary_table(torch.tensor([at]), frequencies)) for x, at in ((q, q_at), (k, k_at))]
        return (turned[0] * turned[1]).sum()

    assert_close(score(1_000_100, 1_000_000).float(), score(100, 0).float(), torch.float32)


@pytest.mark.parametrize("name", ["default", "yarn"])
def test_gradient_of_the_rotation(name):
    table = rotary_table(torch.tensor([0, 3, 7]), inverse_frequencies(small(SCALINGS[name])))
    x = torch.randn(3, 2, 2 * PAIRS, requires_grad=True)
    weight = torch.randn(3, 2, 2 * PAIRS)
    (rotate(x, *table) * weight).sum().backward()
    cos, sin = table
    back = rotate(weight, cos, -sin)  # the transpose of a rotation, scaled or not, turns back
    assert x.grad is not None
    assert_close(x.grad, back, torch.float32)
