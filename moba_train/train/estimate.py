"""How large a run is before it starts: parameters, and memory per GPU in GiB.

The memory is an estimate of what a rank of the last pipeline stage holds, by the terms listed in `memory_gib`;
framework buffers and fragmentation come on top.
"""

from __future__ import annotations

from moba_train.config.schema import ModelConfig, RunConfig
from moba_train.config.validate import data_parallel_size

__all__ = ["memory_gib", "parameter_count"]


def parameter_count(model: ModelConfig, key_conv: int = 0) -> int:
    """Parameters of the whole model, tied embeddings once, with key convolutions of this width."""
    layer = _layer_parameters(model) + key_conv * model.num_key_value_heads * model.head_dim
    return model.num_layers * layer + _embedding_parameters(model) + model.hidden_size


def memory_gib(config: RunConfig, world_size: int) -> dict[str, float]:
    """Terms of the peak, GiB per GPU, by name, and their total."""
    model, parallel, train = config.model, config.parallel, config.train
    width = 4 if config.precision == "fp32" else 2
    shards = data_parallel_size(config, world_size) * parallel.context if parallel.distributed_optimizer else 1
    stage_layers = model.num_layers // parallel.pipeline
    embedding = model.vocab_size * model.hidden_size * (2 if parallel.pipeline == 1 and not model.tie_embeddings else 1)
    parameters = (stage_layers * _layer_parameters(model) + embedding) / parallel.tensor
    tokens = train.sequence_length / parallel.context

    # A token in a layer: residual stream twice, both norms; q, k, v, rotated q and k, out; gate, up and their product.
    hidden = model.hidden_size / (parallel.tensor if parallel.sequence else 1)
    q = model.num_attention_heads * model.head_dim / parallel.tensor
    kv = model.num_key_value_heads * model.head_dim / parallel.tensor
    mlp = 0 if parallel.recompute == "selective" else 3 * model.ffn_hidden_size / parallel.tensor
    whole_layer = 4 * hidden + 3 * q + 3 * kv + mlp
    kept = stage_layers * hidden + whole_layer if parallel.recompute == "full" else stage_layers * whole_layer
    in_flight = parallel.pipeline  # micro-batches whose activations the first stage keeps

    heads = parallel.gather_heads or model.num_key_value_heads // parallel.tensor
    gathered = 2 * train.sequence_length * heads * model.head_dim * width if parallel.context > 1 else 0
    terms = {
        "weights": parameters * width,
        "gradients": parameters * 4,
        "optimizer": parameters * (8 if config.precision == "fp32" else 12) / shards,
        "activations": tokens * kept * width * in_flight,
        "gathered keys and values": 2 * gathered,  # forward's and their gradients
        "logits": tokens * model.vocab_size / parallel.tensor * (width + 2 * 4),  # and two fp32 copies in the loss
    }
    terms["total"] = sum(terms.values())
    return {name: size / 2**30 for name, size in terms.items()}


def _layer_parameters(model: ModelConfig) -> int:
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    biases = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim if model.qkv_bias else 0
    return model.hidden_size * heads * model.head_dim + 3 * model.hidden_size * model.ffn_hidden_size + norms + biases


def _embedding_parameters(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
