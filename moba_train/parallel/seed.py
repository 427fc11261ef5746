"""Random state: seeding every rank, and saving and restoring what it has drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

__all__ = ["load_random_state", "random_state", "seed_everything"]


def seed_everything(seed: int, pipeline_rank: int) -> None:
    """Same seed on data, tensor and context ranks, another per pipeline stage; megatron-core adds the tensor rank
    where ranks must differ."""
    seed += 100 * pipeline_rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def random_state() -> dict[str, Any]:
    """All generators of this rank, as tensors and plain values that a checkpoint can hold."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def load_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
