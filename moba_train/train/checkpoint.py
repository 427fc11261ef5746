"""Checkpoints by megatron-core's dist_checkpointing: saved in one layout, loaded in another.

What a checkpoint folder holds and which one a run starts from: checkpoint_folder.py.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import queue
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import FileSystemReader

from moba_train.config.schedule import PLAN_KEYS
from moba_train.config.schema import AttentionConfig, ModelConfig, RunConfig, from_dict, to_dict
from moba_train.model.key_conv import KEY_CONV_PREFIX
from moba_train.model.layer_plan import layer_plan
from moba_train.model.rope import describe_rope
from moba_train.parallel.seed import load_random_state, random_state
from moba_train.parallel.watchdog import phase
from moba_train.train.checkpoint_folder import (
    Metadata,
    begins_stage,
    corrupt,
    data_key,
    find_start,
    key_conv_width,
    loads_weights_only,
    outdated,
    point_latest,
    read_metadata,
    write_metadata,
)
from moba_train.train.files import gather_checksums, signals_held

if TYPE_CHECKING:
    from moba_train.train.setup import Run

__all__ = ["load_weights", "restore", "save"]

_LOG = logging.getLogger(__name__)
# What Transformer Engine keeps for fp8 beside weights. Other layers write it for other modules, or none.
_EXTRA_STATE = "_extra_state"


def save(run: Run) -> Path:
    """Write a checkpoint of the present step, then point `latest` at it and drop the oldest beyond keep_last.

    Those that earlier stages ended with stay, and are not counted.
    """
    phase(f"checkpoint of step {run.step}")
    root = run.folder / "checkpoints"
    final, partial = root / _step_name(run.step), root / f"{_step_name(run.step)}.partial"
    if dist.get_rank() == 0:
        for abandoned in root.glob("*.partial"):
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)
    dist.barrier()
    if run.config.parallel.overlap_grad_reduce and run.config.parallel.distributed_optimizer:
        for chunk in run.chunks:  # updated weights are otherwise gathered only when the next forward needs them
            chunk.start_param_sync(force_sync=True)
    state = _sharded_state(run, loading=False)
    # megatron-core 0.19 would otherwise ask for nvidia-resiliency-ext.
    newer = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    # This process waits for its files. megatron-core would tell it of them through a server that imports torch anew.
    filesystem_async._results_queue = queue.Queue()
    with signals_held():
        dist_checkpointing.save(state, str(partial), **({"async_strategy": "mcore"} if newer else {}))
    dist.barrier()
    names = [sorted(file.name for file in partial.iterdir())]  # rank 0's list: a network folder may lag elsewhere
    dist.broadcast_object_list(names)
    manifest = gather_checksums(partial, names[0])
    if dist.get_rank() == 0:
        metadata = Metadata(
            step=run.step,
            tokens=run.tokens,
            data=run.loader.state_dict(),
            config=to_dict(run.config),
            plan=[asdict(layer) for layer in layer_plan(run.config.attention, run.config.model.num_layers, run.step)],
            world_size=run.groups.world_size,
            manifest=manifest,
            rope=describe_rope(run.config.model, run.config.train.sequence_length),
            content=run.data.content,
        )
        write_metadata(partial, metadata)
        if final.exists():  # the same step saved before: out of the way first, removed last
            final.rename(final.with_suffix(".replaced.partial"))
        partial.rename(final)
        point_latest(final)
        # Later steps are left from a run that was started over; only what is older than this one ages.
        ends = {_step_name(step) for step in run.stage.before}
        for old in outdated(final, run.config.checkpoint.keep_last, ends):
            shutil.rmtree(old)
    dist.barrier()
    return final


def restore(run: Run) -> bool:
    """Load the checkpoint this run starts from into its model, optimizer, schedule, data and random state; False where
    there is none."""
    path = find_start(run.config)
    if path is None:
        return False
    metadata = read_metadata(path)
    _verify(path, metadata)
    weights_only = loads_weights_only(run.config, path)
    wanted = _sharded_state(run, loading=True, metadata=metadata, weights_only=weights_only)
    optional = [_EXTRA_STATE]
    if run.config.attention.key_conv > 0 and key_conv_width(metadata) == 0:
        optional.append(KEY_CONV_PREFIX)
        if dist.get_rank() == 0:
            _LOG.info("The checkpoint %s has no key convolution: it starts as the identity.", path)
    models = {_chunk_key(run, index): unwrap_model(chunk) for index, chunk in enumerate(run.chunks)}
    state = _load(path, wanted, models, optional)
    _tell_other_model(run.config, metadata)
    if weights_only:
        run.optimizer.reload_model_params()
        return True
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    begins = begins_stage(run.config, path, metadata, run.stage.start)
    if not begins:
        run.loader.load_state_dict(metadata.data)
    run.step, run.tokens = metadata.step, metadata.tokens
    _tell_other_plan(run.config, metadata)
    if not begins and metadata.content not in ("", run.data.content):
        told = "%s gives other data than the checkpoint was trained on; training goes on at their sample %d."
        _LOG.info(told, data_key(run.config)[0], metadata.data["consumed_samples"])
    if "random" in state:
        load_random_state(state["random"])
    elif dist.get_rank() == 0:
        _LOG.info(
            "Another layout than the checkpoint's: random state starts afresh (nothing in these models draws from it)."
        )
    return True


def load_weights(path: Path, model: MegatronModule, data_context: dist.ProcessGroup) -> None:
    """Load a checkpoint's weights alone into a model of one chunk, from any layout; its files are verified first."""
    _verify(path, read_metadata(path))
    state = {"model": model.sharded_state_dict(metadata=_options(data_context))}
    _load(path, state, {"model": model}, [_EXTRA_STATE])


def _step_name(step: int) -> str:
    return f"step_{step:08d}"


def _load(path: Path, wanted: dict[str, Any], models: dict[str, MegatronModule], optional: list[str]) -> dict[str, Any]:
    """Load what is wanted, and the models' weights into the models.

    optional: parts of names that a model keeps as it has them where the checkpoint lacks them; any other must be there.
    """
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    left_out: dict[str, set[str]] = {}
    for key in models:
        left_out[key] = {
            name
            for name, shard in wanted[key].items()
            if any(part in name for part in optional)
            and (shard.unique_key if isinstance(shard, ShardedObject) else shard.key) not in stored
        }
        wanted[key] = {name: shard for name, shard in wanted[key].items() if name not in left_out[key]}
    state = dist_checkpointing.load(wanted, str(path))
    for key, model in models.items():
        own = model.state_dict() if left_out[key] else {}
        model.load_state_dict(state[key] | {name: own[name] for name in left_out[key]}, strict=True)
    return state


def _verify(path: Path, metadata: Metadata) -> None:
    for name, found in gather_checksums(path, sorted(metadata.manifest)).items():
        if found != metadata.manifest[name]:
            raise corrupt(path, f"{name} is not the file that was saved (its checksum differs)")


def _tell_other_model(config: RunConfig, metadata: Metadata) -> None:
    """Weights of the same shape may be given another rotary embedding, to stretch them: what they had is said."""
    theirs, ours = from_dict(metadata.config["model"], ModelConfig, "model."), config.model
    if (theirs.rope_base, theirs.rope_scaling) != (ours.rope_base, ours.rope_scaling):
        length = metadata.config["train"]["sequence_length"]
        _LOG.info("the checkpoint's rotary embedding was another: %s", metadata.rope or describe_rope(theirs, length))
    if not math.isclose(theirs.norm_epsilon, ours.norm_epsilon, rel_tol=1e-6):
        _LOG.info("model.norm_epsilon was %g in the checkpoint and is now %g", theirs.norm_epsilon, ours.norm_epsilon)


def _tell_other_plan(config: RunConfig, metadata: Metadata) -> None:
    """Layer plan and schedule may change on resume; what changed is said."""
    ours, defaults = (json.loads(json.dumps(to_dict(each))) for each in (config.attention, AttentionConfig()))
    for key in (*PLAN_KEYS, "schedule"):
        theirs = metadata.config["attention"].get(key, defaults[key])
        if theirs != ours[key]:
            _LOG.info("attention.%s was %s until step %d and is now %s", key, theirs, metadata.step, ours[key])


def _sharded_state(
    run: Run, loading: bool, metadata: Metadata | None = None, weights_only: bool = False
) -> dict[str, Any]:
    options = _options(run.groups.data_context.group)
    state: dict[str, Any] = {
        _chunk_key(run, index): unwrap_model(chunk).sharded_state_dict(metadata=options)
        for index, chunk in enumerate(run.chunks)
    }
    if weights_only:
        return state
    weights = dict(state)
    if run.config.train.freeze:
        # Frozen parameters have no state: one tensor over all layers would have holes. Weights stay as they are.
        apart = {**options, "non_homogeneous_layers": True}
        weights = {
            _chunk_key(run, index): unwrap_model(chunk).sharded_state_dict(metadata=apart)
            for index, chunk in enumerate(run.chunks)
        }
    state["optimizer"] = run.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=options)
    if not loading:
        state["scheduler"] = run.scheduler.state_dict()
    ours = to_dict(run.config.parallel)
    if not loading or (
        metadata is not None
        and metadata.world_size == run.groups.world_size
        and _same_layout(metadata.config["parallel"], ours)
    ):
        rank, size = run.groups.world_rank, run.groups.world_size
        state["random"] = ShardedObject("random", random_state(), (size,), (rank,), replica_id=0)
    return state


def _options(data_context: dist.ProcessGroup) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": data_context,
    }


def _same_layout(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    return all(theirs.get(axis) == ours[axis] for axis in ("tensor", "pipeline", "virtual_pipeline", "context"))


def _chunk_key(run: Run, index: int) -> str:
    return "model" if len(run.chunks) == 1 else f"model{index}"
