"""The launch scripts as a person uses them: torchrun and plain python, signals, resume, messages and exit codes."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moba_train.config.compose import compose, group_options
from moba_train.config.validate import min_world_size
from moba_train.train.loop import pretrain
from moba_train.train.metrics import read_metrics
from tests.helpers.training import SMALL, corpus

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PRETRAIN = ["launch/pretrain.py", *SMALL]
KEYS = {
    *("step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "tflops_per_gpu", "mfu"),
    "memory_gib",
}


def start(*command: str) -> subprocess.Popen:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "COLUMNS": "120"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 150) -> tuple[int, str]:
    try:
        text, _ = process.communicate(timeout=timeout)
    finally:
        # torchrun's workers have sessions of their own and would outlive it.
        for orphan in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            orphan.kill()
        process.kill()
    return process.returncode, text


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder)) < steps:
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"no {steps} steps in time:\n{finish(process)[1]}")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("launch") / "data")


def test_two_ranks_stop_on_sigterm_and_resume_to_the_end(data, tmp_path):
    run = tmp_path / "run"
    command = [
        *TORCHRUN,
        *PRETRAIN,
        f"data.path={data}",
        f"run.dir={run}",
        "parallel.context=2",
        "train.sequence_length=127",
        "train.validate_every=2",
        "metrics.gate_every=2",
    ]
    process = start(*command, "train.steps=5000")
    wait_for_steps(run, 3, process)
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal or a batch system does it: to every process of the job
    _, text = finish(process)
    assert "Stopped by SIGTERM" in text
    marker = (run / "checkpoints" / "latest").read_text()
    stopped = int(marker.removeprefix("step_"))
    assert stopped >= 2

    code, text = finish(start(*command, f"train.steps={stopped + 3}", "wandb.mode=offline"))
    assert code == 0, text
    assert f"going on from step {stopped}" in text
    for line in (
        "rows of 127 tokens are padded to 128",
        "validation loss, nats per byte",
        "a unigram model",
        "peak memory",
        "loss.png",
        "loss_by_position.png",
        "gate.png",
    ):
        assert line in text
    assert "Traceback" not in text
    assert "Warning" not in text
    pictures = {"loss.png", "loss_by_position.png", "gate.png"}
    assert {*pictures, "metrics.jsonl", "wandb"} <= {path.name for path in run.iterdir()}
    steps = [record for record in read_metrics(run) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, stopped + 4))
    assert all(set(record) >= KEYS for record in steps)
    assert "layer_plan" in steps[0]
    looks = [record["step"] for record in read_metrics(run) if "gate/sink_share" in record]
    assert looks == sorted({*range(2, stopped + 4, 2), stopped + 3})
    validations = [record for record in read_metrics(run) if "validation_loss" in record]
    assert validations[-1]["step"] == stopped + 3
    assert len(validations[-1]["validation_loss_by_position"]) == 16


def test_ctrl_c_saves_and_exits_zero_without_torchrun(data, tmp_path):
    run = tmp_path / "run"
    process = start(sys.executable, *PRETRAIN, f"data.path={data}", f"run.dir={run}", "train.steps=5000")
    wait_for_steps(run, 2, process)
    process.send_signal(signal.SIGINT)
    code, text = finish(process)
    assert code == 0, text
    assert "Stopped by SIGINT" in text
    step = (run / "checkpoints" / "latest").read_text()
    assert json.loads((run / "checkpoints" / step / "moba_train.json").read_text())["step"] >= 2


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["data.path=nowhere"], "prepare_data.py"),
        (["model.vocab_size=64"], "model.vocab_size=64"),
        (["world_size=8"], "dry_run=true"),
        (["attention.pattern=dense"], "attention.pattern='dense'"),
        (["attention.pattern=moba*1000000000"], "attention.pattern='moba*1000000000'"),
        (["dry_run=true", "world_size=0"], "positive multiple"),
        (["checkpoint.load=nowhere"], "no checkpoint there"),
        (["attention.backend=triton"], "needs a CUDA GPU"),
        (["attention.full_backend=flash"], "needs a CUDA GPU"),
        (["run.dir=Makefile/run"], "not a folder that can be written"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(data, tmp_path, overrides, said, capsys, monkeypatch):
    from moba_train.config.compose import run_command_line

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run = tmp_path / "run"
    code = run_command_line(pretrain, "", [*SMALL, f"data.path={data}", f"run.dir={run}", *overrides])
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert len(error.splitlines()) == 1
    assert not run.exists()


@pytest.mark.parametrize("recipe", group_options("recipe"))
@pytest.mark.parametrize("copies", [1, 4])
def test_every_recipe_dry_runs_on_any_number_of_pretended_gpus(recipe, copies, capsys):
    world_size = copies * min_world_size(compose([f"recipe={recipe}"]))
    overrides = [f"recipe={recipe}", "dry_run=true", f"world_size={world_size}"]
    assert pretrain(compose([*overrides, f"train.global_batch_size={8 * copies}"])) == 0
    text = capsys.readouterr().out
    assert re.search(rf"{recipe}: \S+ on {world_size} GPUs", text)
    for line in ("layer plan", "parameters", "FLOPs per token", "total", '"sequence_length"'):
        assert line in text


def test_under_torchrun_a_mistake_is_told_once_by_each_machine():
    code, text = finish(start(*TORCHRUN, *PRETRAIN, "attention.topk=3"))
    assert code != 0
    assert text.count("Configuration error: attention.topk=") == 1


def test_a_plan_is_a_dry_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch/plan.py", "recipe=1m", "world_size=64"])
    monkeypatch.syspath_prepend(ROOT / "launch")  # as Python does for a script
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "launch/plan.py"), run_name="__main__")
    assert end.value.code == 0
    assert "1m: llama3.1-8b on 64 GPUs" in capsys.readouterr().out


def test_a_dry_run_shows_every_stage(capsys):
    assert pretrain(compose(["recipe=extend_8k_to_1m", "dry_run=true"])) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, steps, layout, rows in (
        ("to_32k", "1 to 1000", "4 x 1 x 2 x 8", 32),
        ("to_256k", "2001 to 3000", "8 x 1 x 4 x 2", 16),
        ("moba_1m", "4001 to 16000", "8 x 1 x 8 x 1", 8),
    ):
        table = text.split(f"on 64 GPUs, stage {name}: steps {steps} ")[1].split("Estimated memory")[0]
        assert f"tensor x pipeline x context x data │ {layout} " in table
        assert f"micro-batches per step and rank │ {rows} " in table
        assert "tokens per step │ 8,388,608 " in table
        assert ("moba*29(4096,12), full*3" in table) == (name == "moba_1m")


def test_a_dry_run_shows_padding(capsys):
    layout = ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"]
    assert pretrain(compose(["recipe=tiny", "dry_run=true", "train.sequence_length=1021", *layout])) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "tokens per row │ 1,021, padded to 1,024 " in text
    assert "tokens per GPU and row │ 512 " in text
    assert "tokens per step │ 4,084 " in text


def test_a_dry_run_shows_every_phase_of_a_schedule(capsys):
    schedule = "attention.schedule=[{fraction: 0.25, top_k: 2}, {fraction: 0.9, pattern: full}]"
    assert pretrain(compose(["recipe=tiny", "dry_run=true", "train.steps=100", schedule])) == 0
    text = " ".join(capsys.readouterr().out.split())
    for row in (
        "layer plan, steps 1 to 25 │ moba*3(64,4), full*1",
        "layer plan, steps 26 to 90 │ moba*3(64,2), full*1",
        "layer plan, steps 91 to 100 │ full*4",
    ):
        assert row in text
    costs = [float(cost) for cost in re.findall(r"FLOPs per token │ (\S+)", text)]
    mean = float(re.findall(r"forward and backward │ ([^,]+), mean", text)[0])
    assert mean == pytest.approx(0.25 * costs[0] + 0.65 * costs[1] + 0.1 * costs[2], rel=1e-3)


def test_help_needs_no_torch():
    script = (
        "import sys; from moba_train.config.compose import run_command_line; "
        "run_command_line(None, 'doc', ['--help']); sys.exit('torch' in sys.modules)"
    )
    code, text = finish(start(sys.executable, "-c", script))
    assert code == 0
    assert "attention" in text
