"""A trained model to be asked: found, checked, built without an optimizer, its weights resharded to these processes.

`find_source` reads and refuses without a process group; `open_model` builds. Layout: tensor, context and data parallel
as `parallel.*` overrides say (one process otherwise); each copy of the model is whole, so no pipeline.

Letters: T tokens held here, X hidden size, R rows asked for, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from moba_train import device as devices
from moba_train import hf
from moba_train.config.compose import with_overrides
from moba_train.config.huggingface import read_config
from moba_train.config.schema import (
    AttentionConfig,
    CheckpointConfig,
    ConfigError,
    LayerOverride,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RunDirConfig,
    TrainConfig,
    WandbConfig,
    from_dict,
)
from moba_train.config.validate import validate
from moba_train.data.sft import RUN_TOKENIZER
from moba_train.data.tokenizer import tokenizer_files
from moba_train.model.build import build_gpt, transformer_config
from moba_train.model.convert_hf import fill_model
from moba_train.model.core_attention import RowParams, set_layer_plan
from moba_train.model.hf_folder import HFTensors, load_hf_folder
from moba_train.model.layer_plan import LayerAttention, LayerKind, Plan, layer_plan
from moba_train.model.rope import Frequencies, inverse_frequencies
from moba_train.parallel import groups as mesh
from moba_train.parallel.seed import seed_everything
from moba_train.train import checkpoint, checkpoint_folder
from moba_train.train.convert import CARRIED

__all__ = [
    "Model",
    "Source",
    "check_length",
    "close",
    "find_source",
    "fit_length",
    "hidden_states",
    "logits",
    "open_model",
]

_KEY = "checkpoint"
_LAYER_FIELDS = tuple(field.name for field in dataclasses.fields(LayerAttention) if field.name != "kind")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `tensors` of a Hugging Face folder, else a core checkpoint at `path`.

    trained_length: tokens it was made for. tokenizer: its folder, where one is known. step: None of a folder.
    """

    path: Path
    config: RunConfig
    plan: Plan
    trained_length: int
    tokenizer: Path | None
    step: int | None = None
    tensors: HFTensors | None = None


@dataclass
class Model:
    """A model on its device, in evaluation mode. frequencies: rotary, for the length that `fit_length` was told."""

    config: RunConfig
    groups: mesh.Groups
    device: torch.device
    gpt: GPTModel
    plan: Plan
    frequencies: Frequencies
    least_length: int = 1  # what rotary frequencies that depend on a length are for at least


def find_source(path: str, overrides: list[str]) -> Source:
    """The model at `path` (a run folder, a step folder, or a Hugging Face folder), with key=value `overrides`.

    ConfigError where there is none, it is damaged or of another shape, or a setting cannot work.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(_KEY, path, "no such folder; give a run folder, a step folder or a Hugging Face folder")
    if (folder / "config.json").is_file():
        return _hf_source(folder.resolve(), overrides)
    folder = checkpoint_folder.locate(folder, _KEY).resolve()
    metadata = checkpoint_folder.read_metadata(folder)
    trained: RunConfig = from_dict(metadata.config)
    start = CheckpointConfig(load=str(folder), load_weights_only=True, resume=False)
    count = trained.model.num_layers
    plan = tuple(_layer(folder, {"layers": metadata.plan}, index, count) for index in range(count))
    attention = _attention_of(folder, plan, trained.attention)
    config = _for_asking(dataclasses.replace(trained, checkpoint=start, attention=attention), overrides)
    checkpoint_folder.check(config)
    return Source(
        path=folder,
        config=config,
        plan=layer_plan(config.attention, config.model.num_layers),
        trained_length=trained.model.max_position_embeddings or trained.train.sequence_length,
        tokenizer=_tokenizer(folder, trained),
        step=metadata.step,
    )


def check_length(config: RunConfig, world_size: int, length: int, key: str) -> None:
    """ConfigError unless the configuration serves `world_size` processes, and (about `key`) rows of `length` tokens."""
    train = dataclasses.replace(config.train, sequence_length=length, global_batch_size=world_size)
    try:
        validate(dataclasses.replace(config, train=train), world_size)
    except ConfigError as error:
        raise ConfigError(key, length, error.remedy) if error.key == "train.sequence_length" else error from None


def open_model(source: Source) -> Model:
    """Join the process group, build the model and load its weights; `find_source` and `check_length` have passed."""
    devices.prepare()
    device, config = devices.local_device(), source.config
    groups = mesh.initialize(config.parallel, devices.collective_backend(), device)
    seed_everything(config.train.seed, groups.pipeline.rank)
    gpt = build_gpt(config, transformer_config(config, device), groups, device)
    if source.tensors is None:
        checkpoint.load_weights(source.path, gpt, groups.data_context.group)
        least_length = config.train.sequence_length  # trained with the frequencies of that length
    else:
        fill_model([gpt], config.model, source.tensors.read)
        source.tensors.close()
        least_length = 1  # as transformers: of the input at hand
    set_layer_plan([gpt], source.plan)
    gpt.eval()
    frequencies = inverse_frequencies(config.model, least_length).to(device)
    return Model(config, groups, device, gpt, source.plan, frequencies, least_length)


def fit_length(model: Model, length: int) -> None:
    """Choose rotary frequencies for inputs of up to `length` tokens, where the scaling depends on it."""
    model.frequencies = inverse_frequencies(model.config.model, max(length, model.least_length)).to(model.device)


def close() -> None:
    """Leave the process groups; safe when `open_model` never finished."""
    mesh.close()


@torch.no_grad()
def hidden_states(model: Model, tokens_T: torch.Tensor, positions_T: torch.Tensor, params: RowParams) -> torch.Tensor:
    """What the output layer reads -> [T, X]. Without it the logits of a long row never exist all at once."""
    embedded = model.gpt.embedding(input_ids=tokens_T[None], position_ids=positions_T[None])
    return model.gpt.decoder(embedded, attention_mask=None, packed_seq_params=params)[:, 0]


@torch.no_grad()
def logits(model: Model, hidden_RX: torch.Tensor) -> torch.Tensor:
    """fp32 logits of these rows over the whole vocabulary, on every tensor rank -> [R, V]."""
    gpt = model.gpt
    weight = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
    logits_R1V, _ = gpt.output_layer(hidden_RX[:, None], weight=weight, runtime_gather_output=True)
    return logits_R1V[:, 0].float()


def _hf_source(folder: Path, overrides: list[str]) -> Source:
    shape, tensors = load_hf_folder(folder, key=_KEY)
    moba = read_config(folder, _KEY).get("moba")
    plan = tuple(_layer(folder, moba, index, shape.num_layers) for index in range(shape.num_layers))
    attention = _attention_of(folder, plan, AttentionConfig())
    precision = "bf16" if {info.dtype for info in tensors.infos.values()} == {"BF16"} else "fp32"
    length = shape.max_position_embeddings or RunConfig().train.sequence_length
    train = TrainConfig(sequence_length=length)
    config = _for_asking(
        RunConfig(recipe=shape.name, precision=precision, model=shape, attention=attention, train=train), overrides
    )
    for key, theirs in dataclasses.asdict(shape).items():
        ours = getattr(config.model, key)
        if key in checkpoint_folder.MODEL_SHAPE and ours != theirs:
            raise ConfigError(f"model.{key}", ours, f"the model in {folder} has {theirs}; leave it as it is")
    plan = layer_plan(config.attention, shape.num_layers)
    return Source(folder, config, plan, length, folder if tokenizer_files(folder) else None, tensors=tensors)


def _layer(folder: Path, moba: Any, index: int, count: int) -> LayerAttention:
    """A layer by a folder's section `moba`; full where there is none."""
    if moba is None:
        return LayerAttention(LayerKind.FULL, 1, 1)
    try:
        layer = hf.layer_of(moba, index, count)
    except ValueError as error:
        raise ConfigError(_KEY, str(folder), str(error)) from None
    given = {name: layer[name] for name in _LAYER_FIELDS if name in layer}
    return LayerAttention(LayerKind(layer["kind"]), **{"block_size": 1, "top_k": 1, **given})


def _attention_of(folder: Path, plan: Plan, attention: AttentionConfig) -> AttentionConfig:
    """`attention` with settings that give `plan`, so that they can be changed like any others, and no schedule."""
    first = next((layer for layer in plan if layer.kind is LayerKind.MOBA), plan[0])
    others = tuple(
        LayerOverride(layers=(index,), block_size=layer.block_size, top_k=layer.top_k)
        for index, layer in enumerate(plan)
        if layer.kind is LayerKind.MOBA and layer != first
    )
    attention = dataclasses.replace(
        attention,
        pattern=",".join(layer.kind for layer in plan),
        dense_first_layers=0,
        dense_last_layers=0,
        full_layers=(),
        overrides=others,
        schedule=(),
        **{name: getattr(first, name) for name in _LAYER_FIELDS},
    )
    said = layer_plan(attention, len(plan))
    if any(layer != other for layer, other in zip(plan, said, strict=True) if layer.kind is LayerKind.MOBA):
        remedy = "its MoBA layers differ in more than block size and top-k, which is not served: make them alike"
        raise ConfigError(_KEY, str(folder), remedy)
    return attention


def _for_asking(trained: RunConfig, overrides: list[str]) -> RunConfig:
    """The configuration without what only training needs, in one process unless the overrides say otherwise."""
    plain = dataclasses.replace(
        trained,
        parallel=ParallelConfig(),
        optim=OptimConfig(),
        run=RunDirConfig(),
        wandb=WandbConfig(),
        dry_run=False,
        world_size=None,
    )
    config = with_overrides(plain, overrides)
    if config.attention.key_conv != trained.attention.key_conv:
        remedy = f"the model has a key convolution of width {trained.attention.key_conv}; leave it as it is"
        raise ConfigError("attention.key_conv", config.attention.key_conv, remedy)
    for key in ("pipeline", "virtual_pipeline"):
        if getattr(config.parallel, key) != 1:
            remedy = "every copy of the model is whole here; spread it with parallel.tensor and parallel.context"
            raise ConfigError(f"parallel.{key}", getattr(config.parallel, key), remedy)
    if config.attention.schedule:
        remedy = "a model is asked as it is at one step: change attention.pattern and the like instead"
        raise ConfigError("attention.schedule", len(config.attention.schedule), remedy)
    if config.parallel.sequence:
        raise ConfigError("parallel.sequence", True, "it only saves memory of training; leave it out")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_length(config, world_size, config.train.sequence_length, "train.sequence_length")
    return config


def _tokenizer(folder: Path, trained: RunConfig) -> Path | None:
    """The tokenizer the model was tuned with, else the one carried from a Hugging Face folder, else its data's."""
    data = [trained.data.path] if trained.data.path is not None else list(trained.data.blend or {})
    run = folder.parent.parent
    candidates = [run / RUN_TOKENIZER, run / CARRIED, *(Path(path) / "tokenizer" for path in data)]
    return next((path for path in candidates if tokenizer_files(path)), None)
