"""The Slurm scripts, run as a batch shell would run them, with srun, scontrol and torchrun played by small scripts."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.slurm import submit
from launch.slurm.submit import flags, job

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = sorted(path.stem for path in (ROOT / "recipes" / "cluster").glob("*.yaml"))

# srun drops its own flags and becomes the task; the real one forwards SIGUSR1 to it.
SRUN = """
printf '%s\\n' "$@" > srun.args
env > srun.env
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """
echo "$*" >> scontrol.calls
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; fi
"""
# torchrun with one worker, which leaves with status $WORKER_STATUS: at once, or when told to stop.
TORCHRUN = """
printf '%s\\n' "$@" > torchrun.args
trap 'touch agent.signalled; exit 1' TERM INT USR1
bash worker.sh &
wait $!
"""
WORKER = """
trap 'echo saved > checkpoint; exit $WORKER_STATUS' TERM
if [[ -n ${WORKER_WAITS:-} ]]; then
  touch started
  for _ in {1..400}; do sleep 0.05; done
  exit 99
fi
exit $WORKER_STATUS
"""


@pytest.fixture
def submit_dir(tmp_path: Path) -> Path:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "bin").mkdir()
    for name, body in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN}.items():
        script = tmp_path / "bin" / name
        script.write_text(f"#!/usr/bin/env bash\n{body}")
        script.chmod(0o755)
    (tmp_path / "worker.sh").write_text(WORKER)
    return tmp_path


def start(folder: Path, script: str, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "long-run",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "64",
        "WORKER_STATUS": "0",
        **variables,
    }
    command = ["bash", str(ROOT / "launch" / "slurm" / script), *overrides]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def requeues(folder: Path) -> list[str]:
    return [line for line in (folder / "scontrol.calls").read_text().splitlines() if line.startswith("requeue")]


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_a_finished_run_gets_its_arguments_and_is_not_requeued(submit_dir: Path, kind: str) -> None:
    overrides = ["recipe=128k", 'attention.pattern="moba*3,full"', "train.steps=1000"]
    status, output = finish(start(submit_dir, f"{kind}.sbatch", *overrides))
    assert status == 0, output
    assert (submit_dir / "torchrun.args").read_text().splitlines() == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node7:24711",
        "--rdzv-id=4711",
        f"launch/{kind}.py",
        "run.dir=runs/long-run-4711",
        *overrides,
    ]
    srun = (submit_dir / "srun.args").read_text().splitlines()
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(srun)
    assert "OMP_NUM_THREADS=8" in (submit_dir / "srun.env").read_text().splitlines()
    assert requeues(submit_dir) == []


def test_a_failing_run_keeps_its_status_and_is_not_requeued(submit_dir: Path) -> None:
    status, output = finish(start(submit_dir, "pretrain.sbatch", WORKER_STATUS="7"))
    assert status == 7
    assert "status 7: not requeued" in output
    assert requeues(submit_dir) == []


@pytest.mark.parametrize("worker_status", ["0", "3"])
def test_the_signal_ahead_of_the_limit_saves_and_requeues(submit_dir: Path, worker_status: str) -> None:
    process = start(submit_dir, "pretrain.sbatch", WORKER_WAITS="1", WORKER_STATUS=worker_status)
    deadline = time.monotonic() + 60
    while not (submit_dir / "started").exists():
        assert time.monotonic() < deadline, "the worker never started"
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    status, output = finish(process)
    assert (submit_dir / "checkpoint").read_text() == "saved\n", output
    assert not (submit_dir / "agent.signalled").exists(), "torchrun would have killed its workers"
    assert status == int(worker_status), output
    assert requeues(submit_dir) == (["requeue 4711"] if worker_status == "0" else [])


def test_without_gpus_the_job_says_what_to_do(submit_dir: Path) -> None:
    status, output = finish(start(submit_dir, "pretrain.sbatch", SLURM_GPUS_ON_NODE=""))
    assert status == 2
    assert "--gpus-per-node" in output


def test_site_facts_reach_the_job(submit_dir: Path) -> None:
    variables = {
        "JOB_SETUP": 'export FROM_SETUP="a b"',
        "JOB_SRUN_FLAGS": shlex.join(["--container-image=a b"]),
        "SLURM_GPUS_ON_NODE": "",
        "SLURM_GPUS_PER_NODE": "h100:4",
        "SLURM_CPUS_PER_TASK": "64",
    }
    status, output = finish(start(submit_dir, "pretrain.sbatch", **variables))
    assert status == 0, output
    assert "--container-image=a b" in (submit_dir / "srun.args").read_text().splitlines()
    assert "--nproc-per-node=4" in (submit_dir / "torchrun.args").read_text().splitlines()
    environment = (submit_dir / "srun.env").read_text().splitlines()
    assert {"FROM_SETUP=a b", "SRUN_CPUS_PER_TASK=64", "OMP_NUM_THREADS=16"} <= set(environment)


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_batch_files_ask_for_the_signal_and_a_requeue(name: str) -> None:
    directives = (ROOT / "launch" / "slurm" / f"{name}.sbatch").read_text()
    wanted = ("--signal=B:USR1@300", "--requeue", "--ntasks-per-node=1", "--open-mode=append", f"--job-name={name}")
    assert all(f"#SBATCH {directive}\n" in directives for directive in wanted)


def test_flags() -> None:
    assert flags({"nodes": 2, "time": "1:00:00", "exclusive": True, "mem": None, "x": False, "gpus": 0}) == [
        "--nodes=2",
        "--time=1:00:00",
        "--exclusive",
        "--gpus=0",
    ]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_clusters_make_a_command(cluster: str) -> None:
    command, variables = job(["pretrain", "--nodes=4", "recipe=128k", "train.steps=9"], {"CLUSTER": cluster})
    assert command[0] == "sbatch"
    assert command[-4:] == ["--nodes=4", "launch/slurm/pretrain.sbatch", "recipe=128k", "train.steps=9"]
    assert all(isinstance(value, str) for value in variables.values())


@pytest.mark.parametrize(
    "arguments, cluster, words",
    [
        ([], "example", "pretrain or sft"),
        (["train"], "example", "pretrain or sft"),
        (["sft"], "", "CLUSTER=''"),
        (["sft"], "nowhere", "CLUSTER='nowhere'"),
    ],
)
def test_submit_names_what_is_wrong(arguments: list[str], cluster: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        job(arguments, {"CLUSTER": cluster})


@pytest.mark.parametrize(
    "facts, words",
    [
        ("sbtach: {}", "unknown key sbtach"),
        ("a: [", "not YAML"),
        ("[1, 2]", "expects the keys"),
        ("setup: module load cuda", "a list of shell lines"),
        ("sbatch: [a]", "names with values"),
        ("sbatch: {time: 24:00:00}", "quote it"),
    ],
)
def test_submit_names_what_is_wrong_in_the_file(
    tmp_path: Path, facts: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes" / "cluster").mkdir(parents=True)
    (tmp_path / "recipes" / "cluster" / "mine.yaml").write_text(facts)
    monkeypatch.setattr(submit, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=words):
        job(["sft"], {"CLUSTER": "mine"})
