"""Tests of Triton's kernels on a CPU: Triton decides at its import whether to interpret, so they run in a process of
their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

__all__ = ["INTERPRETING", "interpreted", "needs_no_gpu", "run_interpreted"]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_ELSEWHERE = "runs in the process of test_in_interpreter"
interpreted = pytest.mark.skipif(not INTERPRETING, reason=_ELSEWHERE)
needs_no_gpu = pytest.mark.skipif(INTERPRETING or torch.cuda.is_available(), reason="for the process without a GPU")


def run_interpreted(file: str) -> None:
    """Run the tests of a file again, those marked `interpreted` too."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _ELSEWHERE not in done.stdout, "skipped in both processes"
