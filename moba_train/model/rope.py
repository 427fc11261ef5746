"""Rotary position embedding from explicit positions, with Hugging Face's scaling kinds.

megatron-core's own rotary code assumes a layout; rotating from each token's position serves any document length, any
context-parallel layout and every scaling kind without asking the device for a size. Halves convention (Llama):
dimension i turns with dimension i + D/2. Letters: T tokens, H heads, D head dim.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from moba_train.config.schema import ModelConfig, RopeScaling

__all__ = ["Frequencies", "describe_rope", "fixed_scaling", "inverse_frequencies", "rotary_table", "rotate"]


@dataclass(frozen=True, eq=False)
class Frequencies:
    """Angle per position of each dimension pair, fp64 [D/2], and the factor of cos and sin.

    With the factor on queries and keys, scores grow by its square: an attention temperature (YaRN, section 3.4).
    """

    angles: torch.Tensor
    attention_factor: float = 1.0

    def to(self, device: torch.device) -> Frequencies:
        """The same on `device`."""
        return dataclasses.replace(self, angles=self.angles.to(device))


def inverse_frequencies(model: ModelConfig, length: int | None = None) -> Frequencies:
    """The rotary frequencies of a model for inputs of up to `length` tokens (RoFormer, section 3.2.2, then scaled).

    linear: all divided by `factor` (position interpolation, arXiv 2306.15595). llama3: low ones divided, high ones
    kept, a linear blend between (Llama 3.1). yarn: the same idea, blended by dimension (arXiv 2309.00071, section
    3.2). dynamic: the base grown for `length` (NTK-aware). longrope: a given factor for each pair, one list up to
    original_max_position_embeddings tokens and one beyond (arXiv 2402.13753).

    transformers takes the length of the input at hand for the last two; here it is fixed for the run. ValueError
    when they are asked for without a length.
    """
    scaling = model.rope_scaling
    if scaling.rope_type in ("dynamic", "longrope") and length is None:
        raise ValueError(f"rope_type={scaling.rope_type} depends on the length of the input: give one")
    frequencies = effective_base(model, length) ** -_exponents(model)
    if scaling.rope_type == "linear":
        return Frequencies(frequencies / _factor(model))
    if scaling.rope_type == "llama3":
        return Frequencies(_llama3(frequencies, scaling))
    if scaling.rope_type == "yarn":
        return Frequencies(_yarn(frequencies, model), _yarn_attention_factor(model))
    if scaling.rope_type == "longrope":
        beyond = length is not None and length > (scaling.original_max_position_embeddings or 0)
        factors = scaling.long_factor if beyond else scaling.short_factor
        return Frequencies(frequencies / torch.tensor(factors, dtype=torch.float64), _longrope_attention_factor(model))
    assert scaling.rope_type in ("default", "dynamic"), scaling.rope_type
    return Frequencies(frequencies)


def effective_base(model: ModelConfig, length: int | None) -> float:
    """The base that the frequencies are powers of: NTK-aware scaling (dynamic) grows it, so that the slowest pair
    turns over `length` tokens as it did over max_position_embeddings, and the fastest as before."""
    if model.rope_scaling.rope_type != "dynamic":
        return model.rope_base
    assert length is not None
    assert model.max_position_embeddings is not None, "checked by config/huggingface.py check_rope"
    factor, made_for = _factor(model), model.max_position_embeddings
    stretch = factor * max(length, made_for) / made_for - (factor - 1)
    return model.rope_base * stretch ** (model.head_dim / (model.head_dim - 2))


def fixed_scaling(model: ModelConfig, length: int) -> ModelConfig:
    """The model with a scaling that depends on no input: dynamic at `length` is plain RoPE of another base."""
    if model.rope_scaling.rope_type != "dynamic":
        return model
    return dataclasses.replace(model, rope_base=effective_base(model, length), rope_scaling=RopeScaling())


def describe_rope(model: ModelConfig, length: int) -> str:
    """The effective base and scale in one line, for logs: how much slower the fastest and slowest pairs turn."""
    scaled = inverse_frequencies(model, length)
    plain = model.rope_base ** -_exponents(model)
    ratios = plain / scaled.angles
    text = f"{model.rope_scaling.rope_type}, base {effective_base(model, length):.10g}"
    if model.rope_scaling.rope_type != "default":
        text += f", frequencies divided by {ratios[0]:.4g} (fastest) to {ratios[-1]:.4g} (slowest)"
        text += f", attention factor {scaled.attention_factor:.6g}"
    return text


def rotary_table(positions_T: torch.Tensor, frequencies: Frequencies) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [T, 1, D/2], of each token's angles; computed once a micro-batch and shared by all layers.

    Angles are formed in fp64: at a million positions fp32 loses them to 1e-1 radians.
    """
    angles = positions_T.to(torch.float64)[:, None, None] * frequencies.angles.to(positions_T.device)
    factor = frequencies.attention_factor
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def rotate(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x turned by the table's angles; computed in fp32, returned in x's dtype. Saves only the table for backward."""
    return _Rotate.apply(x_THD, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_THD, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


def _turn(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x_THD.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THD.dtype)


def _exponents(model: ModelConfig) -> torch.Tensor:
    return torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim


def _factor(model: ModelConfig) -> float:
    """factor, or what stands for it: the length the model is made for over the one it was first trained at."""
    scaling = model.rope_scaling
    if scaling.factor is not None:
        return scaling.factor
    assert model.max_position_embeddings is not None, "checked by config/huggingface.py check_rope"
    assert scaling.original_max_position_embeddings is not None
    return model.max_position_embeddings / scaling.original_max_position_embeddings


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert length is not None
    assert scaling.factor is not None
    keep = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn(frequencies: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Pairs that turn more than beta_fast times over the original length stay, below beta_slow are divided."""
    scaling, length = model.rope_scaling, model.rope_scaling.original_max_position_embeddings
    assert length is not None

    def pair_turning(turns: float) -> float:
        return model.head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(model.rope_base))

    low, high = pair_turning(scaling.beta_fast or 32), pair_turning(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, model.head_dim - 1)
    pairs = torch.arange(model.head_dim // 2, dtype=torch.float64)
    divided = ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
    return divided * frequencies / _factor(model) + (1 - divided) * frequencies


def _yarn_attention_factor(model: ModelConfig) -> float:
    """0.1 ln(factor) + 1 (YaRN, section 3.4), or the quotient of two of these with mscale and mscale_all_dim."""
    scaling, factor = model.rope_scaling, _factor(model)
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1)


def _longrope_attention_factor(model: ModelConfig) -> float:
    """sqrt(1 + ln(factor) / ln(original length)) (LongRoPE as released with Phi-3)."""
    scaling, factor = model.rope_scaling, _factor(model)
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    assert scaling.original_max_position_embeddings is not None
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(scaling.original_max_position_embeddings))
