#!/usr/bin/env python3
"""A real model stretched to four times its context with MoBA and with full attention, on the same long documents.

    python -m experiments.extend_smollm2.run --model models/SmolLM2 [--steps N] [--minutes M] [--quick] [key=value ...]
    python -m experiments.extend_smollm2.run --page experiments/extend_smollm2/results.json

Takes a Hugging Face folder (folder.py makes SmolLM2-135M-Instruct's), joins installed Python sources to long documents
(../documents.py), trains two arms from the same weights on the same batches, and evaluates the model before and both
after: loss by position and a passkey grid. YaRN stretches the positions. Then writes results.json, a page and a
picture; the second form writes the last two again from the first.

On GPUs the arms and the evaluations of the model before run side by side, dealt to as many as there are; on a CPU one
after another. What is finished is not run again, a stopped arm goes on from its checkpoint; after --minutes, or when
told to stop, everything is stopped so. `--quick` shows on a CPU that everything works, in ten minutes; its numbers mean
nothing and are not put beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.common import ROOT, Training, end_of_log, gpus, stopped_by_sigterm, without_folder
from experiments.extend_smollm2.page import write_results
from moba_train.config.arguments import argument_parser

HERE = Path(__file__).resolve().parent
GRACE_S = 60  # for a checkpoint after a stop
STOPPED = "stopped; the same command goes on"


@dataclass(frozen=True)
class Setting:
    """One kind of device. length: of the context; None: STRETCH times the model's own. lengths: parts of it."""

    length: int | None
    steps: int
    batch: int
    block_size: int
    top_k: int
    dense_last: int
    characters: int
    megabytes: float
    lengths: tuple[int, ...]  # of the passkey grid: 4 is a quarter of the context
    documents: int
    samples: int
    precision: str


GPU = Setting(
    length=None,
    steps=128,
    batch=2,
    block_size=64,
    top_k=96,
    dense_last=5,
    characters=420_000,
    megabytes=96,
    lengths=(4, 2, 1),
    documents=24,
    samples=2,
    precision="bf16",
)
QUICK = Setting(
    length=512,
    steps=2,
    batch=1,
    block_size=32,
    top_k=4,
    dense_last=5,
    characters=12_000,
    megabytes=0.4,
    lengths=(2, 1),
    documents=2,
    samples=1,
    precision="fp32",
)
STRETCH = 4


@dataclass(frozen=True)
class Plan:
    """What is run: overrides of both arms and of each."""

    original: int
    length: int
    steps: int
    common: list[str]
    rope: list[str]
    arms: dict[str, list[str]]

    def training(self, out: Path, arm: str) -> Training:
        return Training(out / arm, "launch/pretrain.py", [*self.common, *self.arms[arm]], self.steps)


class Stopped(Exception):
    """The time is up, the user has enough, or a part failed and the others were stopped for it."""


class Parts:
    """Subprocesses with a common end: the deadline, a stop, or the first that fails. Their output goes to log files."""

    def __init__(self, deadline: float | None) -> None:
        self.start, self.deadline = time.monotonic(), deadline
        self.ended = threading.Event()
        self.lane = threading.local()  # environment: of what this thread starts

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def run(self, name: str, command: Sequence[object], log: Path) -> None:
        """Run to the end; Stopped where there was none."""
        if self.ended.is_set():
            raise Stopped(STOPPED)
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("a", encoding="utf-8") as stream:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env={**os.environ, **getattr(self.lane, "environment", {})},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            try:
                while process.poll() is None and not self.ended.is_set() and not self._late():
                    time.sleep(0.2)
            except KeyboardInterrupt:
                self.ended.set()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                self.say(f"{name}: stopped")
                raise Stopped(STOPPED)
        if process.returncode:
            if self.ended.is_set():  # Ctrl-C reaches the parts too
                raise Stopped(STOPPED)
            self.ended.set()
            raise Stopped("\n".join([f"{name} failed ({process.returncode}); the end of {log}:", *end_of_log(log)]))
        self.say(f"{name}: {time.monotonic() - began:.0f} s")

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() - self.start > self.deadline


def main() -> int:
    args = _arguments()
    if args.page is not None:
        print(write_results(json.loads(args.page.read_text(encoding="utf-8")), args.page))
        return 0
    quick: bool = args.quick
    out = Path(args.out or f"runs/extend_smollm2{'_quick' if quick else ''}").absolute()
    model = Path(args.model).absolute()
    if not (model / "config.json").is_file():
        print(f"error: {model} is no Hugging Face folder: see experiments/extend_smollm2/folder.py", file=sys.stderr)
        return 2
    plan = _plan(args, model, out / "data")
    parts = Parts(None if args.minutes is None else args.minutes * 60)
    try:
        for arm in plan.arms:
            plan.training(out, arm).prepare()
        with stopped_by_sigterm():
            _data(parts, QUICK if quick else GPU, model, out)
            _side_by_side(
                parts,
                [_before(parts, plan, out, model, args), *(_lane(parts, plan, out, arm, args) for arm in plan.arms)],
            )
    except Stopped as reason:
        print(reason, file=sys.stderr)
        return 1
    results = HERE / "results.json" if not quick else out / "results.json"
    print(write_results(_results(args, plan, out), results))
    parts.say(f"written: {results} and its page and picture")
    return 0


def _plan(args: argparse.Namespace, model: Path, data: Path) -> Plan:
    setting = QUICK if args.quick else GPU
    original = json.loads((model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    length = setting.length or STRETCH * original
    steps = args.steps or setting.steps
    rope = [
        "model.rope_scaling.rope_type=yarn",
        f"model.rope_scaling.factor={STRETCH}",
        f"model.rope_scaling.original_max_position_embeddings={original}",
        f"model.max_position_embeddings={STRETCH * original}",
    ]
    common = [
        "recipe=tiny",
        f"checkpoint.init_from_hf={model}",
        f"data.path={data}",
        f"precision={setting.precision}",
        f"train.steps={steps}",
        f"train.sequence_length={length}",
        f"train.global_batch_size={setting.batch}",
        "train.validate_every=0",
        "train.validation_batches=1",
        "metrics.gate_every=0",
        "parallel.recompute=selective",
        "optim.learning_rate=3e-4",
        "optim.min_learning_rate=3e-5",
        f"optim.warmup_steps={max(1, steps // 10)}",
        "checkpoint.save_every=100",
        "checkpoint.keep_last=1",
        *rope,
    ]
    moba = [
        "attention=moba",
        f"attention.block_size={setting.block_size}",
        f"attention.top_k={setting.top_k}",
        "attention.force_first_block=true",
        f"attention.dense_last_layers={setting.dense_last}",
    ]
    arms = {"full": ["attention=full", *args.overrides], "moba": [*moba, *args.overrides]}
    return Plan(original, length, steps, common, rope, arms)


def _data(parts: Parts, setting: Setting, model: Path, out: Path) -> None:
    text = out / "long.jsonl"
    size = ["--characters", str(setting.characters), "--megabytes", str(setting.megabytes)]
    if not text.exists():
        command = [sys.executable, ROOT / "experiments" / "documents.py", "--output", text, *size]
        parts.run("documents", command, out / "documents.log")
    if not (out / "data" / "dataset.json").exists():
        options = ["--tokenizer", model, "--valid-fraction", "0.25"]
        command = [sys.executable, "launch/prepare_data.py", "--output", out / "data", "--input", text, *options]
        parts.run("tokens", command, out / "data.log")


def _lane(parts: Parts, plan: Plan, out: Path, arm: str, args: argparse.Namespace) -> Callable[[], None]:
    def train_and_evaluate() -> None:
        training = plan.training(out, arm)
        if not training.finished:
            parts.run(f"training, {arm}", training.command, training.folder / "log.txt")
            if not training.finished:
                raise Stopped(STOPPED)
        _evaluate(parts, plan, out, arm, training.folder, [], args)

    return train_and_evaluate


def _before(parts: Parts, plan: Plan, out: Path, model: Path, args: argparse.Namespace) -> Callable[[], None]:
    precision = [override for override in plan.common if override.startswith("precision=")]
    moba = [  # evaluate.py takes keys, not recipes
        "attention.pattern=moba",
        *plan.arms["moba"][1:],
    ]

    def evaluate() -> None:
        _evaluate(parts, plan, out, "before", model, precision, args)
        _evaluate(parts, plan, out, "stretched_full", model, [*precision, *plan.rope], args, passkey=False)
        _evaluate(parts, plan, out, "stretched_moba", model, [*precision, *plan.rope, *moba], args, passkey=False)
        free = [*moba, "attention.force_first_block=false"]  # what the gate does without its attention sink
        _evaluate(parts, plan, out, "stretched_free", model, [*precision, *plan.rope, *free], args, passkey=False)

    return evaluate


def _evaluate(
    parts: Parts,
    plan: Plan,
    out: Path,
    name: str,
    source: Path,
    overrides: list[str],
    args: argparse.Namespace,
    passkey: bool = True,
) -> None:
    setting = QUICK if args.quick else GPU
    folder = out / "evaluation" / name
    if (folder / "evaluation.json").exists():
        return
    lengths = [plan.length // part for part in setting.lengths] if passkey else [plan.length]
    options: dict[str, Any] = {
        "--output": folder,
        "--data": out / "data",
        "--tasks": "position,passkey" if passkey else "position",
        "--lengths": ",".join(map(str, lengths)),
        "--documents": setting.documents,
        "--samples": setting.samples,
        "--distractors": 1,
    }
    if name in plan.arms:  # what the tokens beyond the model's own length are worth
        options["--context"] = min(plan.original, plan.length // STRETCH)
    command = [sys.executable, "launch/evaluate.py", source, *overrides]
    for option, value in options.items():
        command += [option, value]
    parts.run(f"evaluation of {name}", command, out / "evaluation" / f"{name}.log")


def _side_by_side(parts: Parts, lanes: list[Callable[[], None]]) -> None:
    """All at once on GPUs, dealt to them in turn; one after another on a CPU. A stop or a failure ends all."""
    names = gpus()

    def on_its_gpu(index: int) -> None:
        parts.lane.environment = {"CUDA_VISIBLE_DEVICES": names[index % len(names)]} if names else {}
        lanes[index]()

    with ThreadPoolExecutor(len(lanes) if names else 1) as pool:
        futures = [pool.submit(on_its_gpu, index) for index in range(len(lanes))]
        try:
            wait(futures)
        except KeyboardInterrupt:
            parts.ended.set()
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise max(errors, key=lambda error: "failed" in str(error))


def _results(args: argparse.Namespace, plan: Plan, out: Path) -> dict[str, Any]:
    """Everything that the page says, without the names of anybody's folders."""
    from moba_train.data.info import dataset_info
    from moba_train.train.metrics import read_metrics

    arms = {}
    for arm in plan.arms:
        records = [record for record in read_metrics(out / arm) if "loss" in record]
        arms[arm] = {
            "losses": {record["step"]: record["loss"] for record in records},
            "layers": next(record["layer_plan"] for record in records if "layer_plan" in record),
            "memory_gib": max(record["memory_gib"] for record in records),
        }
    evaluations, device = {}, ""
    for path in sorted((out / "evaluation").glob("*/evaluation.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        evaluations[path.parent.name] = {key: found[key] for key in ("layers", "loss_by_position", "passkey")}
        device = found["device"]
    info = dataset_info(out / "data")
    overrides = map(without_folder, args.overrides)
    given = [*["--quick"] * args.quick, *([f"--steps {args.steps}"] if args.steps else []), *overrides]
    folders = ("checkpoint.init_from_hf=", "data.path=")
    return {
        "quick": args.quick,
        "command": " ".join(["python -m experiments.extend_smollm2.run --model FOLDER", *given]),
        "device": device,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "original": plan.original,
        "length": plan.length,
        "common": [override for override in plan.common if not override.startswith(folders)],
        "arm_overrides": {arm: [*map(without_folder, theirs)] for arm, theirs in plan.arms.items()},
        "data": {"train": asdict(info.train), "valid": asdict(info.valid)},
        "arms": arms,
        "evaluations": evaluations,
    }


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--model", default="models/SmolLM2", metavar="DIR", help="Hugging Face folder (default: models/SmolLM2)")
    add("--steps", type=int, metavar="N", help=f"of each arm (default: {GPU.steps})")
    add("--minutes", type=float, metavar="M", help="stop then, to be gone on from by the same command")
    add("--quick", action="store_true", help="tiny lengths and few steps: does it work?")
    add("--out", metavar="DIR", help="of the runs (default: runs/extend_smollm2)")
    add("--page", type=Path, metavar="FILE", help="write the page of this results.json again, and nothing else")
    add("overrides", nargs="*", metavar="key=value", help="given to both arms")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
