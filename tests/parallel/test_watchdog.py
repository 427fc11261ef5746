"""Who is missing is told by rank and phase, the run ends with an error in time, and a slow run is left alone."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moba_train.parallel.watchdog import Sign, Watch

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S, START_S = 10, 20  # the second: to fork and connect on a busy machine
# fault, rank, and what is said of it
FAULTS = {
    "stop": (2, r"Rank 2 \(\S+\) gave no sign of life for \d+ s, last in 'step 3: work'"),
    "kill": (1, r"Rank 1 \(\S+\) gave no sign of life for \d+ s, last in 'step 3: work'"),
    "raise": (0, r"Rank 0 \(\S+\) failed in 'step 3: work': IndexError: list index out of range"),
    "sleep": (1, r"Rank 1 \(\S+\) did not move for \d+ s, last in 'step 3: work' at .*watched_program.py:\d+ "),
    "none": (0, None),
}


def watch(size=4, limit_s=100, notice_s=10):
    return Watch(list(range(size)), limit_s, notice_s, now=0)


def signs(*phases, beat, **changes):
    found = {rank: Sign(beat=beat, phases=count, phase=f"phase {count}") for rank, count in enumerate(phases)}
    return found | {int(rank[1:]): replace(found[int(rank[1:])], **change) for rank, change in changes.items()}


def test_ranks_that_move_together_are_left_alone_however_long_it_takes():
    watched = watch()
    for second in range(1, 1000):
        watched.update(signs(*[second // 90] * 4, beat=second), now=second)
        assert watched.verdict() is None
        assert watched.notice() is None


def test_a_long_common_phase_is_told_once_and_not_ended():
    watched, said = watch(), []
    for second in range(1, 1000):
        watched.update(signs(7, 7, 7, 7, beat=second), now=second)
        assert watched.verdict() is None
        said += [text for text in [watched.notice()] if text]
    assert len(said) == 1
    assert "ranks 0-3 in 'phase 7'" in said[0]


def test_a_rank_that_falls_silent_is_noticed_and_then_ends_the_run():
    watched = watch()
    verdicts = {}
    for second in range(1, 160):
        changes = {"r2": {"beat": min(second, 40)}}
        watched.update(signs(5, 5, 5, 5, beat=second, **changes), now=second)
        notice, verdicts[second] = watched.notice(), watched.verdict()
        assert (notice is not None) == (second in (51, 102))  # silent; nothing moves
    assert verdicts[140] is None
    assert "Rank 2 (?) gave no sign of life for 101 s, last in 'phase 5'" in verdicts[141]
    assert "ranks 0-1, 3 in 'phase 5'" in verdicts[141]


def test_a_rank_behind_the_others_ends_the_run_counted_from_when_they_went_on():
    watched = watch()
    verdicts = {}
    for second in range(1, 400):
        front = 5 if second < 200 else 6  # a long phase that rank 1 alone does not finish
        watched.update(signs(front, 5, front, front, beat=second), now=second)
        verdicts[second] = watched.verdict()
    assert verdicts[300] is None
    assert "Rank 1 (?) did not move for 300 s, last in 'phase 5'" in verdicts[301]


def test_a_rank_that_is_done_or_catches_up_is_not_missed():
    watched = watch(2)
    for second in range(1, 400):
        done = {"r0": {"done": True, "beat": min(second, 10)}}
        watched.update(signs(9, second // 90, beat=second, **done), now=second)
        assert watched.verdict() is None


def test_a_rank_that_never_starts_is_named():
    watched = watch(3)
    for second in range(1, 110):
        found = signs(1, 1, 1, beat=second)
        del found[1]
        watched.update(found, now=second)
    assert "Rank 1 (?) gave no sign of life for 109 s, last in no phase: it has not started" in watched.verdict()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Per fault the exit codes by rank, seconds until the first rank ended, and what the ranks printed."""
    folder = tmp_path_factory.mktemp("watchdog")
    cases = json.dumps({fault: rank for fault, (rank, _) in FAULTS.items()})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/parallel/watched_program.py"), str(folder), str(TIMEOUT_S), cases]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=150, check=True)
    outcome = json.loads((folder / "outcome.json").read_text())
    logs = {fault: (folder / f"{fault}.log").read_text() for fault in FAULTS}
    return {fault: (outcome["codes"][fault], outcome["died"].get(fault), logs[fault]) for fault in FAULTS}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_by_rank_and_phase_and_ends_the_run(outcomes, fault):
    codes, died, text = outcomes[fault]
    said = [line for line in text.splitlines() if line.startswith("[watchdog]")]
    rank, expected = FAULTS[fault]
    if expected is None:
        assert set(codes.values()) == {0}, text
        assert said == [], text
        return
    assert any(re.search(expected, line) for line in said), text
    assert sum("Ending the run" in line or "failed in" in line for line in said) == 1, text
    others = {code for other, code in codes.items() if other != str(rank)}
    assert others == {1}, (codes, text)  # of their own accord, before anyone killed them
    assert died < START_S + TIMEOUT_S + 2, text


@pytest.mark.parametrize("parent", [0, 2**22 + 1])  # none, as of a container's first process; and one that has gone
def test_the_process_ends_whatever_its_parent_is(parent):
    program = f"import os\nfrom moba_train.parallel import watchdog\nos.getppid = lambda: {parent}\nwatchdog._leave()\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"MASTER_PORT": "1"}, timeout=60)
    assert done.returncode == 1
