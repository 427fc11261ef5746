"""Layer plan -> megatron-core layer specs: its own layers, with `CoreAttention` in the seam it leaves."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from moba_train.config.schema import RunConfig
from moba_train.context_parallel.layout import RULES
from moba_train.model.core_attention import CoreAttention
from moba_train.model.layer_plan import LayerAttention, LayerKind

__all__ = ["RMSNorm", "block_spec"]


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm under megatron-core's constructor.

    Its own torch norm refuses sequence parallel; here the weight is marked, so that its gradient is summed over
    tensor ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(
    config: RunConfig,
    transformer: TransformerConfig,
    plan: tuple[LayerAttention, ...],
    pp_rank: int,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """Specs of the layers that this (virtual) pipeline stage holds, taken from the plan of the whole model."""
    offset = get_transformer_layer_offset(transformer, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(transformer, vp_stage=vp_stage, pp_rank=pp_rank)
    norm: Any = RMSNorm
    if config.model.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    specs = [_layer_spec(config, layer) for layer in plan[offset : offset + count]]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _layer_spec(config: RunConfig, layer: LayerAttention) -> ModuleSpec:
    if config.model.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.model.qk_norm)
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.model.qk_norm)
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        if config.model.qk_norm:
            spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
            spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=CoreAttention,
        params={
            "layer": layer,
            "backends": {LayerKind.MOBA: config.attention.backend, LayerKind.FULL: config.attention.full_backend},
            "deterministic": config.attention.deterministic,
            "strategies": {
                LayerKind.MOBA: config.parallel.context_strategy,
                LayerKind.FULL: config.parallel.full_context_strategy or config.parallel.context_strategy,
            },
            "layout": RULES[config.parallel.context_layout],
            "gather_heads": config.parallel.gather_heads,
            "overlap": config.parallel.context_overlap,
            "hierarchical": config.parallel.context_inner > 1,
            "key_conv": config.attention.key_conv,
        },
    )
    return spec
