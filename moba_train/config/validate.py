"""Refuse a run that cannot work, before any process group or GPU exists; and what is padded so that it can. Standard
library only.

Each rule names the key, the value and the remedy. The layer pattern is checked by model/layer_plan.py, files by data/
and train/checkpoint.py: train/setup.py calls them all.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import Any

from moba_train.config.huggingface import check_rope
from moba_train.config.schema import ConfigError, RunConfig, SftConfig

__all__ = ["data_parallel_size", "min_world_size", "padded_length", "padded_vocab_size", "validate"]

_CHOICES = {
    "precision": ("fp32", "bf16", "fp8"),
    "model.transformer_impl": ("local", "transformer_engine"),
    "attention.backend": ("auto", "reference", "portable", "triton", "flash", "mixed"),
    "attention.full_backend": ("auto", "reference", "sdpa", "triton", "flash"),
    "parallel.context_layout": ("zigzag", "balanced", "contiguous"),
    "parallel.context_strategy": ("all_gather", "all_to_all", "ring"),
    "parallel.full_context_strategy": (None, "all_gather", "all_to_all", "ring"),
    "parallel.recompute": ("none", "selective", "full"),
    "data.mode": ("packed", "concatenated"),
    "sft.overlong": ("refuse", "truncate", "drop"),
    "sft.packing": ("first_fit_decreasing", "sequential", "none"),
    "sft.loss_weighting": ("token", "sample", "document"),
    "optim.schedule": ("cosine", "wsd", "constant"),
    "wandb.mode": ("disabled", "offline", "online"),
}
_AT_LEAST = {
    1: (
        "model.num_layers model.hidden_size model.ffn_hidden_size model.num_attention_heads model.num_key_value_heads "
        "model.head_dim model.vocab_size attention.block_size attention.top_k parallel.tensor parallel.pipeline "
        "parallel.virtual_pipeline parallel.context parallel.context_inner parallel.timeout_s train.steps "
        "train.sequence_length train.global_batch_size train.validation_batches checkpoint.keep_last metrics.log_every "
        "metrics.position_buckets"
    ),
    0: (
        "attention.dense_first_layers attention.key_conv metrics.gate_every train.validate_every "
        "checkpoint.save_every optim.warmup_steps optim.weight_decay optim.clip_grad optim.min_learning_rate"
    ),
}

_FP8_MULTIPLE = 16  # of all sides of Transformer Engine's fp8 products, tokens included

# Far above any run: a slip such as 1e12 is refused rather than allocated.
_AT_MOST = {
    "model.num_layers": 10_000,
    "parallel.timeout_s": 10_000_000,
    "train.steps": 100_000_000,
    "train.global_batch_size": 10_000_000,
    "train.sequence_length": 2**30,
    "metrics.position_buckets": 65_536,
}


def min_world_size(config: RunConfig) -> int:
    """GPUs one copy of the model takes: tensor x pipeline x context."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the embeddings over all tensor-parallel ranks: rounded up to divide. Nothing is ever computed with the
    rows past vocab_size, and no checkpoint that is loaded elsewhere need have them."""
    return -(-vocab_size // tensor) * tensor


def padded_length(length: int, config: RunConfig) -> int:
    """Tokens of a row of `length` when it is padded (Batch.pad) so that context parallelism cuts it into two equal
    chunks a rank (whatever the layout, so that another one does not change the batch), sequence parallel each rank's
    rows into equal parts, and fp8 multiplies the rows of each."""
    parallel = config.parallel
    chunks = 2 * parallel.context if parallel.context > 1 else 1
    parts = parallel.context * (parallel.tensor if parallel.sequence else 1)
    step = math.lcm(chunks, parts * (_FP8_MULTIPLE if config.precision == "fp8" else 1))
    return -(-length // step) * step


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """What is left of world_size for data parallelism; ConfigError when it does not come out even."""
    model_size = min_world_size(config)
    if world_size % model_size or world_size < model_size:
        layout = "parallel.tensor x pipeline x context = " + " x ".join(
            str(n) for n in (config.parallel.tensor, config.parallel.pipeline, config.parallel.context)
        )
        remedy = f"must be a positive multiple of {layout} = {model_size}: change the layout, or start as many"
        raise ConfigError("world_size", world_size, remedy)
    return world_size // model_size


def validate(config: RunConfig, world_size: int) -> None:
    """ConfigError for the first rule that `config` on `world_size` processes breaks."""
    for key, choices in _CHOICES.items():
        _require(config, key, _get(config, key) in choices, f"choose {', '.join(filter(None, choices))}")
    for least, keys in _AT_LEAST.items():
        for key in keys.split():
            _require(config, key, _get(config, key) >= least, f"must be at least {least}")
    for key, most in _AT_MOST.items():
        _require(config, key, _get(config, key) <= most, f"must be at most {most:,}")
    _require(
        config,
        "wandb.project",
        len(config.wandb.project) <= 128 and not set(config.wandb.project) & set("/\\#?%:"),
        "wandb takes up to 128 characters without / \\ # ? % :",
    )
    _check_model(config)
    _check_parallel(config)
    dp = data_parallel_size(config, world_size)
    batch = config.train.global_batch_size
    _require(
        config,
        "train.global_batch_size",
        batch % dp == 0,
        f"must be divisible by the data-parallel size {dp}; try {-(-batch // dp) * dp}",
    )
    if config.parallel.virtual_pipeline > 1:
        _require(
            config,
            "train.global_batch_size",
            (batch // dp) % config.parallel.pipeline == 0,
            f"the interleaved schedule needs micro-batches per rank ({batch // dp}) divisible by "
            f"parallel.pipeline={config.parallel.pipeline}",
        )
    _check_training(config)
    _check_sft(config)


def _check_model(config: RunConfig) -> None:
    model, tp = config.model, config.parallel.tensor
    _require(
        config,
        "model.num_attention_heads",
        model.num_attention_heads % model.num_key_value_heads == 0,
        f"must be a multiple of model.num_key_value_heads={model.num_key_value_heads}",
    )
    _require(config, "model.head_dim", model.head_dim % 2 == 0, "rotary embedding needs an even head dimension")
    longest = model.max_position_embeddings
    _require(
        config, "model.max_position_embeddings", longest is None or longest >= 1, "must be at least 1, or left out"
    )
    check_rope(model)
    for name in ("num_attention_heads", "num_key_value_heads", "ffn_hidden_size"):
        _require(
            config,
            f"model.{name}",
            getattr(model, name) % tp == 0,
            f"must be divisible by parallel.tensor={tp}; change one of them",
        )
    if model.transformer_impl == "transformer_engine":
        _require(
            config,
            "model.transformer_impl",
            importlib.util.find_spec("transformer_engine") is not None,
            "Transformer Engine is not installed: pip install --no-build-isolation -c constraints.txt -e .[gpu], or "
            "choose local",
        )
    if config.precision == "fp8":
        _require(
            config,
            "precision",
            model.transformer_impl == "transformer_engine",
            "fp8 needs model.transformer_impl=transformer_engine (the gpu extra); or choose bf16",
        )
        widths = {
            "hidden_size": model.hidden_size,
            "ffn_hidden_size": model.ffn_hidden_size // tp,
            "num_attention_heads": model.num_attention_heads // tp * model.head_dim,
            "num_key_value_heads": 2 * model.num_key_value_heads // tp * model.head_dim,  # keys and values
        }
        for name, width in widths.items():
            _require(
                config,
                f"model.{name}",
                width % _FP8_MULTIPLE == 0,
                f"a tensor rank's layers are {width} wide there, and fp8 multiplies matrices of multiples of "
                f"{_FP8_MULTIPLE}; choose others, or precision=bf16",
            )


def _check_parallel(config: RunConfig) -> None:
    parallel, model = config.parallel, config.model
    chunks = parallel.pipeline * parallel.virtual_pipeline
    _require(
        config,
        "model.num_layers",
        model.num_layers % chunks == 0,
        f"must be divisible by parallel.pipeline x virtual_pipeline = {chunks}; change one of them",
    )
    _require(
        config,
        "parallel.virtual_pipeline",
        parallel.virtual_pipeline == 1 or parallel.pipeline > 1,
        "the interleaved schedule needs parallel.pipeline > 1",
    )
    _require(
        config,
        "parallel.sequence",
        not parallel.sequence or parallel.tensor > 1,
        "sequence parallel needs parallel.tensor > 1",
    )
    strategies = (parallel.context_strategy, parallel.full_context_strategy)
    if parallel.context_inner > 1:
        _require(
            config,
            "parallel.context_inner",
            parallel.context % parallel.context_inner == 0 and parallel.context_inner < parallel.context,
            f"must be a proper divisor of parallel.context={parallel.context}; to swap heads among all context ranks "
            "choose parallel.context_strategy=all_to_all instead",
        )
        _require(
            config,
            "parallel.context_inner",
            "all_to_all" not in strategies,
            "is all_to_all among neighbours already: choose ring or all_gather across them, for layers of both kinds",
        )
        _require(
            config,
            "parallel.gather_heads",
            parallel.gather_heads is None,
            "leave it out: with parallel.context_inner the key heads are gathered one by one already",
        )
    inner, what = parallel.context_inner, "parallel.context_inner"
    if "all_to_all" in strategies:
        inner, what = parallel.context, "parallel.context"
    if inner > 1:
        queries, keys = model.num_attention_heads // parallel.tensor, model.num_key_value_heads // parallel.tensor
        _require(
            config,
            what,
            queries % inner == 0 and (keys % inner == 0 or inner % keys == 0),
            f"all_to_all deals {queries} query and {keys} key heads of a tensor rank to the context ranks: choose a "
            "divisor of the query heads that divides the key heads or is a multiple of them, or another "
            "parallel.context_strategy",
        )
    if parallel.gather_heads is not None:
        _require(
            config, "parallel.gather_heads", "all_gather" in strategies, "belongs to the strategy all_gather alone"
        )
        heads = model.num_key_value_heads // parallel.tensor
        _require(
            config,
            "parallel.gather_heads",
            1 <= parallel.gather_heads <= heads,
            f"choose 1 to {heads}, the key heads of a tensor-parallel rank",
        )


def _check_training(config: RunConfig) -> None:
    optim, train = config.optim, config.train
    _check_dense_layers(config)
    for key in ("optim.learning_rate", "optim.epsilon", "model.rope_base", "model.norm_epsilon", "model.init_std"):
        _require(config, key, _get(config, key) > 0, "must be positive")
    for key in ("optim.beta1", "optim.beta2"):
        _require(config, key, 0 <= _get(config, key) < 1, "must lie in [0, 1)")
    _require(config, "train.seed", 0 <= train.seed < 2**31, "must lie between 0 and 2147483647")
    _require(
        config,
        "optim.min_learning_rate",
        optim.min_learning_rate <= optim.learning_rate,
        f"must not exceed optim.learning_rate={optim.learning_rate}",
    )
    _require(
        config, "optim.warmup_steps", optim.warmup_steps < train.steps, f"must be less than train.steps={train.steps}"
    )
    if optim.decay_steps is not None:
        least = optim.warmup_steps + 1 if optim.schedule == "cosine" else 1
        _require(config, "optim.decay_steps", optim.decay_steps >= least, f"must be at least {least}")
        _require(
            config, "optim.decay_steps", optim.schedule != "constant", "a constant schedule has no decay; leave it out"
        )
        _require(
            config,
            "optim.decay_steps",
            optim.schedule != "wsd" or optim.decay_steps <= train.steps - optim.warmup_steps,
            f"the final decay does not fit between optim.warmup_steps={optim.warmup_steps} and the end, "
            f"train.steps={train.steps}; leave it out for a tenth of them",
        )
    _require(
        config,
        "checkpoint.load_weights_only",
        not config.checkpoint.load_weights_only or config.checkpoint.load is not None,
        "needs checkpoint.load=PATH",
    )
    _require(
        config,
        "checkpoint.init_from_hf",
        config.checkpoint.init_from_hf is None or config.checkpoint.load is None,
        "checkpoint.load is given too; start from one of them",
    )


def _check_dense_layers(config: RunConfig) -> None:
    attention, layers = config.attention, config.model.num_layers
    _require(
        config, "attention.dense_first_layers", attention.dense_first_layers <= layers, f"the model has {layers} layers"
    )
    last, target = attention.dense_last_layers, attention.dense_target
    number = isinstance(last, int) and 0 <= last <= layers
    _require(config, "attention.dense_last_layers", number or last == "auto", f"choose 0 to {layers} layers, or auto")
    _require(config, "attention.dense_target", target is None or 0 < target <= 1, "must lie in (0, 1]")
    _require(
        config, "attention.dense_target", target is None or last == "auto", "needs attention.dense_last_layers=auto"
    )
    overridden = attention.overrides or any(phase.overrides for phase in attention.schedule)
    _require(
        config,
        "attention.dense_last_layers",
        last != "auto" or not overridden,
        "attention.overrides name MoBA layers, and auto may make these full: give a number, or no overrides",
    )
    metrics = config.metrics
    _require(
        config,
        "metrics.gate_per_head",
        not metrics.gate_per_head or metrics.gate_every > 0,
        "nothing is measured: set metrics.gate_every to a number of steps",
    )


def _check_sft(config: RunConfig) -> None:
    sft = config.sft
    if sft.path is None:
        for name, value in dataclasses.asdict(sft).items():
            unset = value == getattr(SftConfig(), name)
            _require(config, f"sft.{name}", unset, "means nothing without chat rows: give sft.path, or leave it out")
        return
    for key in ("data.path", "data.blend"):
        _require(
            config, key, _get(config, key) is None, f"the rows come from sft.path={sft.path!r}; drop one of the two"
        )
    _require(config, "data.mode", config.data.mode == "packed", "chat rows are kept apart: leave it at packed")
    _require(
        config,
        "sft.tokenizer",
        sft.tokenizer is not None,
        "name a pretrained folder, or the tokenizer/ of a prepared one (such as data/stdlib/tokenizer)",
    )
    if sft.valid_fraction is not None:
        _require(
            config, "sft.valid_fraction", sft.valid_path is None, "sft.valid_path is given too; drop one of the two"
        )
        _require(config, "sft.valid_fraction", 0 < sft.valid_fraction < 1, "must lie between 0 and 1, both left out")


def _get(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _require(config: RunConfig, key: str, ok: bool, remedy: str) -> None:
    if not ok:
        raise ConfigError(key, _get(config, key), remedy)
