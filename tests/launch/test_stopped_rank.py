"""A rank of a real run that is stopped in the middle: named with its phase, and the run over within the timeout.

With two GPUs there the run is on NCCL.
"""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import psutil

from tests.helpers.training import corpus
from tests.launch.test_pretrain import PRETRAIN, TORCHRUN, finish, start, wait_for_steps

TIMEOUT_S = 20  # ranks that start on a busy machine are seconds apart


def test_a_rank_stopped_in_the_middle_ends_the_run_in_time_and_is_named(tmp_path: Path) -> None:
    data, run = corpus(tmp_path / "data"), tmp_path / "run"
    limits = [f"parallel.timeout_s={TIMEOUT_S}", "train.steps=50000"]
    process = start(*TORCHRUN, *PRETRAIN, f"data.path={data}", f"run.dir={run}", *limits)
    wait_for_steps(run, 3, process)
    time.sleep(TIMEOUT_S / 10)  # two signs of life, each with where the rank is
    ranks = psutil.Process(process.pid).children()
    (second,) = [rank for rank in ranks if rank.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGSTOP)
    stopped = told = time.monotonic()
    lines = []
    for line in process.stdout:  # to its end; the report is timed, not how long torchrun takes to go afterwards
        lines.append(line)
        if "Ending the run" in line:
            told = time.monotonic()
    code, _ = finish(process, timeout=30)
    text = "".join(lines)
    assert code != 0, text
    said = [line for line in text.splitlines() if line.startswith("[watchdog]") and "Ending the run" in line]
    assert len(said) == 1, text
    assert re.search(r"Rank 1 \(\S+\) gave no sign of life for \d+ s, last in 'step \d+: [^']+'", said[0]), text
    assert "The others: rank 0 in 'step " in said[0]
    assert told - stopped < TIMEOUT_S + 5, text
