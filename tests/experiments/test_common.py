"""Trainings side by side: what runs, what is left alone, what is told; where numbers come from."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from experiments import common
from experiments.common import Training, environment, provenance, train_all, without_folder

# Trains to the step that `stop_at` says, once; or fails; or waits to be told to stop.
SCRIPT = """
import json, os, pathlib, signal, sys, time
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(given["run.dir"])
with (folder / "calls").open("a") as calls:
    calls.write("x")
if given.get("mode") == "fail":
    sys.exit("no such thing")
if given.get("mode") == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (folder / "ready").touch()
    time.sleep(60)
step = int(given["steps"])
(folder / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
(folder / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.0, "validation_loss": 1.0}) + "\\n")
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "checkpoints" / "latest").write_text(f"step_{step:08d}")
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return str(path)


def test_trainings_are_dealt_to_the_gpus_that_may_be_used(
    tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert common.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert common.gpus() == ["5", "3"]
    trainings = [Training(tmp_path / f"dealt{i}", script, ["steps=9"], 9) for i in range(4)]
    train_all(trainings, at_once=4)
    assert sorted((training.folder / "gpu").read_text() for training in trainings) == ["3", "3", "5", "5"]
    spread = Training(tmp_path / "spread", script, ["steps=9"], 9)
    train_all([spread], at_once=1, processes=2)
    assert (spread.folder / "gpu").read_text() == "5,3"


def test_long_documents_are_prepared_once_and_leave_no_file_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    really_run = common.run

    def run(command: list[object]) -> None:
        ran.append(str(command[0]))
        if command[0] != "launch/prepare_data.py":
            really_run(command)
            return
        rows = [json.loads(line) for line in Path(str(command[4])).read_text().splitlines()]
        assert sum(len(row["text"]) for row in rows) <= 1.5e6
        assert max(len(row["text"]) for row in rows) >= 100_000
        folder = Path(str(command[2]))
        folder.mkdir()
        (folder / "dataset.json").touch()

    monkeypatch.setattr(common, "run", run)
    mine = tmp_path / "long.jsonl"
    mine.write_text("mine")
    for _ in range(2):
        assert common.prepared_long(str(tmp_path / "long"), 1.5, 100_000) == tmp_path / "long"
    assert ran == ["experiments/documents.py", "launch/prepare_data.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long", "long.jsonl"]
    assert mine.read_text() == "mine"


def calls(training: Training) -> int:
    return len((training.folder / "calls").read_text())


def test_what_is_finished_is_left_alone_and_a_failure_stops_no_other(
    tmp_path: Path, script: str, capsys: pytest.CaptureFixture
) -> None:
    good = [Training(tmp_path / f"good{i}", script, ["steps=9"], 9) for i in range(3)]
    bad = Training(tmp_path / "bad", script, ["mode=fail"], 9)
    for _ in range(2):
        with pytest.raises(SystemExit, match="not finished: bad;"):
            train_all([good[0], bad, *good[1:]], at_once=2)
    assert [calls(training) for training in (*good, bad)] == [1, 1, 1, 2]
    assert "no such thing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"other settings \(steps=8, steps=9\)"):
        train_all([Training(tmp_path / "good0", script, ["steps=8"], 8)], at_once=1)


def test_told_to_stop_it_stops_its_trainings_and_goes_on_later(tmp_path: Path, script: str) -> None:
    training = Training(tmp_path / "long", script, ["mode=wait", "steps=9"], 9)

    def stop() -> None:
        while not (training.folder / "ready").exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit, match="the same command goes on"):
        train_all([training], at_once=1)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert calls(training) == 1


def test_a_page_names_no_folder_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["/home/me/experiments/some/run.py", "--hf", "/home/me/smol", "optim.epsilon=1e-8"]
    )
    told = environment([], ["data.path=/home/me/data", "train.steps=9"], quick=False)
    page = "\n".join(provenance(json.loads(json.dumps(told))))
    assert "/home" not in page
    assert "python -m experiments.some.run --hf smol optim.epsilon=1e-8" in page
    assert "the Python standard library" in page
    assert told["setting"] == ["train.steps=9"]


def test_sources_of_packages() -> None:
    assert common.inputs([]) == []
    assert [Path(path).name for path in common.inputs(["numpy", "torch"])] == ["--input", "numpy", "torch"]
    with pytest.raises(SystemExit, match="no_such_package is not installed"):
        common.inputs(["no_such_package"])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/somewhere/runs", "runs"),
        ("data.cache_dir=/somewhere/cache", "data.cache_dir=cache"),
        ("train.steps=3", "train.steps=3"),
        ("runs/here", "runs/here"),
    ],
)
def test_nobodys_folders_are_told(given: str, kept: str) -> None:
    assert without_folder(given) == kept
