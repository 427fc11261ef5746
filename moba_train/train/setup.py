"""From a RunConfig to everything a training loop holds; every refusal happens in `preflight`, before any process group.

Order: preflight (no process group, no GPU), device, process groups, run folder, model and optimizer, data, checkpoint.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from moba_train import device as devices
from moba_train.attention import flash_library
from moba_train.attention.ops import LARGEST_HEAD_DIM_ON_GPU
from moba_train.config.schema import ConfigError, RunConfig
from moba_train.config.stages import Stage, stages_of
from moba_train.config.validate import min_world_size, validate
from moba_train.data.loader import Loader
from moba_train.data.pretrain import PretrainData, build_datasets
from moba_train.data.sft import RUN_TOKENIZER, SftData, build_sft, check_sft
from moba_train.data.validate import check_data, content_hash
from moba_train.model.build import build_model
from moba_train.model.freeze import check_freeze
from moba_train.model.layer_plan import plan_phases
from moba_train.model.rope import Frequencies, inverse_frequencies
from moba_train.parallel import groups as mesh
from moba_train.parallel.seed import seed_everything
from moba_train.parallel.watchdog import phase
from moba_train.train import checkpoint, checkpoint_folder
from moba_train.train.hf_start import carry_over, check_hf_start, load_hf_start
from moba_train.train.optimizer import build_optimizer, build_scheduler

__all__ = ["Run", "close", "current_stage", "leave_stage", "planned", "preflight", "setup"]

_LOG = logging.getLogger(__name__)


@dataclass
class Run:
    """A run in progress, in one of its stages: `step` optimizer steps are done. frequencies: of the rotary embedding.

    config: that of the stage.
    """

    config: RunConfig
    stage: Stage
    groups: mesh.Groups
    device: torch.device
    folder: Path
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    data: PretrainData | SftData
    loader: Loader
    frequencies: Frequencies
    step: int = 0
    tokens: int = 0


def preflight(config: RunConfig) -> int:
    """The world size this run has, or pretends to have; ConfigError if anything in it cannot work.

    Every stage is looked at. A dry run needs neither data nor checkpoints, so that a recipe can be looked at anywhere.
    """
    stages = stages_of(config)
    at = 0 if config.dry_run else current_stage(stages)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if config.dry_run:
        world_size = config.world_size
        if world_size is None:
            world_size = math.lcm(*(min_world_size(stage.config) for stage in stages))
    else:
        world_size = started
        if config.world_size not in (None, started):
            raise ConfigError(
                "world_size",
                config.world_size,
                f"torchrun started {started} process(es); leave it out, or add dry_run=true to pretend",
            )
    for index, stage in enumerate(stages):
        try:
            _check_stage(stage, world_size, index - at)
        except ConfigError as error:
            if not stage.name:
                raise
            raise ConfigError(error.key, error.value, f"{error.remedy} (in stage {stage.name})") from None
    if not config.dry_run:
        check_hf_start(config)
        here = stages[at].config
        if config.sft.path is None:
            content = content_hash(here.data)
        else:  # last: it may take a while
            vocab_size, length = config.model.vocab_size, config.train.sequence_length
            content = check_sft(config.sft, config.data, vocab_size, length, config.parallel.timeout_s)
        checkpoint_folder.check_content(here, content, stages[at].start)
    return world_size


def current_stage(stages: tuple[Stage, ...]) -> int:
    """Index of the stage that the run begins or goes on in: where the checkpoint that it starts from is; the last one
    at the end of all."""
    first = stages[0].config
    if len(stages) == 1 or (start := checkpoint_folder.find_start(first)) is None:
        return 0
    if checkpoint_folder.loads_weights_only(first, start):
        return 0
    step = checkpoint_folder.read_metadata(start).step
    return next((index for index, stage in enumerate(stages) if step < stage.end), len(stages) - 1)


def _check_stage(stage: Stage, world_size: int, ahead: int) -> None:
    """ahead: stages from the one that the run begins in to this one; what is over needs no data and no checkpoint."""
    config = stage.config
    validate(config, world_size)
    plan_phases(planned(config).attention, config.model.num_layers)
    check_freeze(config)
    if config.dry_run or ahead < 0:
        return
    if config.sft.path is None:
        check_data(config.data, vocab_size=config.model.vocab_size, sequence_length=config.train.sequence_length)
    _check_machine(config)
    if ahead == 0:
        checkpoint_folder.check(config, stage.start)


def _check_machine(config: RunConfig) -> None:
    """What only the machine of the run can tell: its GPUs, and whether the run folder can be written."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if gpus and processes > gpus:
        raise ConfigError("world_size", processes, f"{gpus} GPU(s) here: start at most that many processes a machine")
    for key in ("backend", "full_backend"):
        _check_backend(config, f"attention.{key}", getattr(config.attention, key), bool(gpus))
    if config.run.dir is not None:
        folder = Path(config.run.dir).absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(
                "run.dir", config.run.dir, f"{existing} is not a folder that can be written; choose another"
            )


def _check_backend(config: RunConfig, key: str, name: str, on_gpu: bool) -> None:
    kernels = name in ("triton", "flash", "mixed")
    if kernels and not on_gpu and os.environ.get("TRITON_INTERPRET", "0") == "0":
        raise ConfigError(key, name, "needs a CUDA GPU and there is none here; choose auto")
    limited = name == "triton" or (name == "sdpa" and config.precision != "fp32")
    if on_gpu and limited and config.model.head_dim > LARGEST_HEAD_DIM_ON_GPU:
        most = f"takes head dims up to {LARGEST_HEAD_DIM_ON_GPU} on a GPU, got {config.model.head_dim}"
        raise ConfigError(key, name, f"{most}; choose auto, which warns that another is slow")
    if name in ("flash", "mixed"):
        dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        gpu = torch.cuda.get_device_capability(0)[0] if torch.cuda.is_available() else None
        refusal = flash_library.refusal_early(dtype, config.model.head_dim, gpu)
        if refusal is not None:
            raise ConfigError(key, name, f"{refusal}; choose auto")
    large = config.model.head_dim > LARGEST_HEAD_DIM_ON_GPU
    if config.attention.deterministic and on_gpu and not kernels and (name != "auto" or large):
        who = f"what serves head dim {config.model.head_dim}" if name == "auto" else name
        raise ConfigError(key, name, f"{who} adds gradients by atomics on a GPU; leave attention.deterministic out")


def setup(config: RunConfig, stage: Stage | None = None) -> Run:
    """Build the run on this process, or this stage of it; `preflight` has passed."""
    stage = stage or stages_of(config)[0]
    config = stage.config
    phase("setup: process groups")
    devices.prepare()
    device = devices.local_device()
    groups = mesh.initialize(config.parallel, devices.collective_backend(), device)
    seed_everything(config.train.seed, groups.pipeline.rank)
    folder = _shared_folder(config)
    config = _as_begun(dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder))))

    phase("setup: model")
    chunks = build_model(planned(config), groups, device)
    optimizer = build_optimizer(config, chunks)
    batch = config.train.global_batch_size
    phase("setup: data")
    data = _build_data(config, stage.end - stage.start)
    run = Run(
        config=config,
        stage=stage,
        groups=groups,
        device=device,
        folder=folder,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer),
        data=data,
        loader=Loader(data.train, global_batch_size=batch, dp_rank=groups.data.rank, dp_size=groups.data.size),
        frequencies=inverse_frequencies(config.model, config.train.sequence_length).to(device),
    )
    if isinstance(data, SftData) and groups.world_rank == 0:
        data.tokenizer.save(folder / RUN_TOKENIZER)
    phase("setup: checkpoint")
    if checkpoint.restore(run):
        carry_over(run)
    elif config.checkpoint.init_from_hf is not None:
        load_hf_start(run)
    return run


def planned(config: RunConfig) -> RunConfig:
    """The configuration before anything was measured: no dense last layers where `auto` will choose them."""
    return config.with_dense_last_layers(0) if config.attention.dense_last_layers == "auto" else config


def _as_begun(config: RunConfig) -> RunConfig:
    """A resumed run keeps the dense last layers that `auto` chose when it began."""
    if config.attention.dense_last_layers != "auto":
        return config
    start = checkpoint_folder.find_start(config)
    if start is None or not checkpoint_folder.is_own(config, start):
        return config
    number = checkpoint_folder.read_metadata(start).config["attention"]["dense_last_layers"]
    _LOG.info("attention.dense_last_layers=auto: %d, as when this run began", number)
    return config.with_dense_last_layers(number)


def leave_stage() -> None:
    """Give up the mesh and the memory of a stage whose `Run` is no longer held, for the next one's."""
    phase("end of a stage")
    mesh.leave()
    gc.collect()
    devices.release_memory()


def close() -> None:
    """Leave the process groups; safe when `setup` never finished."""
    mesh.close()


def _build_data(config: RunConfig, steps: int) -> PretrainData | SftData:
    train = config.train
    counts = {
        "sequence_length": train.sequence_length,
        "train_samples": steps * train.global_batch_size,
        "valid_samples": train.validation_batches * train.global_batch_size,
    }
    if config.sft.path is None:
        return build_datasets(config.data, cache_dir=config.data.cache_dir, **counts)
    return build_sft(config.sft, config.data, vocab_size=config.model.vocab_size, **counts)


def _shared_folder(config: RunConfig) -> Path:
    """The run folder, chosen by rank 0 and told to all ranks; ConfigError where it cannot be made after all."""
    folder = [config.run.dir or (_new_folder(config.recipe) if dist.get_rank() == 0 else "")]
    dist.broadcast_object_list(folder)
    path = Path(folder[0]).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run.dir", str(path), f"cannot be made ({error.strerror}); choose another") from None
    return path


def _new_folder(recipe: str) -> str:
    """A folder below runs/ that no run has, made; its name alone where it cannot be made."""
    name = folder = f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while True:
        try:
            Path(folder).mkdir(parents=True)
        except OSError:
            if Path(folder).is_dir():  # of a run begun in the same second
                number += 1
                folder = f"{name}-{number}"
                continue
        return folder
