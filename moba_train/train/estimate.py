"""How large a run is before it starts: parameters, and memory per GPU in GiB.

The memory is an estimate, by the terms listed in `_stage_bytes`; framework buffers and fragmentation come on top.
"""

from __future__ import annotations

from moba_train.config.schema import ModelConfig, RunConfig
from moba_train.config.validate import data_parallel_size, padded_length, padded_vocab_size
from moba_train.context_parallel.memory import peak_bytes
from moba_train.model.chunked_loss import rows_at_once

__all__ = ["memory_gib", "parameter_count"]


def parameter_count(model: ModelConfig, key_conv: int = 0) -> int:
    """Parameters of the whole model, tied embeddings once, with key convolutions of this width."""
    return model.num_layers * _layer_parameters(model, key_conv) + _embedding_parameters(model) + model.hidden_size


def memory_gib(config: RunConfig, world_size: int) -> dict[str, float]:
    """Terms of the peak, GiB per GPU, by name, and their total, of the fuller of the first and last pipeline stage."""
    stages = (_stage_bytes(config, world_size, last) for last in (False, True))
    terms = max(stages, key=lambda terms: sum(terms.values()))
    terms["total"] = sum(terms.values())
    return {name: size / 2**30 for name, size in terms.items()}


def _stage_bytes(config: RunConfig, world_size: int, last: bool) -> dict[str, float]:
    model, parallel, train = config.model, config.parallel, config.train
    width = 4 if config.precision == "fp32" else 2
    dp = data_parallel_size(config, world_size)
    shards = dp * parallel.context if parallel.distributed_optimizer else 1
    stage_layers = model.num_layers // parallel.pipeline
    whole = parallel.pipeline == 1  # one stage that is first and last
    embedding = model.vocab_size * model.hidden_size * (2 if whole and not model.tie_embeddings else 1)
    key_conv = config.attention.key_conv
    parameters = (stage_layers * _layer_parameters(model, key_conv) + embedding) / parallel.tensor
    tokens = padded_length(train.sequence_length, config) / parallel.context

    # A token in a layer: residual stream twice, both norms; q, k, v, rotated q and k, out; gate, up and their product;
    # with a key convolution, k before it.
    hidden = model.hidden_size / (parallel.tensor if parallel.sequence else 1)
    q = model.num_attention_heads * model.head_dim / parallel.tensor
    kv = model.num_key_value_heads * model.head_dim / parallel.tensor
    mlp = 0 if parallel.recompute == "selective" else 3 * model.ffn_hidden_size / parallel.tensor
    whole_layer = 4 * hidden + 3 * q + (4 if key_conv else 3) * kv + mlp
    # Micro-batches whose activations wait for their backward: the warm-up of (interleaved) 1F1B (arXiv 2205.05198).
    stages, virtual = parallel.pipeline, parallel.virtual_pipeline
    waiting = stages - (stages - 1) / virtual if last else stages + ((stages - 1) / virtual if virtual > 1 else 0)
    waiting = min(waiting, train.global_batch_size // dp)
    kept = waiting * stage_layers * (hidden if parallel.recompute == "full" else whole_layer)
    if parallel.recompute == "full":
        kept += whole_layer  # of the one layer that is computed again
    words = padded_vocab_size(model.vocab_size, parallel.tensor) // parallel.tensor
    logits = min(tokens, rows_at_once(words)) * words * (width + 2 * 4)  # and two fp32 copies in the loss
    return {
        "weights": parameters * width,
        "gradients": parameters * 4,
        "optimizer": parameters * (8 if config.precision == "fp32" else 12) / shards,
        "activations": tokens * kept * width,
        "context parallelism": _context_bytes(config, width),
        "logits": logits if last or whole else 0,
    }


def _context_bytes(config: RunConfig, width: int) -> int:
    """What communication holds at its peak in one layer, of the kind that needs more."""
    model, parallel = config.model, config.parallel
    if parallel.context == 1:
        return 0
    length = padded_length(config.train.sequence_length, config)
    heads, key_heads = model.num_attention_heads // parallel.tensor, model.num_key_value_heads // parallel.tensor
    inner = parallel.context_inner
    across = parallel.context // inner
    inside = 0
    if inner > 1:  # heads are swapped among neighbours, then each key head's rows travel across them
        inside = max(
            peak_bytes(
                "all_to_all",
                rows=length // across,
                num_ranks=inner,
                heads=heads,
                key_heads=key_heads,
                head_dim=model.head_dim,
                element_size=width,
                overlap=True,  # one key head at a time, whether the next one travels meanwhile or not
            )
        )
        heads, key_heads = max(1, heads // max(inner, key_heads)), 1
    return inside + max(
        max(
            peak_bytes(
                strategy,
                rows=length,
                num_ranks=across,
                heads=heads,
                key_heads=key_heads,
                head_dim=model.head_dim,
                element_size=width,
                gather_heads=parallel.gather_heads,
                overlap=parallel.context_overlap,
            )
        )
        for strategy in {parallel.context_strategy, parallel.full_context_strategy or parallel.context_strategy}
    )


def _layer_parameters(model: ModelConfig, key_conv: int) -> int:
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    biases = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim if model.qkv_bias else 0
    matrices = model.hidden_size * heads * model.head_dim + 3 * model.hidden_size * model.ffn_hidden_size
    return matrices + norms + biases + key_conv * model.num_key_value_heads * model.head_dim


def _embedding_parameters(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
