"""The round trip from beginning to end, with the smallest of everything."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from experiments import common
from experiments.roundtrip_1b import run as roundtrip
from tests.helpers.spawn import run_script
from tests.helpers.training import corpus


@pytest.mark.timeout(600)
def test_in_trained_out_and_in_again_and_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        common.subprocess, "run", lambda command, **given: run_script(command, env=dict(os.environ), **given)
    )
    data, out = corpus(tmp_path / "data"), tmp_path / "out"
    smallest = ["--quick", "--steps", "2", "--out", str(out), "--data", str(data)]
    command = ["experiments/roundtrip_1b/run.py", *smallest, "train.sequence_length=256", "metrics.gate_every=0"]
    monkeypatch.setattr(sys, "argv", command)
    assert roundtrip.main() == 0
    page = (out / "results.md").read_text()
    assert "| imported and exported: equal | 38 tensors in 2 shards, bit by bit |" in page
    assert "| trained, exported, imported: equal | 26 core tensors, bit by bit |" in page
    assert "| steps | 2 |" in page
    assert "Data: the folder data; " in page
    assert "weights differ from the source's | 0 of" not in page
    monkeypatch.setattr(sys, "argv", [*command, "optim.learning_rate=1e-5"])
    with pytest.raises(SystemExit, match=r"was started with other settings \(optim\.learning_rate=1e-5\)"):
        roundtrip.main()
