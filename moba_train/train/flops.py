"""Floating-point operations a model needs, counted per layer kind: what MFU and the start-up log are made of.

A MoBA layer is charged for the query-key pairs it computes (own block causal, picked earlier blocks whole) and for its
gate; a full layer for all causal pairs. One multiply-add is two operations; backward counts twice forward,
recomputation not at all (model FLOPs, PaLM, arXiv 2204.02311, appendix B). The gate has no backward. All counts are for
whole rows, over all ranks. Norms, activation functions and rotary embedding, about one part in hidden_size, are left
out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from moba_train.config.schema import ModelConfig
from moba_train.model.layer_plan import LayerAttention, LayerKind

__all__ = ["attention_pairs", "gate_pairs", "matmul_flops_per_token", "training_flops"]


def attention_pairs(layer: LayerAttention, length: int) -> int:
    """Query-key pairs one head computes over one document of `length` tokens."""
    if layer.kind is LayerKind.FULL:
        return length * (length + 1) // 2
    block, earlier = layer.block_size, layer.top_k - 1
    whole, rest = divmod(length, block)
    own = whole * block * (block + 1) // 2 + rest * (rest + 1) // 2
    # A query in block b picks min(b, earlier) earlier blocks, all of them full.
    picks_per_offset = sum(min(b, earlier) for b in range(min(whole, earlier))) + max(whole - earlier, 0) * earlier
    return own + block * block * picks_per_offset + rest * block * min(whole, earlier)


def gate_pairs(layer: LayerAttention, length: int) -> int:
    """Query-block scores one head, or a group that shares its picks, computes over one document; none if full."""
    if layer.kind is LayerKind.FULL:
        return 0
    whole, rest = divmod(length, layer.block_size)
    return layer.block_size * whole * (whole - 1) // 2 + rest * whole


def matmul_flops_per_token(model: ModelConfig) -> int:
    """Forward operations of one token in projections, MLP and output layer."""
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    layer = model.hidden_size * (heads + model.num_attention_heads) * model.head_dim
    layer += 3 * model.hidden_size * model.ffn_hidden_size
    return 2 * (model.num_layers * layer + model.hidden_size * model.vocab_size)


def training_flops(
    model: ModelConfig, plan: tuple[LayerAttention, ...], lengths: Iterable[int], key_conv: int = 0
) -> int:
    """Forward and backward operations of documents of these lengths through the whole model.

    key_conv: width of the key convolution of every layer; what it mixes across a document's edge, at most width - 1
    rows, is not subtracted.
    """
    width = model.num_attention_heads * model.head_dim
    convolutions = model.num_layers * 2 * key_conv * model.num_key_value_heads * model.head_dim
    per_token = 3 * (matmul_flops_per_token(model) + convolutions)
    total = 0
    layers = Counter(plan).items()
    for length, documents in Counter(lengths).items():
        each = per_token * length
        for layer, count in layers:
            gates = model.num_key_value_heads if layer.share_picks_in_group else model.num_attention_heads
            each += count * 3 * 4 * width * attention_pairs(layer, length)
            each += count * 2 * gates * model.head_dim * gate_pairs(layer, length)
        total += documents * each
    return total
