"""Checkpoints by megatron-core's dist_checkpointing: saved in one layout, loaded in another.

    run.dir/checkpoints/step_00000100/   sharded weights, optimizer, schedule, random state; moba_train.json beside them
    run.dir/checkpoints/latest           name of the newest complete checkpoint, written last and atomically

moba_train.json holds the resolved configuration, the layer plan, the step and the data position, and a manifest (size
and CRC-32 of every file), so that a truncated or altered file is named before anything is loaded from it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import shutil
import signal
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.utils import unwrap_model

from moba_train.config.schedule import PLAN_KEYS
from moba_train.config.schema import AttentionConfig, ConfigError, RunConfig, to_dict
from moba_train.model.key_conv import KEY_CONV_PREFIX
from moba_train.model.layer_plan import layer_plan
from moba_train.parallel.seed import load_random_state, random_state

if TYPE_CHECKING:
    from moba_train.train.setup import Run

__all__ = ["CheckpointError", "Metadata", "check", "find_start", "read_metadata", "restore", "save"]

_LOG = logging.getLogger(__name__)
_METADATA = "moba_train.json"
# What must be equal for a checkpoint's weights to fit; rope, init and implementation may change.
_SHAPE = [
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "qk_norm",
    "tie_embeddings",
]


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read: which file, and where else to start from."""


@dataclass(frozen=True)
class Metadata:
    """What moba_train.json says. manifest: file name -> [size in bytes, CRC-32]."""

    step: int
    tokens: int
    data: dict[str, Any]
    config: dict[str, Any]
    plan: list[dict[str, Any]]
    world_size: int
    manifest: dict[str, list[int]]


def find_start(config: RunConfig) -> Path | None:
    """The checkpoint this run starts from: its own latest when resuming, else `checkpoint.load`, else none."""
    if config.checkpoint.resume and config.run.dir is not None:
        own = _latest(Path(config.run.dir) / "checkpoints")
        if own is not None:
            return own
    if config.checkpoint.load is None:
        return None
    path = Path(config.checkpoint.load)
    for folder in (path / "checkpoints", path):
        if (found := _latest(folder)) is not None:
            return found
    if (path / _METADATA).is_file():
        return path
    raise ConfigError(
        "checkpoint.load",
        str(path),
        "no checkpoint there; give a run folder, its checkpoints folder, or one step folder",
    )


def check(config: RunConfig) -> None:
    """Refuse a start that cannot work, without a process group: unreadable, truncated, or of another model shape."""
    path = find_start(config)
    if path is None:
        return
    metadata = read_metadata(path)
    for name, (size, _) in metadata.manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise _corrupt(path, f"{name} should have {size} bytes and is {found}")
    _check_position(config, path, metadata)
    _check_key_conv(config, path, metadata)
    for key in _SHAPE:
        theirs, ours = metadata.config["model"].get(key), getattr(config.model, key)
        if theirs != ours:
            raise ConfigError(
                f"model.{key}",
                ours,
                f"the checkpoint {path} has {theirs}; choose the same model, or another checkpoint",
            )


def _check_key_conv(config: RunConfig, path: Path, metadata: Metadata) -> None:
    """Learned convolutions are never dropped; missing ones start as the identity, with a fresh optimizer."""
    theirs, ours = _key_conv(metadata), config.attention.key_conv
    if theirs not in (0, ours):
        raise ConfigError("attention.key_conv", ours, f"the checkpoint {path} was trained with {theirs}; use it")
    if theirs != ours and not _weights_only(config, path):
        remedy = (
            f"the checkpoint {path} has none; begin with its weights, the convolution as identity, in a new run: "
            "checkpoint.load_weights_only=true with checkpoint.load"
        )
        raise ConfigError("attention.key_conv", ours, remedy)


def _key_conv(metadata: Metadata) -> int:
    return metadata.config["attention"].get("key_conv", 0)


def _is_own(config: RunConfig, path: Path) -> bool:
    return config.run.dir is not None and path.is_relative_to(Path(config.run.dir))


def _weights_only(config: RunConfig, path: Path) -> bool:
    return config.checkpoint.load_weights_only and not _is_own(config, path)


def _check_position(config: RunConfig, path: Path, metadata: Metadata) -> None:
    """A full load takes over optimizer and data position: what they depend on must be the checkpoint's."""
    if _weights_only(config, path):
        return
    fresh = "use it, or start from the weights alone: checkpoint.load_weights_only=true with checkpoint.load"
    if not _is_own(config, path) and metadata.step >= config.train.steps:
        more = f"the checkpoint {path} is at step {metadata.step} already; ask for more steps"
        raise ConfigError("train.steps", config.train.steps, more)
    for key in ("parallel.distributed_optimizer", "train.global_batch_size", "train.sequence_length", "data.mode"):
        section, name = key.split(".")
        theirs, ours = metadata.config[section].get(name), getattr(getattr(config, section), name)
        if theirs != ours:
            raise ConfigError(key, ours, f"the checkpoint {path} was trained with {theirs}; {fresh}")


def read_metadata(path: Path) -> Metadata:
    """moba_train.json of a checkpoint folder; CheckpointError when it is missing or damaged."""
    try:
        return Metadata(**json.loads((path / _METADATA).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _corrupt(path, f"{_METADATA}: {error}") from None


def save(run: Run) -> Path:
    """Write a checkpoint of the present step, then point `latest` at it and drop the oldest beyond keep_last."""
    root = run.folder / "checkpoints"
    final, partial = root / f"step_{run.step:08d}", root / f"step_{run.step:08d}.partial"
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
    with _signals_held():
        dist_checkpointing.save(state, str(partial), **({"async_strategy": "mcore"} if newer else {}))
    dist.barrier()
    names = [sorted(file.name for file in partial.iterdir())]  # rank 0's list: a network folder may lag elsewhere
    dist.broadcast_object_list(names)
    manifest = _gather_checksums(partial, names[0])
    if dist.get_rank() == 0:
        metadata = Metadata(
            step=run.step,
            tokens=run.tokens,
            data=run.loader.state_dict(),
            config=to_dict(run.config),
            plan=[asdict(layer) for layer in layer_plan(run.config.attention, run.config.model.num_layers, run.step)],
            world_size=run.groups.world_size,
            manifest=manifest,
        )
        _write_durably(partial / _METADATA, json.dumps(asdict(metadata), indent=1))
        if final.exists():  # the same step saved before: out of the way first, removed last
            final.rename(final.with_suffix(".replaced.partial"))
        partial.rename(final)
        _write_durably(root / "latest", final.name)
        # Later steps are left from a run that was started over; only what is older than this one ages.
        older = [path for path in _complete(root) if path.name < final.name]
        for old in older[: len(older) - (run.config.checkpoint.keep_last - 1)]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def restore(run: Run) -> None:
    """Load the checkpoint this run starts from, if any, into its model, optimizer, schedule, data and random state."""
    path = find_start(run.config)
    if path is None:
        return
    metadata = read_metadata(path)
    names = sorted(metadata.manifest)
    for name, found in _gather_checksums(path, names).items():
        if found != metadata.manifest[name]:
            raise _corrupt(path, f"{name} is not the file that was saved (its checksum differs)")
    weights_only = _weights_only(run.config, path)
    wanted = _sharded_state(run, loading=True, metadata=metadata, weights_only=weights_only)
    starts_convolution = run.config.attention.key_conv > 0 and _key_conv(metadata) == 0
    if starts_convolution:
        # Exactly these keys are not there to be loaded; any other that is missing still fails.
        for index in range(len(run.chunks)):
            weights = wanted[_chunk_key(run, index)]
            wanted[_chunk_key(run, index)] = {k: v for k, v in weights.items() if KEY_CONV_PREFIX not in k}
        if dist.get_rank() == 0:
            _LOG.info("The checkpoint %s has no key convolution: it starts as the identity.", path)
    state = dist_checkpointing.load(wanted, str(path))
    for index, chunk in enumerate(run.chunks):
        model = unwrap_model(chunk)
        weights = state[_chunk_key(run, index)]
        if starts_convolution:
            weights |= {k: v for k, v in model.state_dict().items() if KEY_CONV_PREFIX in k}
        model.load_state_dict(weights, strict=True)
    if weights_only:
        run.optimizer.reload_model_params()
        return
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    run.loader.load_state_dict(metadata.data)
    run.step, run.tokens = metadata.step, metadata.tokens
    _tell_other_plan(run.config, metadata)
    if "random" in state:
        load_random_state(state["random"])
    elif dist.get_rank() == 0:
        _LOG.info(
            "Another layout than the checkpoint's: random state starts afresh (nothing in these models draws from it)."
        )


def _tell_other_plan(config: RunConfig, metadata: Metadata) -> None:
    """Layer plan and schedule may change on resume; what changed is said."""
    ours, defaults = (json.loads(json.dumps(to_dict(each))) for each in (config.attention, AttentionConfig()))
    for key in (*PLAN_KEYS, "schedule"):
        theirs = metadata.config["attention"].get(key, defaults[key])
        if theirs != ours[key]:
            _LOG.info("attention.%s was %s until step %d and is now %s", key, theirs, metadata.step, ours[key])


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """SIGTERM and SIGINT wait until after: a signal to the whole process group must not end the writers' processes,
    which inherit the mask."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _sharded_state(
    run: Run, loading: bool, metadata: Metadata | None = None, weights_only: bool = False
) -> dict[str, Any]:
    options = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": run.groups.data_context.group,
    }
    state: dict[str, Any] = {
        _chunk_key(run, index): unwrap_model(chunk).sharded_state_dict(metadata=options)
        for index, chunk in enumerate(run.chunks)
    }
    if weights_only:
        return state
    state["optimizer"] = run.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=options)
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


def _same_layout(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    return all(theirs.get(axis) == ours[axis] for axis in ("tensor", "pipeline", "virtual_pipeline", "context"))


def _chunk_key(run: Run, index: int) -> str:
    return "model" if len(run.chunks) == 1 else f"model{index}"


def _gather_checksums(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """[size, CRC-32] of every file, the work shared among ranks; the same on all."""
    mine = {name: _checksum(folder / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    parts: list[dict[str, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


def _checksum(file: Path) -> list[int]:
    size, crc = 0, 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def _latest(root: Path) -> Path | None:
    marker = root / "latest"
    if not marker.is_file():
        return None
    path = root / marker.read_text().strip()
    if not path.is_dir():
        raise _corrupt(path, "the folder that `latest` names is missing")
    return path


def _complete(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step_*") if path.suffix != ".partial")


def _write_durably(path: Path, text: str) -> None:
    """Write and rename, so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _corrupt(path: Path, what: str) -> CheckpointError:
    others = [other.name for other in _complete(path.parent) if other != path]
    instead = (
        f"start from another: checkpoint.resume=false checkpoint.load={path.parent / others[-1]}"
        if others
        else "there is no other one beside it"
    )
    return CheckpointError("checkpoint", str(path), f"corrupt: {what}; {instead}")
