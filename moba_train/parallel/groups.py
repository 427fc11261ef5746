"""Process groups of a run: the only reader of megatron-core's parallel_state.

`axis` is a process-mesh axis: tensor, pipeline, context, data. Everything else gets groups and ranks as arguments.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from moba_train.config.schema import ParallelConfig

__all__ = ["Axis", "Groups", "close", "initialize", "leave"]


@dataclass(frozen=True)
class Axis:
    """One mesh axis as this process sees it."""

    group: dist.ProcessGroup
    rank: int
    size: int


@dataclass(frozen=True)
class Groups:
    """The mesh of a run. `data_context` spans data and context ranks: gradients and losses are summed over it."""

    tensor: Axis
    pipeline: Axis
    context: Axis
    data: Axis
    data_context: Axis
    world_rank: int
    world_size: int

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the first pipeline stage."""
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the last pipeline stage, which computes the loss."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def last_stage_rank(self) -> int:
        """World rank of the last stage of this process's pipeline."""
        return dist.get_process_group_ranks(self.pipeline.group)[-1]


def initialize(parallel: ParallelConfig, backend: str, device: torch.device) -> Groups:
    """Join the process group that torchrun's environment describes and build megatron-core's mesh on it.

    Started without torchrun, this process is a world of its own.
    """
    if not dist.is_initialized():
        alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(
            backend,
            timeout=_collective_timeout(parallel),
            device_id=device if device.type == "cuda" else None,
            **alone,
        )
    levels = [parallel.context_inner, parallel.context // parallel.context_inner]  # neighbours, then across them
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        hierarchical_context_parallel_sizes=levels if parallel.context_inner > 1 else None,
        distributed_timeout_minutes=_collective_timeout(parallel) // datetime.timedelta(minutes=1),
    )
    return Groups(
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        context=_axis(parallel_state.get_context_parallel_group()),
        data=_axis(parallel_state.get_data_parallel_group()),
        data_context=_axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        world_rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )


def leave() -> None:
    """Give up the mesh and keep the process group, for another mesh in the same run; call it on every rank."""
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):  # torch keeps no public list of them
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def close() -> None:
    """Leave the mesh and the process group."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _collective_timeout(parallel: ParallelConfig) -> datetime.timedelta:
    """Whole minutes, at least one more than the watchdog's: it says who is missing before a collective gives up."""
    return datetime.timedelta(minutes=-(-parallel.timeout_s // 60) + 1)


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group, dist.get_rank(group), dist.get_world_size(group))
