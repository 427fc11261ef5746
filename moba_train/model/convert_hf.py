"""Hugging Face's weights <-> megatron-core's: which tensors make which, and a built model filled from a folder.

A core tensor is known by its key in a checkpoint, where layers are stacked in front: any tensor or pipeline parallel
slice is a slice of it. Queries, keys and values of Hugging Face's model become one matrix, by key head:
    [queries of key head 0, key 0, value 0, queries of key head 1, ...]
and the gate and up projections one matrix [gate, up]. Rotary halves are laid out the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model

from moba_train.config.schema import ModelConfig
from moba_train.model.key_conv import KEY_CONV_PREFIX

__all__ = ["Rule", "core_shape", "fill_model", "from_core", "hf_shapes", "rules", "to_core"]

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """A core tensor and the Hugging Face tensors it is made of. `{}` in names stands for the layer, if any.

    shapes: of the Hugging Face tensors. join: as is (one tensor) | stacked (rows one after another) | by_key_head.
    """

    core: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    join: str = "as is"

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one; in a checkpoint they are stacked along a first axis."""
        return self.core.startswith("decoder.layers.")

    def hf_names(self, layer: int) -> list[str]:
        """Names of the Hugging Face tensors of `layer` (any number where there is but one)."""
        return [name.format(layer) for name in self.names]


def rules(model: ModelConfig) -> list[Rule]:
    """Every tensor of the model, in the order of the forward pass."""
    width, ffn, dim = model.hidden_size, model.ffn_hidden_size, model.head_dim
    queries, keys = model.num_attention_heads * dim, model.num_key_value_heads * dim
    layer, core = "model.layers.{}.", "decoder.layers."
    qkv = tuple(f"{layer}self_attn.{x}_proj" for x in "qkv")
    attention, mlp = core + "self_attention.", core + "mlp."
    found = [
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ((model.vocab_size, width),)),
        Rule(attention + "linear_qkv.layer_norm_weight", (layer + "input_layernorm.weight",), ((width,),)),
        Rule(
            attention + "linear_qkv.weight",
            tuple(f"{name}.weight" for name in qkv),
            ((queries, width), (keys, width), (keys, width)),
            "by_key_head",
        ),
    ]
    if model.qkv_bias:
        names = tuple(f"{name}.bias" for name in qkv)
        found.append(Rule(attention + "linear_qkv.bias", names, ((queries,), (keys,), (keys,)), "by_key_head"))
    if model.qk_norm:
        found += [
            Rule(f"{attention}{x}_layernorm.weight", (f"{layer}self_attn.{x}_norm.weight",), ((dim,),)) for x in "qk"
        ]
    found += [
        Rule(attention + "linear_proj.weight", (layer + "self_attn.o_proj.weight",), ((width, queries),)),
        Rule(mlp + "linear_fc1.layer_norm_weight", (layer + "post_attention_layernorm.weight",), ((width,),)),
        Rule(
            mlp + "linear_fc1.weight",
            (layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight"),
            ((ffn, width), (ffn, width)),
            "stacked",
        ),
        Rule(mlp + "linear_fc2.weight", (layer + "mlp.down_proj.weight",), ((width, ffn),)),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ((width,),)),
    ]
    if not model.tie_embeddings:
        found.append(Rule("output_layer.weight", ("lm_head.weight",), ((model.vocab_size, width),)))
    return found


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the model's Hugging Face folder must hold."""
    return {
        name: shape
        for rule in rules(model)
        for layer in range(model.num_layers if rule.per_layer else 1)
        for name, shape in zip(rule.hf_names(layer), rule.shapes, strict=True)
    }


def core_shape(rule: Rule) -> tuple[int, ...]:
    """Shape of the core tensor, of one layer where it has layers."""
    return (sum(shape[0] for shape in rule.shapes), *rule.shapes[0][1:])


def to_core(rule: Rule, model: ModelConfig, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hugging Face tensors, in the rule's order -> the core tensor. ValueError where their dtypes differ."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"{', '.join(rule.names)} have {', '.join(str(tensor.dtype) for tensor in tensors)}")
    if rule.join == "as is":
        return tensors[0]
    if rule.join == "stacked":
        return torch.cat(list(tensors))
    groups = model.num_key_value_heads
    parts = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]
    return torch.cat(parts, dim=1).flatten(0, 1)


def from_core(rule: Rule, model: ModelConfig, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The core tensor -> Hugging Face tensors, in the rule's order. The reverse of `to_core`, bit by bit."""
    if rule.join == "as is":
        return [tensor]
    sizes = [shape[0] for shape in rule.shapes]
    if rule.join == "stacked":
        return list(tensor.split(sizes))
    groups = model.num_key_value_heads
    parts = tensor.unflatten(0, (groups, -1)).split([size // groups for size in sizes], dim=1)
    return [part.flatten(0, 1).contiguous() for part in parts]


@torch.no_grad()
def fill_model(chunks: Iterable[torch.nn.Module], model: ModelConfig, read: Read) -> None:
    """Give a built model, any tensor and pipeline parallel slice of it, the weights that `read` gives by their Hugging
    Face names. Values are cast to the model's dtype; one core tensor is held at a time.

    With a distributed optimizer, call its `reload_model_params` after.
    """
    by_key = {rule.core: rule for rule in rules(model)}
    for chunk in chunks:
        state = unwrap_model(chunk).sharded_state_dict(metadata={"singleton_local_shards": False})
        apply_factories(state)
        filled = set()
        for shard in nested_values(state):
            if not isinstance(shard, ShardedTensor) or KEY_CONV_PREFIX in shard.key:
                continue  # extra states are fp8's, not weights; a key convolution starts as the identity
            rule = by_key[shard.key]
            layer = shard.global_offset[0] if rule.per_layer else 0
            whole = to_core(rule, model, [read(name) for name in rule.hf_names(layer)])
            part = whole[tuple(slice(at, at + size) for at, size in zip(*_place(shard), strict=True))]
            target = shard.data
            assert target is not None
            target[tuple(slice(0, size) for size in part.shape)].copy_(part)
            filled.add(shard.key)
        assert filled, "no weights in this chunk"


def _place(shard: ShardedTensor) -> tuple[Sequence[int], Sequence[int]]:
    """Offsets and sizes of the shard in the core tensor (of its layer)."""
    return shard.global_offset[shard.prepend_axis_num :], shard.local_shape
