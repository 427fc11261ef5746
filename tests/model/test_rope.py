"""Rotary embedding: against transformers' frequencies, and by its defining property."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from moba_train.config.compose import compose
from moba_train.config.schema import ModelConfig, RopeScaling
from moba_train.model.rope import inverse_frequencies, rotary_table, rotate
from tests.helpers.tolerance import assert_close


@pytest.mark.parametrize("name", ["tiny", "llama3.2-1b", "llama3.1-8b", "qwen3-8b"])
def test_frequencies_equal_transformers(name):
    model = compose([f"model={name}"]).model
    scaling = model.rope_scaling
    parameters = {"rope_type": scaling.rope_type, "rope_theta": model.rope_base}
    if scaling.rope_type == "llama3":
        fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        parameters |= {field: getattr(scaling, field) for field in fields}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=model.num_attention_heads * model.head_dim,
            num_attention_heads=model.num_attention_heads,
            head_dim=model.head_dim,
            max_position_embeddings=131072,
            rope_parameters=parameters,
        )
    )
    assert_close(inverse_frequencies(model).float(), theirs.inv_freq, torch.float32)


def test_linear_scaling_is_position_interpolation():
    plain, scaled = ModelConfig(), ModelConfig(rope_scaling=RopeScaling("linear", factor=4.0))
    positions = torch.arange(64)
    far = rotary_table(4 * positions, inverse_frequencies(scaled))
    near = rotary_table(positions, inverse_frequencies(plain))
    assert_close(far[0], near[0], torch.float32)
    assert_close(far[1], near[1], torch.float32)


def test_scores_depend_on_the_distance_alone_even_far_out():
    frequencies = inverse_frequencies(ModelConfig(head_dim=32))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 32, generator=generator, dtype=torch.float64)

    def score(q_at: int, k_at: int) -> torch.Tensor:
        turned = [rotate(x, *rotary_table(torch.tensor([at]), frequencies)) for x, at in ((q, q_at), (k, k_at))]
        return (turned[0] * turned[1]).sum()

    assert_close(score(1_000_100, 1_000_000).float(), score(100, 0).float(), torch.float32)


def test_gradient_of_the_rotation():
    table = rotary_table(torch.tensor([0, 3, 7]), inverse_frequencies(ModelConfig(head_dim=8)))
    x = torch.randn(3, 2, 8, requires_grad=True)
    weight = torch.randn(3, 2, 8)
    (rotate(x, *table) * weight).sum().backward()
    cos, sin = table
    back = rotate(weight, cos, -sin)  # a rotation's transpose is its inverse
    assert x.grad is not None
    assert_close(x.grad, back, torch.float32)
