"""Run a function on several ranks, each its own process, and bring back results or the first failing traceback.

`fn(rank, world_size, *args)` must live at the top of a module and return something picklable. On a CPU ranks are forks
of a server that has imported what they all need (preload.py) and runs no thread, so a rank costs a fraction of a
second; with GPUs, which do not survive a fork, each is a new interpreter. `run_script` runs a script of the repository
in such a fork.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["run_distributed", "run_script"]

_PRELOAD = ["tests.helpers.preload"]


def run_distributed(fn: Callable, world_size: int, *args: Any, timeout: float = 120, backend: str = "gloo") -> list:
    """The results of `fn(rank, world_size, *args)`, by rank, with a default group of `backend` initialised.

    With "nccl" every rank has a GPU of its own as its current device.

    Raises AssertionError with the failing ranks' tracebacks, or naming the ranks still running at the timeout.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = _context(backend)
        environment = dict(os.environ)  # the server has that of its own start
        processes = [
            context.Process(target=_rank_main, args=(fn, rank, world_size, args, folder, timeout, backend, environment))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def run_script(command: list[str], *, cwd: Path, env: dict[str, str], **unused: Any) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)`, imports done."""
    with tempfile.TemporaryDirectory() as folder:
        process = _context("gloo").Process(target=_script_main, args=(command[1:], cwd, env, folder))
        process.start()
        process.join()
        said = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(command, process.exitcode or 0, *said)


def _script_main(arguments: list[str], cwd: Path, env: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


def _context(backend: str) -> SpawnContext | ForkServerContext:
    if backend == "nccl":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _wait(processes: list, folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        dead = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if dead:
            time.sleep(0.5)  # a failing rank takes others down with it: let the first cause be written
            raise AssertionError(_report(processes, folder))
        if time.monotonic() > deadline:
            running = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise AssertionError(f"ranks {running} still running after {timeout} s\n{_report(processes, folder)}")
        time.sleep(0.02)
    if any(process.exitcode for process in processes):
        raise AssertionError(_report(processes, folder))


def _report(processes: list, folder: Path) -> str:
    failures = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    texts = [f"rank {path.stem} failed:\n{path.read_text()}" for path in failures]
    stacks = [path for path in sorted(folder.glob("*.stack")) if path.stat().st_size]
    texts += [f"rank {path.stem} hung at:\n{path.read_text()}" for path in stacks]
    codes = [process.exitcode for process in processes]
    return "\n".join([*texts, f"exit codes by rank: {codes}"])


def _rank_main(
    fn: Callable,
    rank: int,
    world_size: int,
    args: tuple,
    folder: str,
    timeout: float,
    backend: str,
    environment: dict[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    # A rank that hangs says where, shortly before the parent ends it.
    stack = (Path(folder) / f"{rank}.stack").open("w")
    faulthandler.dump_traceback_later(0.7 * timeout, file=stack)
    try:
        if backend != "nccl":
            _check_single_thread(os.getppid())
        store = dist.FileStore(f"{folder}/store", world_size)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        result = fn(rank, world_size, *args)
        (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.barrier()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        _leave(1)
    _leave(0)


def _check_single_thread(server: int) -> None:
    threads = Path(f"/proc/{server}/task")
    if threads.is_dir() and len(list(threads.iterdir())) > 1:
        raise RuntimeError("the server that ranks are forked from runs threads, whose locks the ranks inherit")


def _leave(code: int) -> None:
    # Tearing gloo's threads down at interpreter exit aborts now and then; the result is on disk already.
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():  # a checkpoint's writers; they would outlive this exit
        child.kill()
    os._exit(code)
