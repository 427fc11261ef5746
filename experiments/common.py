"""What the experiments share: trainings side by side on one device, what they were, and the parts of a page.

A training that is finished is not run again, one that was stopped goes on from its last checkpoint, and a folder is
never gone on with under other settings. An experiment's numbers go into a JSON file, and its page is written from that.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moba_train import device as devices
from moba_train.data.info import dataset_info
from moba_train.train.metrics import read_metrics

__all__ = [
    "ROOT",
    "Training",
    "data_in_words",
    "end_of_log",
    "environment",
    "gpus",
    "inputs",
    "overrides_block",
    "prepared",
    "prepared_long",
    "provenance",
    "run",
    "stopped_by_sigterm",
    "table",
    "train_all",
    "verdict",
    "without_folder",
]

ROOT = Path(__file__).resolve().parents[1]
_TELL_S = 20.0
_TAIL = 25  # lines of a failed training's log


@dataclass(frozen=True)
class Training:
    """One run of a launch script in a folder of its own; `overrides` have all but the folder."""

    folder: Path
    script: str
    overrides: list[str]
    steps: int

    @property
    def finished(self) -> bool:
        """Trained to its end, validated and saved."""
        saved = self.folder / "checkpoints" / "latest"
        validated = any(r["step"] == self.steps and "validation_loss" in r for r in self._records())
        return validated and saved.exists() and saved.read_text().strip().endswith(f"{self.steps:08d}")

    @property
    def command(self) -> list[str]:
        """What one process of it runs."""
        return [sys.executable, self.script, *self.overrides, f"run.dir={self.folder}"]

    def prepare(self) -> None:
        """Make the folder, or refuse one that has another training."""
        record = self.folder / "training.json"
        given = [self.script, *self.overrides]
        if record.exists() and (found := json.loads(record.read_text())) != given:
            other = ", ".join(sorted(set(found) ^ set(given)))
            raise SystemExit(
                f"{self.folder} was started with other settings ({other}): choose another --out, or delete it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(given, indent=1))

    def progress(self) -> str:
        """How far it is, in a few words."""
        steps = [r["step"] for r in self._records() if "loss" in r]
        return f"{self.folder.name} {steps[-1] if steps else 0}/{self.steps}"

    def _records(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder) if (self.folder / "metrics.jsonl").exists() else []


def train_all(trainings: Sequence[Training], at_once: int, processes: int = 1) -> None:
    """Run what is not finished, at most `at_once` side by side, each of so many processes; logs go to the folders.

    Trainings of one process are dealt to the GPUs, so that each has as few as can be.

    SystemExit when one fails, after the others, or when this process is told to stop: all save a checkpoint then.
    """
    for training in trainings:
        training.prepare()
    waiting = [training for training in trainings if not training.finished]
    threads = max(1, (os.cpu_count() or 1) // (min(at_once, max(len(waiting), 1)) * processes))
    running: dict[subprocess.Popen[bytes], Training] = {}
    names = gpus() if processes == 1 else []
    places: dict[subprocess.Popen[bytes], str] = {}  # the GPU of each that runs
    failed: list[Training] = []
    started = told = time.monotonic()
    try:
        with stopped_by_sigterm():
            while waiting or running:
                while waiting and len(running) < at_once:
                    taken = list(places.values())
                    place = min(names, key=taken.count, default=None)
                    process = _start(waiting[0], processes, threads, place)
                    running[process], waiting = waiting[0], waiting[1:]
                    if place is not None:
                        places[process] = place
                for process in [process for process in running if process.poll() is not None]:
                    training = running.pop(process)
                    places.pop(process, None)
                    failed += [] if training.finished else [training]
                    print(f"{time.monotonic() - started:4.0f} s: {training.progress()}, ended", flush=True)
                if time.monotonic() - told > _TELL_S:
                    told = time.monotonic()
                    progress = ", ".join(training.progress() for training in running.values())
                    print(f"{told - started:4.0f} s: {progress}", flush=True)
                time.sleep(0.2)
    except KeyboardInterrupt:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise SystemExit("stopped; the same command goes on") from None
    if failed:
        for training in failed:
            last = end_of_log(training.folder / "log.txt")
            print(f"{training.folder.name} failed:", *last, sep="\n  ", file=sys.stderr)
        raise SystemExit(f"not finished: {', '.join(t.folder.name for t in failed)}; the same command goes on")


def gpus() -> list[str]:
    """The GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return named.split(",")[:count]


def end_of_log(log: Path) -> list[str]:
    """Its last lines: where a failed command says why."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM as Ctrl-C: what was started is not left running alone."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(command: Sequence[str | Path]) -> None:
    """A Python script of this repository and its arguments; raises if it fails."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def prepared(given: str | None, packages: Sequence[str]) -> Path:
    """A prepared data folder of `packages` (none: the Python standard library), made once; `given`, or below data/."""
    folder = Path(given or ROOT / "data" / ("_".join(packages) or "stdlib")).absolute()
    if not (folder / "dataset.json").exists():
        run(
            [
                "launch/prepare_data.py",
                "--output",
                folder,
                *inputs(packages),
                *(["--suffix", ".py"] if packages else []),
            ]
        )
    return folder


def prepared_long(given: str | None, megabytes: float, characters: int) -> Path:
    """A prepared data folder of documents.py's long documents, made once; `given`, or below data/."""
    folder = Path(given or ROOT / "data" / f"long_{megabytes:g}mb_of_{characters}").absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "dataset.json").exists():
        size = ["--characters", str(characters), "--megabytes", str(megabytes)]
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            text = Path(scratch) / "long.jsonl"
            run(["experiments/documents.py", "--output", text, *size])
            run(["launch/prepare_data.py", "--output", folder, "--input", text])
    return folder


def inputs(packages: Sequence[str]) -> list[str]:
    """--input for the sources of installed packages; nothing for none: the scripts then read the standard library."""
    folders = []
    for name in packages:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise SystemExit(f"the package {name} is not installed here: its sources are the experiment's data")
        folders.append(str(Path(found.origin).parent))
    return ["--input", *folders] if folders else []


def data_in_words(sources: str, folder: Path, given: str | None) -> str:
    """For a page: the prepared data's sources, or the name of a folder that was given, and how much there is."""
    info = dataset_info(folder)
    splits = (f"{split.documents:,} documents of {split.tokens:,} tokens" for split in (info.train, info.valid))
    return "{}; {} to train and {} to validate".format(f"the folder {folder.name}" if given else sources, *splits)


def environment(
    packages: Sequence[str], setting: Sequence[str], quick: bool, data: str | None = None
) -> dict[str, Any]:
    """What a page says of how its numbers came about: command, device, versions, data, date and `setting`.

    data: None: the sources of `packages`.
    """
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", *packages)}
    program = f"experiments.{Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem}"
    return {
        "command": shlex.join(["python", "-m", program, *map(without_folder, sys.argv[1:])]),
        "device": devices.device_name(),
        "versions": {"Python": platform.python_version(), **versions},
        "packages": list(packages),
        "data": data,
        "date": str(datetime.date.today()),
        "setting": [o for o in setting if not Path(o.partition("=")[2]).is_absolute()],
        "quick": quick,
    }


def without_folder(argument: str) -> str:
    """A path, or the path behind `key=`, without anybody's folders: its last part is enough."""
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def provenance(told: dict[str, Any]) -> list[str]:
    """Paragraphs of a page on where its numbers come from, of `environment`."""
    versions = told["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in told["packages"]) or "the Python standard library"
    data = told.get("data") or f"the Python sources of {packages}"
    quick = ["**A quick run: it shows that the experiment works, and its numbers mean nothing.**"] * told["quick"]
    return [
        *quick,
        f"```\n{told['command']}\n```",
        f"{told['device']}; {', '.join(f'{name} {version}' for name, version in versions.items())}; {told['date']}. "
        f"Data: {data}. Every number here is written by the program from its results.",
    ]


def overrides_block(overrides: Sequence[str]) -> str:
    """Settings as a block."""
    return "\n".join(["```", *overrides, "```"])


def table(head: Sequence[Any], *rows: Sequence[Any]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def verdict(met: bool) -> str:
    """A criterion's last column."""
    return "met" if met else "**not met**"


def _start(training: Training, processes: int, threads: int, gpu: str | None) -> subprocess.Popen[bytes]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, *training.command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with (training.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
