"""What a run can be told: frozen dataclasses with types and defaults, and `ConfigError`.

Standard library only. Hydra composes the values (compose.py), `from_dict` here turns them into a `RunConfig` and
refuses unknown keys and wrong types, validate.py refuses combinations that cannot work.
Invariant: a `RunConfig` is never changed after it was built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "AttentionConfig",
    "AttentionPhase",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "LayerOverride",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RopeScaling",
    "RunConfig",
    "RunDirConfig",
    "SftConfig",
    "StageConfig",
    "TrainConfig",
    "WandbConfig",
    "from_dict",
    "to_dict",
]


class ConfigError(Exception):
    """A setting that cannot work: which key, its value, and what to do about it."""

    def __init__(self, key: str, value: Any, remedy: str) -> None:
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key}={value!r}: {remedy}")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequency scaling, by Hugging Face's field names. Which type takes which: config/huggingface.py.

    A field that the type does not take must stay null.
    """

    rope_type: str = "default"  # default | linear | dynamic (NTK-aware) | llama3 | yarn | longrope
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    attention_factor: float | None = None  # yarn, longrope: multiplies cos and sin; null: by the type's formula
    beta_fast: float | None = None  # yarn; null: 32
    beta_slow: float | None = None  # yarn; null: 1
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool | None = None  # yarn; null: true
    short_factor: tuple[float, ...] | None = None  # longrope: a factor for each dimension pair
    long_factor: tuple[float, ...] | None = (
        None  # longrope: the same, of inputs beyond original_max_position_embeddings
    )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family decoder (RMSNorm, RoPE, SwiGLU, grouped-query attention)."""

    name: str = "tiny"
    num_layers: int = 4
    hidden_size: int = 128
    ffn_hidden_size: int = 384
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 4096
    rope_base: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    max_position_embeddings: int | None = None  # longest input it was made for; null: train.sequence_length
    norm_epsilon: float = 1e-5
    qk_norm: bool = False
    qkv_bias: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02
    transformer_impl: str = "local"  # local | transformer_engine


@dataclass(frozen=True)
class LayerOverride:
    """Another block size or top-k for some MoBA layers, numbered from 0; None: as every other layer."""

    layers: tuple[int, ...] = ()
    block_size: int | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class AttentionPhase:
    """A part of training with a layer plan of its own: where it begins, and what differs from `attention`.

    It begins when so many steps or tokens, or that fraction of the steps, are done (one of the three;
    config/schedule.py makes steps of all), and ends where the next one begins. Keys that are None: as in `attention`.
    """

    step: int | None = None
    tokens: int | None = None
    fraction: float | None = None  # of train.steps
    pattern: str | None = None
    block_size: int | None = None
    top_k: int | None = None
    dense_first_layers: int | None = None
    dense_last_layers: int | None = None
    full_layers: tuple[int, ...] | None = None
    overrides: tuple[LayerOverride, ...] | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """Which layers are MoBA and how MoBA selects blocks. Read by model/layer_plan.py alone."""

    pattern: str = "moba"
    block_size: int = 64
    top_k: int = 4  # blocks a query attends to, its own included
    dense_first_layers: int = 0
    dense_last_layers: int | str = 0  # a number | auto: measured at the start (train/dense_layers.py)
    dense_target: float | None = None  # of auto: share of full attention's direct gradient density; None: 0.5
    full_layers: tuple[int, ...] = ()  # layers, numbered from 0, that are full whatever the pattern says
    overrides: tuple[LayerOverride, ...] = ()
    schedule: tuple[AttentionPhase, ...] = ()  # before the first phase begins, the keys above alone hold
    force_first_block: bool = False  # the first block of a document (the sink) is always picked, as one of top_k
    force_previous_block: bool = False  # the block before a query's own is always picked, likewise
    share_picks_in_group: bool = False  # the query heads of a key head pick together, by their mean query
    key_conv: int = 0  # width of a causal convolution on the keys of every layer (model/key_conv.py); 0: none
    backend: str = "auto"  # of MoBA layers: auto | reference | portable | triton | flash | mixed (attention/README.md)
    full_backend: str = "auto"  # of full layers: auto | reference | sdpa | triton | flash
    deterministic: bool = False  # attention's gradients bitwise equal from run to run on a GPU, at some cost


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid over GPUs. Data parallel is what is left of world_size."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks per pipeline stage (interleaved schedule when > 1)
    context: int = 1
    sequence: bool = False  # sequence parallel: shard activations between tensor-parallel regions
    context_layout: str = "zigzag"  # zigzag | balanced (by document) | contiguous: which rows a context rank holds
    context_strategy: str = "all_gather"  # all_gather | all_to_all | ring
    full_context_strategy: str | None = None  # of full-attention layers, where they should differ
    context_inner: int = 1  # neighbouring context ranks (of one node) that swap heads; the strategy is across them
    gather_heads: int | None = None  # all_gather: key heads of the whole context alive at a time; None: all
    context_overlap: bool = True  # communicate under the attention; false is faster where that is all but free
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    recompute: str = "none"  # none | selective | full
    timeout_s: int = 600  # a rank that is dead, or that others wait for, this long ends the run


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run and shape of a step."""

    steps: int = 100
    sequence_length: int = 1024  # tokens of a row; padded beyond that where the layout needs it (Batch.pad)
    global_batch_size: int = 8  # rows of sequence_length tokens per optimizer step, over all ranks
    validate_every: int = 0  # steps; 0: only at the end
    validation_batches: int = 8  # global batches per validation
    seed: int = 1234
    freeze: tuple[str, ...] = ()  # shell patterns of parameter names that do not train, layers numbered from 0


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from: one prepared folder, or a weighted mix of them."""

    path: str | None = None
    blend: dict[str, float] | None = None  # prepared folder -> weight
    length_buckets: dict[str, int] | None = None  # least tokens of a document -> times it comes in a pass; None: once
    mode: str = "packed"  # packed: documents kept apart | concatenated: one document per row
    seed: int = 1234
    cache_dir: str | None = None  # of the sample indices; None: beside the data


@dataclass(frozen=True)
class SftConfig:
    """Fine-tuning on chat rows (launch/sft.py), in place of data.path; off while `path` is not given."""

    path: str | None = None  # a file, folder or glob of .jsonl or .parquet
    valid_path: str | None = None  # None: a part of the rows of `path`
    valid_fraction: float | None = None  # of the rows, chosen by a hash; None: 0.05 where there is no valid_path
    tokenizer: str | None = None  # a pretrained folder, or tokenizer/ of a prepared one; None: init_from_hf's
    chat_template: str | None = None  # a jinja file; None: the tokenizer's own, else a built-in one
    last_turn_only: bool = False  # loss on the last assistant turn alone
    overlong: str = "refuse"  # rows longer than the context: refuse | truncate | drop
    packing: str = "first_fit_decreasing"  # first_fit_decreasing | sequential | none
    loss_weighting: str = "token"  # what weighs the same: token | sample (a row) | document (rows of one source)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and decay, in optimizer steps."""

    learning_rate: float = 3e-4
    min_learning_rate: float = 3e-5
    warmup_steps: int = 0
    schedule: str = "cosine"  # cosine | wsd | constant
    decay_steps: int | None = None  # cosine: length of the whole schedule; wsd: of the final decay
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad: float = 1.0


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and starting points."""

    save_every: int = 0  # steps; 0: only at the end and on a signal
    keep_last: int = 2  # and those that stages ended with
    resume: bool = True  # go on from run.dir's latest checkpoint when there is one
    load: str | None = None  # start from this checkpoint (a run folder or one of its step folders)
    load_weights_only: bool = False  # with load: fresh optimizer, schedule and data position
    init_from_hf: str | None = None  # start from the weights of this Hugging Face folder; its shape becomes model.*


@dataclass(frozen=True)
class MetricsConfig:
    """What is reported, and how often."""

    log_every: int = 1
    position_buckets: int = 16  # of loss_by_position.png
    gate_every: int = 0  # steps, and at the end; 0: never. Keys gate/... and gradient_density/..., picture gate.png
    gate_per_head: bool = False  # the same for every head


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases. online without an API key falls to offline, and says so."""

    mode: str = "disabled"  # disabled | offline | online
    project: str = "moba_train"
    name: str | None = None


@dataclass(frozen=True)
class RunDirConfig:
    """The one folder a run writes to."""

    dir: str | None = None  # None: runs/<recipe>-<time>, chosen once and shared by all ranks


@dataclass(frozen=True)
class StageConfig:
    """A part of a run with a sequence length of its own; what it may set beside is in config/stages.py."""

    steps: int = 0
    sequence_length: int = 0
    model: dict[str, Any] = field(default_factory=dict)  # rope_scaling, rope_base, max_position_embeddings
    attention: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # path or blend, length_buckets


@dataclass(frozen=True)
class RunConfig:
    """Everything about one run. `precision=fp8` needs transformer_impl=transformer_engine."""

    recipe: str = "tiny"
    precision: str = "bf16"  # fp32 | bf16 | fp8
    dry_run: bool = False
    world_size: int | None = None  # None: what torchrun started (dry run: the smallest that fits)
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    run: RunDirConfig = field(default_factory=RunDirConfig)
    stages: dict[str, StageConfig] | None = None  # by name, in order (config/stages.py); None: the run is one stage

    def with_dense_last_layers(self, number: int) -> RunConfig:
        """The same run with a number of dense last layers, where `auto` stood."""
        return dataclasses.replace(self, attention=dataclasses.replace(self.attention, dense_last_layers=number))


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain dicts: what checkpoints and wandb store, and what `from_dict` reads."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], cls: type = RunConfig, prefix: str = "") -> Any:
    """Build `cls` from nested dicts; ConfigError on an unknown key or a value of the wrong type."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise unknown_key(prefix + str(key), values[key], known)
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in values.items()})


def unknown_key(key: str, value: Any, known: typing.Iterable[str]) -> ConfigError:
    """ConfigError for a key that does not exist, naming the closest ones that do."""
    section, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    where = f" in {section}" if section else ""
    hint = (
        f"did you mean {section + '.' if section else ''}{near[0]}?"
        if near
        else f"keys{where}: {', '.join(sorted(known))}"
    )
    return ConfigError(key, value, f"no such key; {hint}")


def _convert(value: Any, hint: Any, key: str) -> Any:
    if hint is Any:
        return value
    if isinstance(hint, types.UnionType):  # X | None, or int | str
        if value is None and type(None) in typing.get_args(hint):
            return None
        kinds = [h for h in typing.get_args(hint) if h is not type(None)]
        hint = next((h for h in kinds if h is type(value)), kinds[0])
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(key, value, "expects a group of keys, not a single value")
        return from_dict(value, typing.cast(type, hint), key + ".")
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(key, value, "expects a mapping")
        _, item = typing.get_args(hint)
        return {str(name): _convert(v, item, f"{key}.{name}") for name, v in value.items()}
    if typing.get_origin(hint) is tuple:  # tuple[X, ...]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(key, value, "expects a list in brackets")
        item = typing.get_args(hint)[0]
        return tuple(_convert(v, item, f"{key}[{index}]") for index, v in enumerate(value))
    if hint is int and isinstance(value, float) and value.is_integer():  # tokens: 1e9
        return int(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 3e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(key, value, f"expects {hint.__name__}, got {type(value).__name__}")
    if value == "":
        raise ConfigError(key, value, "is empty; give a value, or leave the key out")
    if hint is float and not math.isfinite(value):
        raise ConfigError(key, value, "must be a finite number")
    return value
