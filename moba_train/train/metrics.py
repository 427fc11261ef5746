"""What a run tells: metrics.jsonl always, one progress line on rank 0, wandb when asked.

Keys of metrics.jsonl: step, loss, validation_loss, validation_loss_by_position, validation_length, grad_norm,
learning_rate, tokens, tokens_per_second, tflops_per_gpu, mfu, memory_gib, and layer_plan on the first step (also after
a resume) and on the first step of every other plan; stage likewise in a run with stages. Every metrics.gate_every
steps, and at the end, gate/... and gradient_density/... (gate_metrics.py).
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from moba_train.config.schema import RunConfig, to_dict

__all__ = ["Metrics", "read_metrics"]

_LOG = logging.getLogger(__name__)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run's metrics.jsonl, oldest first; lines that are none (one cut off by a crash) are left out."""
    records = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


class Metrics:
    """Sinks of one run. On ranks other than 0 every method does nothing."""

    def __init__(self, config: RunConfig, folder: Path, first_step: int, enabled: bool) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self._path = folder / "metrics.jsonl"
        # A run that died after its last checkpoint repeats steps: the first telling of them is dropped.
        kept = (
            [r for r in read_metrics(folder) if r["step"] <= first_step] if self._path.exists() and first_step else []
        )
        rewritten = self._path.with_suffix(".jsonl.partial")
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
        rewritten.replace(self._path)
        self._stream = self._path.open("a")
        self._wandb = _start_wandb(config, folder) if config.wandb.mode != "disabled" else None
        self._console = Console()
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=config.train.steps, completed=first_step, line="")
        self._lines_every = max(1, config.train.steps // 20)  # where there is no terminal to redraw
        self._progress.start()

    def write(self, record: dict[str, Any]) -> None:
        """One record to metrics.jsonl and wandb. `record` has a step; other values are numbers, lists or text."""
        if not self.enabled:
            return
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()
        if self._wandb is not None:
            self._wandb.log(_for_wandb(record), step=record["step"])

    def show(self, step: int, steps: int, record: dict[str, Any], eta_s: float) -> None:
        """Redraw the progress line from a step's record; without a terminal, a plain line now and then."""
        if not self.enabled:
            return
        mfu = f"{record['mfu']:.1%}"
        line = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  MFU {mfu}"
        self._progress.update(self._task, completed=step, line=line)
        if not self._console.is_terminal and (step % self._lines_every == 0 or step == steps):
            print(f"step {step}/{steps}  {line}  ETA {eta_s:.0f}s", flush=True)

    def say(self, text: str) -> None:
        """A line above the progress line."""
        if self.enabled:
            self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Finish the line, the file and wandb's run."""
        if not self.enabled:
            return
        self._progress.stop()
        self._stream.close()
        if self._wandb is not None:
            self._wandb.finish()


def _for_wandb(record: dict[str, Any]) -> dict[str, Any]:
    """Lists of one number a layer become a curve each, which wandb can draw: gate/sink_share/layer_3."""
    values: dict[str, Any] = {}
    for key, value in record.items():
        if key.startswith(("gate/", "gradient_density/")) and isinstance(value, list):
            numbers: dict[str, Any] = {
                f"{key}/layer_{i}": x for i, x in enumerate(value) if isinstance(x, (int, float))
            }
            values.update(numbers or {key: value})
        elif key != "step":
            values[key] = value
    return values


def _start_wandb(config: RunConfig, folder: Path) -> Any:
    import wandb  # slow to import: only for those who asked

    mode: Any = config.wandb.mode
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        _LOG.warning("wandb.mode=online but no API key is set: logging offline to %s", folder / "wandb")
        mode = "offline"
    remembered = folder / "wandb_run_id"  # a resumed run goes on in the same chart
    if not remembered.exists():
        remembered.write_text(uuid.uuid4().hex)
    return wandb.init(
        id=remembered.read_text(),
        resume="allow",
        mode=mode,
        project=config.wandb.project,
        name=config.wandb.name or folder.name,
        dir=str(folder),
        config=to_dict(config),
        settings=wandb.Settings(silent=True),
    )
