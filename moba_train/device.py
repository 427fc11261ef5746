"""The one place that knows cpu from cuda.

megatron-core spells CUDA out in many places. `prepare()` makes it run on a CPU with gloo, once per process and before
anything is built; where CUDA exists it patches nothing. Each patch has its reason:
  - `torch.cuda.current_device()` is used as a device: it answers the CPU device
  - factories with device="cuda" or pin_memory=True, `.cuda()`, `.to("cuda")`: the request is dropped
  - a comparison with the string "torch.cuda.FloatTensor": `Tensor.type()` answers with the cuda name
  - streams, events, synchronisation, statistics: objects and calls that do nothing
  - the CUDA random-state tracker: works on the CPU generator
Functions are patched, not a TorchFunctionMode: a mode is off inside `Tensor.backward()` and in other threads.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import warnings
from typing import Any

import torch
from torch.utils._device import _device_constructors

__all__ = [
    "collective_backend",
    "device_name",
    "local_device",
    "peak_flops",
    "peak_memory_gib",
    "prepare",
    "quiet_imports",
    "release_memory",
    "synchronize",
]

_CPU = torch.device("cpu")
_FACTORIES = [
    "tensor",
    "as_tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
    "randperm",
    "empty_strided",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
]
# Dense bf16 tensor-core peaks without sparsity, FLOP/s, from the vendors' data sheets.
_PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H20": 148e12, "A100": 312e12, "B200": 2250e12}


def prepare() -> None:
    """Make this process ready for megatron-core: the local GPU chosen, or CUDA's names led to the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif not hasattr(torch.cuda, "_moba_train_on_cpu"):
        # One thread a rank unless the user says otherwise: ranks would fight over the cores.
        if "OMP_NUM_THREADS" not in os.environ and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            torch.set_num_threads(1)
        # megatron-core's advice on overlap, which a CPU has no use for.
        warnings.filterwarnings("ignore", message="When using sequence parallelism it is recommended to set")
        _lead_cuda_to_cpu()


def local_device() -> torch.device:
    """This process's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


def collective_backend() -> str:
    """torch.distributed backend for `local_device`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def device_name() -> str:
    """For logs and results: the GPU's name, or the CPU and its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({torch.get_num_threads()} threads)"


def synchronize() -> None:
    """Wait for the device: before reading a host clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """Peak memory in GiB since the last reset: of the GPU's allocator, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def quiet_imports() -> None:
    """Silence exactly those lines of our libraries that no user can act on; call before importing megatron-core."""
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "full scope is deprecated. Use empty cuda_graph",
        "MimoModelConfig is experimental",
        "invalid escape sequence",
        r"The \.grad attribute of a Tensor that is not a leaf Tensor",
        r"`torch\.jit\.script",
    ):
        warnings.filterwarnings("ignore", message=message)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron\.core|torch\.distributed)\.")
    for name, text in (
        ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
        ("distributed.distributed_data_parallel", "full_param_layout not provided"),
        ("dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
        ("rerun_state_machine", "Implicit initialization of Rerun State Machine"),
        ("rerun_state_machine", "RerunStateMachine initialized in mode"),
    ):
        logging.getLogger(f"megatron.core.{name}").addFilter(functools.partial(_lacks, text))


def release_memory() -> None:
    """Give cached memory back and measure its peak anew (GPU only: a process's peak cannot be reset)."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@functools.cache
def peak_flops() -> tuple[float, str]:
    """FLOP/s that MFU is measured against, and where the number is from.

    Known GPUs: the data sheet's dense bf16 rate. Anything else, a CPU too: the best of a few timed matrix products.
    """
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for known, peak in _PEAK_FLOPS.items():
            if known in name:
                return peak, f"{known} data sheet, dense bf16"
    size = 4096 if torch.cuda.is_available() else 1024
    a = torch.randn(size, size, device=local_device())
    best = float("inf")
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        a @ a
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"measured {size}x{size} fp32 matrix product"


def _lacks(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()


class _Nothing(contextlib.nullcontext):
    """Stands for a stream or an event: a context manager whose every method does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _without_cuda(factory: Any) -> Any:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapped


def _lead_cuda_to_cpu() -> None:
    # First: `with torch.device(...)`, as transformers loads models, takes the factories it finds when first used.
    _device_constructors()
    # Before the patches: it imports torch._dynamo, which looks through torch.cuda's names.
    import megatron.core.tensor_parallel.random as mcore_random

    cuda: Any = torch.cuda
    tensor: Any = torch.Tensor
    cuda._moba_train_on_cpu = True
    cuda.current_device = lambda: _CPU
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)  # one object each: dynamo refuses one under two names
    for name in ("Stream", "Event", "stream", "current_stream", "default_stream"):
        setattr(cuda, name, type(name, (_Nothing,), {}))
    for name in _FACTORIES:
        setattr(torch, name, _without_cuda(getattr(torch, name)))

    to, type_of = tensor.to, tensor.type
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.to = lambda self, *args, **kwargs: to(
        self,
        *(_CPU if _is_cuda(a) else a for a in args),
        **{key: _CPU if _is_cuda(value) else value for key, value in kwargs.items()},
    )
    tensor.type = lambda self, *args, **kwargs: (
        type_of(self, *args, **kwargs) if args or kwargs else type_of(self).replace("torch.", "torch.cuda.", 1)
    )

    generator = torch.default_generator
    cuda.manual_seed = generator.manual_seed
    cuda.get_rng_state = lambda device="cuda": generator.get_state()
    cuda.set_rng_state = lambda state, device="cuda": generator.set_state(state)
    random: Any = mcore_random
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: generator.get_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: generator.set_state(state)
    # The tracker's fork() warns when the CPU generator moves inside it; here that is what it is for.
    logging.getLogger(mcore_random.__name__).addFilter(functools.partial(_lacks, "CPU RNG state changed"))
