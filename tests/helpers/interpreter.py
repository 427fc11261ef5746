"""Tests of Triton's kernels on a CPU: Triton decides at its import whether to interpret, so they run in a process of
their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

__all__ = ["INTERPRETING", "interpreted", "not_interpreted", "run_interpreted"]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_ELSEWHERE = "runs in the process of test_in_interpreter"
interpreted = pytest.mark.skipif(not INTERPRETING, reason=_ELSEWHERE)
not_interpreted = pytest.mark.skipif(INTERPRETING, reason="runs in the process that starts the interpreter's")


def run_interpreted(file: str) -> None:
    """Run the tests of a file again, those marked `interpreted` too."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _ELSEWHERE not in done.stdout, "skipped in both processes"
