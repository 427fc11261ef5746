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

import torch
from megatron.core.models.gpt import GPTModel

from moba_train import device as devices
from moba_train.config.compose import with_overrides
from moba_train.config.schema import (
    CheckpointConfig,
    ConfigError,
    ParallelConfig,
    RunConfig,
    RunDirConfig,
    WandbConfig,
    from_dict,
)
from moba_train.config.validate import validate
from moba_train.model.build import build_gpt, transformer_config
from moba_train.model.core_attention import RowParams, set_layer_plan
from moba_train.model.layer_plan import LayerAttention, layer_plan
from moba_train.model.rope import inverse_frequencies
from moba_train.parallel import groups as mesh
from moba_train.parallel.seed import seed_everything
from moba_train.train import checkpoint

__all__ = ["Model", "Source", "check_length", "close", "find_source", "hidden_states", "logits", "open_model"]

_KEY = "checkpoint"


@dataclass(frozen=True)
class Source:
    """Where a model comes from. trained_length: tokens of a training row; step: None where none is known."""

    path: Path
    config: RunConfig
    plan: tuple[LayerAttention, ...]
    trained_length: int
    step: int | None
    tokenizer: Path | None


@dataclass
class Model:
    """A model on its device, in evaluation mode. frequencies: rotary angles per position, fp64 [D/2]."""

    config: RunConfig
    groups: mesh.Groups
    device: torch.device
    gpt: GPTModel
    plan: tuple[LayerAttention, ...]
    frequencies: torch.Tensor


def find_source(path: str, overrides: list[str]) -> Source:
    """The model at `path` (a run folder or a step folder), with key=value `overrides` of its configuration.

    ConfigError where there is none, it is damaged or of another shape, or a setting cannot work.
    """
    if not Path(path).is_dir():
        raise ConfigError(_KEY, path, "no such folder; give a run folder or one of its step folders")
    folder = checkpoint.find(path, key=_KEY).resolve()
    metadata = checkpoint.read_metadata(folder)
    trained: RunConfig = from_dict(metadata.config)
    config = _for_asking(trained, overrides, CheckpointConfig(load=str(folder), load_weights_only=True, resume=False))
    checkpoint.check(config)
    return Source(
        path=folder,
        config=config,
        plan=layer_plan(config.attention, config.model.num_layers, max(metadata.step - 1, 0)),
        trained_length=trained.train.sequence_length,
        step=metadata.step,
        tokenizer=_tokenizer(folder, trained),
    )


def check_length(config: RunConfig, world_size: int, length: int, key: str) -> None:
    """ConfigError (about `key`) unless rows of `length` tokens can be laid over `world_size` processes."""
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
    checkpoint.load_weights(source.path, gpt, groups.data_context.group)
    set_layer_plan([gpt], source.plan)
    gpt.eval()
    return Model(config, groups, device, gpt, source.plan, inverse_frequencies(config.model).to(device))


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


def _for_asking(trained: RunConfig, overrides: list[str], start: CheckpointConfig) -> RunConfig:
    """The configuration without what only training needs, in one process unless the overrides say otherwise."""
    plain = dataclasses.replace(
        trained, parallel=ParallelConfig(), checkpoint=start, run=RunDirConfig(), wandb=WandbConfig(), dry_run=False
    )
    config = with_overrides(dataclasses.replace(plain, world_size=None), overrides)
    for key in ("pipeline", "virtual_pipeline"):
        if getattr(config.parallel, key) != 1:
            remedy = "every copy of the model is whole here; spread it with parallel.tensor and parallel.context"
            raise ConfigError(f"parallel.{key}", getattr(config.parallel, key), remedy)
    if config.parallel.sequence:
        raise ConfigError("parallel.sequence", True, "it only saves memory of training; leave it out")
    validate_length = 2 * config.parallel.context
    check_length(config, int(os.environ.get("WORLD_SIZE", "1")), validate_length, "parallel.context")
    return config


def _tokenizer(folder: Path, trained: RunConfig) -> Path | None:
    """The tokenizer kept beside the weights, else the one of the data that the model was trained on."""
    data = [trained.data.path] if trained.data.path is not None else list(trained.data.blend or {})
    candidates = [folder / "tokenizer", *(Path(path) / "tokenizer" for path in data)]
    return next((path for path in candidates if path.is_dir()), None)
