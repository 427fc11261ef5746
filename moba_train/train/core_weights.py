"""The weights of a core checkpoint, written and read a tensor at a time, without a model and without a process group.

megatron-core's "torch_dist" format is torch's distributed checkpoint: these files load through dist_checkpointing in
any layout, and what it saved in any layout is read here. Reading one unpickles its `.metadata` (torch's reader does);
tensors are loaded with weights_only. That is for checkpoints that moba_train wrote; nothing of a Hugging Face folder
is ever read this way.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moba_train.config.schema import ModelConfig
from moba_train.model.convert_hf import Rule, core_shape, rules

__all__ = ["CoreWeights", "write_core_weights"]

# Modules of a layer that store an (empty) extra state beside their weight; megatron-core expects them.
_EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class _Part:
    """One tensor to write: a layer of a core tensor, or all of one without layers."""

    rule: Rule
    layer: int


def write_core_weights(
    folder: Path,
    model: ModelConfig,
    dtype_of: Callable[[Rule, int], torch.dtype],
    tensor_of: Callable[[Rule, int], torch.Tensor],
) -> None:
    """Write a checkpoint of weights alone into the existing `folder`. `tensor_of` is asked for one tensor after
    another, layer by layer, and each is written before the next."""
    parts: dict[MetadataIndex, _Part] = {}
    items = []
    for rule, layer in _in_order(model):
        shape = core_shape(rule)
        chunk = _chunk(rule, layer)
        index = MetadataIndex(rule.core, chunk.offsets)
        parts[index] = _Part(rule, layer)
        whole = torch.Size((model.num_layers, *shape) if rule.per_layer else shape)
        data = TensorWriteData(chunk, TensorProperties(dtype=dtype_of(rule, layer)), whole)
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    for layer in range(model.num_layers):
        for module in _EXTRA_STATES:
            name = f"decoder.layers.{module}._extra_state/shard_{layer}_{model.num_layers}"
            items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
    # One thread and one file: items are resolved and written one by one, in this order.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
        dcp.save({}, storage_writer=writer, planner=_StreamingPlanner(items, parts, tensor_of), no_dist=True)
    torch.save({}, folder / "common.pt")  # what is neither a tensor nor sharded: nothing
    save_config(CheckpointingConfig("torch_dist"), str(folder))


class CoreWeights:
    """The weights in a core checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self._reader = dcp.FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored = metadata.state_dict_metadata
        self._stored = {name: of for name, of in stored.items() if isinstance(of, TensorStorageMetadata)}

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """What keeps these from being the weights of `model`: missing, misshapen and additional tensors."""
        found = {name: tuple(stored.size) for name, stored in self._stored.items() if not name.startswith("optimizer.")}
        for rule in rules(model):
            shape = ((model.num_layers,) if rule.per_layer else ()) + core_shape(rule)
            stored = found.pop(rule.core, None)
            if stored is None:
                yield f"the tensor {rule.core} is missing"
            elif stored != shape and not (not rule.per_layer and stored[1:] == shape[1:] and stored[0] > shape[0]):
                yield f"the tensor {rule.core} is {list(stored)}, the model asks for {list(shape)}"
        for name in found:
            yield f"the tensor {name} has no place in a Hugging Face model"

    def dtype(self, rule: Rule) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._stored[rule.core].properties.dtype

    def read(self, rule: Rule, layer: int) -> torch.Tensor:
        """One tensor (of one layer), on the CPU; rows beyond the model's, padding of the vocabulary, are left out."""
        stored, wanted = self._stored[rule.core], _chunk(rule, layer)
        target = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(rule.core, stored, [wanted])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise ValueError(f"the checkpoint holds only a part of {rule.core}, layer {layer}")
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target.view(core_shape(rule))


class _StreamingPlanner(dcp.DefaultSavePlanner):
    """Plans the given items and makes each tensor only when the writer comes to it."""

    def __init__(
        self,
        items: list[WriteItem],
        parts: dict[MetadataIndex, _Part],
        tensor_of: Callable[[Rule, int], torch.Tensor],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._items, self._parts, self._tensor_of = items, parts, tensor_of

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)  # as megatron-core writes it: one a shard
            return empty
        part = self._parts[write_item.index]
        tensor = self._tensor_of(part.rule, part.layer)
        return tensor[None] if part.rule.per_layer else tensor


class _Into(dcp.DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the tensor is a part of the target."""


def _chunk(rule: Rule, layer: int) -> ChunkStorageMetadata:
    """Where the tensor of a layer lies in the core tensor, whose first axis is the layers'."""
    shape = core_shape(rule)
    offsets = (layer, *[0] * len(shape)) if rule.per_layer else (0,) * len(shape)
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size((1, *shape) if rule.per_layer else shape))


def _in_order(model: ModelConfig) -> Iterator[tuple[Rule, int]]:
    """Every core tensor, layer by layer, as shards of a Hugging Face folder have them."""
    found = rules(model)
    first_layered = next(index for index, rule in enumerate(found) if rule.per_layer)
    yield from ((rule, 0) for rule in found[:first_layered])
    yield from ((rule, layer) for layer in range(model.num_layers) for rule in found if rule.per_layer)
    yield from ((rule, 0) for rule in found[first_layered:] if not rule.per_layer)
