"""The helper that runs tests on several ranks: a failing or hanging rank is told and leaves nothing behind."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.spawn import run_distributed


def _surroundings(rank: int, world_size: int) -> tuple[str, int, int]:
    return os.environ["MOBA_TRAIN_TEST"], threading.active_count(), os.getppid()


def _fail_or_hang(rank: int, world_size: int, pids: Path, fails: bool) -> None:
    (pids / str(os.getpid())).touch()
    if rank == 1 and fails:
        raise KeyError("the cause")
    if rank == 1:
        time.sleep(600)


def test_ranks_have_the_callers_environment_and_start_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBA_TRAIN_TEST", "as it is now")
    found = run_distributed(_surroundings, 2)
    (server,) = {parent for _, _, parent in found}
    assert server != os.getpid()
    assert [(text, threads) for text, threads, _ in found] == [("as it is now", 1)] * 2
    assert psutil.Process(server).num_threads() == 1


@pytest.mark.parametrize(
    "fails, said", [(True, "rank 1 failed:.*KeyError: 'the cause'"), (False, "rank 1 hung at:.*_fail_or_hang")]
)
def test_a_rank_that_fails_or_hangs_is_told_and_all_are_ended(tmp_path: Path, fails: bool, said: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s){said}"):
        run_distributed(_fail_or_hang, 2, tmp_path, fails, timeout=10)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10  # the server reaps them in its own time
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
