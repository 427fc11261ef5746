"""Run by test_watchdog.py: ranks add up numbers until one of them does what a case says. One folder of results a case.

Plays torchrun, but loads torch once: it forks the ranks, keeps their store, and ends those left some time after the
first has died.
"""

import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moba_train.parallel.watchdog import Watched, phase

SIZE, GRACE_S = 3, 8
FAULTS = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": lambda: [][1],
    "sleep": lambda: time.sleep(600),
    "none": lambda: None,
}


def await_sign(rank: int, port: int, name: str) -> None:
    """Until this rank's watchdog has written that it is in phase `name`: on a busy machine that can take seconds."""
    store = dist.PrefixStore("watchdog/0", dist.TCPStore("127.0.0.1", port, wait_for_workers=False))
    while json.loads(store.get(str(rank)))["phase"] != name:
        time.sleep(0.05)


def rank_main(rank: int, port: int, fault: str, rank_at_fault: int, timeout_s: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # as a training run, which would save
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with Watched(timeout_s):
        phase("setup")
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        for step in range(1, 4):
            phase(f"step {step}: work")
            time.sleep(0.5)  # beats are as far apart at this timeout
            if step == 3 and rank == rank_at_fault:
                await_sign(rank, port, f"step {step}: work")
                FAULTS[fault]()
            phase(f"step {step}: sum")
            dist.all_reduce(torch.ones(1))
        phase("end")
        dist.barrier()


def fork(log: Path, rank: int, *case) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        rank_main(rank, *case)
        code = 0
    except BaseException as error:
        print(f"rank {rank} raised {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(folder: Path, timeout_s: int, cases: dict[str, int]) -> None:
    begun = time.monotonic()
    ports = {fault: free_port() for fault in cases}
    ranks = {
        fork(folder / f"{fault}.log", rank, ports[fault], fault, at, timeout_s): (fault, rank)
        for fault, at in cases.items()
        for rank in range(SIZE)
    }
    stores = [dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) for port in ports.values()]
    codes: dict[str, dict[int, int]] = {fault: {} for fault in cases}
    died: dict[str, float] = {}
    while any(len(of_fault) < SIZE for of_fault in codes.values()):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            fault, rank = ranks.pop(pid)
            codes[fault][rank] = os.waitstatus_to_exitcode(status)
            if status:
                died.setdefault(fault, time.monotonic() - begun)
        for pid, (fault, _) in ranks.items():
            if fault in died and time.monotonic() - begun > died[fault] + GRACE_S:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    del stores
    (folder / "outcome.json").write_text(json.dumps({"codes": codes, "died": died}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
