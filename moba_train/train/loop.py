"""The training loop: step, measure, validate, save, until the last step or a signal; stage after stage."""

from __future__ import annotations

import logging
import math
import os
import signal
import statistics
import sys
import time
from typing import Any

import torch.distributed as dist

from moba_train import device as devices
from moba_train.config.schema import ConfigError, RunConfig
from moba_train.config.stages import stages_of
from moba_train.config.validate import padded_length
from moba_train.data.info import dataset_info
from moba_train.model.layer_plan import describe, layer_plan, plan_phases
from moba_train.model.rope import describe_rope
from moba_train.parallel.watchdog import Watched, phase
from moba_train.train import checkpoint
from moba_train.train.dense_layers import resolve_dense_layers
from moba_train.train.dry_run import print_plan
from moba_train.train.gate_metrics import gate_record
from moba_train.train.metrics import Metrics, read_metrics
from moba_train.train.setup import Run, close, current_stage, leave_stage, preflight, setup
from moba_train.train.step import StepResult, train_step, validate_model
from moba_train.train.table import print_table

__all__ = ["finetune", "pretrain"]


def pretrain(config: RunConfig) -> int:
    """Train on data.path, or print the plan of any dry run. Returns the exit code; the preflight raises ConfigError."""
    if config.sft.path is not None and not config.dry_run:
        raise ConfigError("sft.path", config.sft.path, "chat rows are for fine-tuning: start launch/sft.py")
    return _launch(config)


def finetune(config: RunConfig) -> int:
    """Train on the chat rows of sft.path; otherwise as `pretrain`."""
    if config.sft.path is None:
        raise ConfigError("sft.path", None, "name chat rows (.jsonl or .parquet), or choose a recipe such as sft_tiny")
    return _launch(config)


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the time: a progress line puts itself there, and text above itself."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, stream: Any) -> None:
        pass


def _launch(config: RunConfig) -> int:
    """Print the plan of a dry run, or check, build and train; the exit code."""
    logging.basicConfig(format="%(message)s", handlers=[_Stderr()])
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("moba_train").setLevel(logging.INFO if first else logging.ERROR)
    world_size = preflight(config)
    if config.dry_run:
        if first:
            print_plan(config, world_size)
        return 0
    with Watched(config.parallel.timeout_s):
        _train_stages(config, _StopSignal())
        close()  # not after an error: leaving the group waits for ranks that may be stuck; the launcher ends them
    return 0


class _StopSignal:
    """SIGTERM and Ctrl-C ask for a checkpoint and a clean end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def _train_stages(config: RunConfig, stop: _StopSignal) -> None:
    """One stage after the other, each built anew from the checkpoint that the one before ended with."""
    stages = stages_of(config)
    folder: str | None = None
    for stage in stages[current_stage(stages) :]:
        if folder is not None:
            leave_stage()
            stage = stage.after_another(folder)
        run = setup(stage.config, stage)
        folder = str(run.folder)
        resolve_dense_layers(run)
        stopped = _train(run, stop)
        del run
        if stopped:
            return


def _train(run: Run, stop: _StopSignal) -> bool:
    """Train to the end of the stage; whether a signal came first."""
    config, last, first = run.config, run.stage.end, run.groups.world_rank == 0
    metrics = Metrics(config, run.folder, run.step, enabled=first)
    clock = _Clock(run.step)
    try:
        if first:
            _announce(run, metrics)
        validated = saved = looked = -1
        told_plan = ""
        stopped = False
        while run.step < last and not stopped:
            plan = describe(layer_plan(config.attention, config.model.num_layers, run.step))
            with clock:
                result = train_step(run, stop.received is not None)
            clock.flops += result.flops
            stopped = result.stop
            changed = plan != told_plan  # a switch is told at its own step, however seldom others are
            if first and (changed or run.step % config.metrics.log_every == 0 or run.step == last):
                record = _record(run, result, clock)
                if run.stage.name and not told_plan:
                    record["stage"] = run.stage.name
                if changed:
                    record["layer_plan"] = plan
                    if told_plan:
                        metrics.say(f"step {run.step}: layers now {plan}")
                metrics.write(record)
                metrics.show(run.step, config.train.steps, record, clock.eta(config.train.steps - run.step))
            told_plan = plan
            every = config.train.validate_every
            if every and run.step % every == 0:
                _validate(run, metrics)
                validated = run.step
            every = config.metrics.gate_every
            if every and run.step % every == 0:
                metrics.write(gate_record(run))
                looked = run.step
            every = config.checkpoint.save_every
            if every and run.step % every == 0:
                checkpoint.save(run)
                saved = run.step
        if saved != run.step and clock.steps:
            path = checkpoint.save(run)
            if stopped:
                again = f"The same command with run.dir={run.folder} goes on."
                metrics.say(f"Stopped by {stop.received or 'a signal'} at step {run.step}; saved {path}. {again}")
        if not clock.steps:
            metrics.say(f"Step {run.step} of train.steps={config.train.steps} is done already; raise it to go on.")
        if validated != run.step and not stopped and (clock.steps or not _told_before(run, "validation_loss")):
            _validate(run, metrics)
        look = config.metrics.gate_every and looked != run.step and not stopped
        if look and (clock.steps or not _told_before(run, "gate/seconds")):  # also where all steps were done already
            metrics.write(gate_record(run))
    finally:
        metrics.close()
    if first and not stopped:
        _summarise(run, clock)
    phase("end of the run")
    dist.barrier()
    return stopped


class _Clock:
    """Wall time of training steps alone: validation and checkpoints do not count."""

    def __init__(self, first_step: int) -> None:
        self.seconds = self.last = 0.0
        self.steps = self.flops = 0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.last = time.perf_counter() - self._start  # a step ends with numbers on the host: the device is done
        self.seconds += self.last
        self.steps += 1

    def eta(self, steps: int) -> float:
        """Seconds for that many more steps at the mean pace."""
        return self.seconds / max(self.steps, 1) * steps

    def mfu(self, world_size: int) -> float:
        """Model FLOPs utilisation over all steps: FLOP/s of a process over its device's peak."""
        return self.flops / max(self.seconds, 1e-9) / world_size / devices.peak_flops()[0]


def _record(run: Run, result: StepResult, clock: _Clock) -> dict[str, Any]:
    rate = result.flops / clock.last / run.groups.world_size
    return {
        "step": run.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "tokens": run.tokens,
        "tokens_per_second": result.tokens / clock.last,
        "tflops_per_gpu": rate / 1e12,
        "mfu": rate / devices.peak_flops()[0],
        "memory_gib": devices.peak_memory_gib(),
    }


def _validate(run: Run, metrics: Metrics) -> None:
    result = validate_model(run)
    by_position = [None if math.isnan(loss) else loss for loss in result.by_position]
    length = run.config.train.sequence_length
    record = {"validation_loss": result.loss, "validation_loss_by_position": by_position, "validation_length": length}
    metrics.write({"step": run.step, **record})
    metrics.say(f"step {run.step}: validation loss {result.loss:.4f}")


def _told_before(run: Run, key: str) -> bool:
    """Whether metrics.jsonl has `key` for this very step: a run may have ended between its last checkpoint and that."""
    records = read_metrics(run.folder) if dist.get_rank() == 0 else []
    told = [any(record["step"] == run.step and key in record for record in records)]
    dist.broadcast_object_list(told)
    return told[0]


def _announce(run: Run, metrics: Metrics) -> None:
    config, groups = run.config, run.groups
    phases = plan_phases(config.attention, config.model.num_layers)
    plan = layer_plan(config.attention, config.model.num_layers, run.step)
    axes = ", ".join(f"{axis} {getattr(groups, axis).size}" for axis in ("tensor", "pipeline", "context", "data"))
    hardware = f"{groups.world_size} x {devices.device_name()}"
    peak, source = devices.peak_flops()
    metrics.say(f"{config.recipe}: {config.model.name} on {hardware}, {config.precision}; {axes}")
    if run.stage.name:
        rows = f"{config.train.global_batch_size} rows of {config.train.sequence_length} tokens"
        metrics.say(f"stage {run.stage.name}, steps {run.stage.start + 1} to {run.stage.end}: {rows} a step")
    metrics.say(f"layers: {describe(plan)}; MFU against {peak / 1e12:.3g} TFLOP/s ({source})")
    for step, later in phases:
        if step > run.step and later != plan:
            metrics.say(f"  after step {step}: {describe(later)}")
            plan = later
    length, padded = config.train.sequence_length, padded_length(config.train.sequence_length, config)
    if padded != length:
        metrics.say(f"rows of {length} tokens are padded to {padded}, which this layout divides")
    metrics.say(f"rotary embedding: {describe_rope(config.model, config.train.sequence_length)}")
    if run.step:
        metrics.say(f"going on from step {run.step}")


def _gate_share(every: int, records: list[dict[str, Any]], step_tokens: int) -> list[tuple[str, Any]]:
    """Of what a run says at its end, what looking at the gate costs. Medians: the first look and step build kernels."""
    looks = [r["gate/seconds"] for r in records if "gate/seconds" in r]
    steps = [step_tokens / r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    if not (looks and steps and every):
        return []
    share = statistics.median(looks) / (every * statistics.median(steps))
    return [(f"gate metrics every {every} steps, share of training time", f"{share:.2%}")]


def _summarise(run: Run, clock: _Clock) -> None:
    from moba_train.train.report import draw  # matplotlib takes a second to import

    config = run.config
    step_tokens = config.train.global_batch_size * config.train.sequence_length
    pictures = draw(run.folder, config.train.sequence_length)
    records = [record for record in read_metrics(run.folder) if record["step"] > run.stage.start]
    last: dict[str, Any] = next((r for r in reversed(records) if "loss" in r), {})
    validation = next((r["validation_loss"] for r in reversed(records) if "validation_loss" in r), float("nan"))
    rows: list[tuple[str, Any]] = [
        ("steps", run.step),
        ("tokens", run.tokens),
        ("training loss, nats per token", last.get("loss", float("nan"))),
        ("validation loss, nats per token", validation),
    ]
    if config.data.path is not None:  # a blend has no single number of bytes per token
        text = dataset_info(config.data.path)
        rows += [
            ("validation loss, nats per byte", validation / text.bytes_per_token),
            ("  a unigram model of the tokens", text.unigram_loss_per_byte),
        ]
    rows += [
        ("training time, s", clock.seconds),
        ("tokens per second", step_tokens * clock.steps / max(clock.seconds, 1e-9)),
        ("MFU", f"{clock.mfu(run.groups.world_size):.1%}"),
        *_gate_share(config.metrics.gate_every, records, step_tokens),
        ("peak memory, GiB", devices.peak_memory_gib()),
    ]
    print_table(f"{config.recipe}{run.stage.name and f', stage {run.stage.name}'} finished", rows)
    print(*(f"picture: {path}" for path in pictures), f"checkpoint and metrics: {run.folder}", sep="\n")
