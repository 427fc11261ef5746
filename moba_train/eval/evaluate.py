"""A first look at a model's long context: loss by position and a passkey grid, from command line to report.

Everything that can be refused is, before any process group exists. The process group is data x context x tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from moba_train import device as devices
from moba_train.config.schema import ConfigError
from moba_train.eval.documents import Documents
from moba_train.eval.model import Model, Source, check_length, close, find_source, open_model
from moba_train.eval.passkey import Cell, build_case, passkey_grid
from moba_train.eval.position_loss import PositionLoss, documents_of_length, position_loss
from moba_train.eval.report import draw, print_tables
from moba_train.model.layer_plan import describe

__all__ = ["TASKS", "EvaluateArguments", "evaluate"]

TASKS = ("position", "passkey")
_T = TypeVar("_T")


@dataclass(frozen=True)
class EvaluateArguments:
    """What launch/evaluate.py is asked for. overrides: key=value settings of the model's configuration."""

    checkpoint: str
    output: str
    overrides: tuple[str, ...] = ()
    data: str | None = None  # None: what the model was trained on
    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = ()  # none: the length the model was made for
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 4
    distractors: int = 3
    documents: int = 64
    buckets: int = 16
    context: int | None = None  # loss by position a second time, from so many tokens of context at most
    seed: int = 1234


def evaluate(arguments: EvaluateArguments) -> int:
    """Evaluate, print tables and write evaluation.json and pictures to `output`. Returns the exit code.

    Raises ConfigError for what cannot work.
    """
    _check(arguments)
    source = find_source(arguments.checkpoint, list(arguments.overrides))
    lengths = sorted(set(arguments.lengths)) or [source.trained_length]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    for length in lengths:
        check_length(source.config, world_size, length, "--lengths")
    documents = _documents(arguments, source)
    chosen = {}
    if "position" in arguments.tasks:
        chosen = {length: documents_of_length(documents, length, arguments.documents) for length in lengths}
    if "passkey" in arguments.tasks:
        build_case(documents, lengths[0], 0.0, 0, distractors=arguments.distractors, seed=arguments.seed)

    output = Path(arguments.output)
    try:
        output.mkdir(parents=True, exist_ok=True)  # by all ranks: a refusal is all theirs
    except OSError as error:
        raise ConfigError("--output", str(output), f"cannot be made ({error.strerror}); choose another") from None
    model = open_model(source)
    first = model.groups.world_rank == 0
    losses, cells = _measure(model, documents, arguments, lengths, chosen, show=first)
    if first:
        title = _title(source)
        print_tables(title, losses, cells)
        record = _record(arguments, source, model, documents, losses, cells)
        (output / "evaluation.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        for path in (output / "evaluation.json", *draw(output, title, losses, cells, source.trained_length)):
            print(path)
    close()
    return 0


def _check(arguments: EvaluateArguments) -> None:
    for key, value, good, remedy in (
        ("--tasks", arguments.tasks, set(arguments.tasks) <= set(TASKS) and arguments.tasks, f"choose {TASKS}"),
        ("--lengths", arguments.lengths, all(n >= 2 for n in arguments.lengths), "must be at least 2"),
        ("--depths", arguments.depths, arguments.depths, "give at least one"),
        ("--depths", arguments.depths, all(0 <= d <= 1 for d in arguments.depths), "must lie between 0 and 1"),
        ("--samples", arguments.samples, arguments.samples >= 1, "must be at least 1"),
        ("--distractors", arguments.distractors, arguments.distractors >= 0, "must be at least 0"),
        ("--documents", arguments.documents, arguments.documents >= 1, "must be at least 1"),
        ("--context", arguments.context, arguments.context is None or arguments.context >= 4, "must be at least 4"),
        ("--buckets", arguments.buckets, arguments.buckets >= 1, "must be at least 1"),
    ):
        if not good:
            raise ConfigError(key, value, remedy)
    if Path(arguments.output).exists() and not Path(arguments.output).is_dir():
        raise ConfigError("--output", arguments.output, "is a file; name a folder")


def _documents(arguments: EvaluateArguments, source: Source) -> Documents:
    data = source.config.data
    path = arguments.data or data.path or next(iter(data.blend or {}), None)
    if path is None:
        raise ConfigError("--data", None, "name a prepared folder: its validation documents are what is read")
    documents = Documents(path)
    documents.check_model(source.config.model.vocab_size, source.tokenizer)
    return documents


def _measure(
    model: Model,
    documents: Documents,
    arguments: EvaluateArguments,
    lengths: list[int],
    chosen: dict[int, list[int]],
    show: bool,
) -> tuple[list[PositionLoss], list[Cell]]:
    console = Console(stderr=True)

    def progress(items: Iterable[_T], title: str) -> Iterator[_T]:
        yield from track(list(items), title, console=console, transient=True, disable=not show)

    pairs: list[tuple[int, int | None]] = [(length, None) for length in lengths if length in chosen]
    if arguments.context is not None:
        pairs += [(length, arguments.context) for length, _ in pairs if arguments.context < length]
    losses = [
        position_loss(
            model,
            documents,
            chosen[length],
            length,
            arguments.buckets,
            lambda x: progress(x, "loss by position"),
            context,
        )
        for length, context in pairs
    ]
    if "passkey" not in arguments.tasks:
        return losses, []
    cells = passkey_grid(
        model,
        documents,
        lengths,
        sorted(set(arguments.depths)),
        samples=arguments.samples,
        distractors=arguments.distractors,
        seed=arguments.seed,
        progress=lambda x: progress(x, "passkey"),
    )
    return losses, cells


def _title(source: Source) -> str:
    step = "" if source.step is None else f" at step {source.step}"
    return f"{source.config.model.name}{step}, made for {source.trained_length:,} tokens"


def _record(
    arguments: EvaluateArguments,
    source: Source,
    model: Model,
    documents: Documents,
    losses: list[PositionLoss],
    cells: list[Cell],
) -> dict[str, Any]:
    shape = source.config.model
    axes = {name: getattr(model.groups, name).size for name in ("tensor", "context", "data")}
    by_length = [asdict(loss) for loss in losses]
    for entry in by_length:
        entry["by_position"] = [loss if loss == loss else None for loss in entry["by_position"]]  # NaN is no JSON
    return {
        "checkpoint": str(source.path),
        "step": source.step,
        "arguments": asdict(arguments),
        "model": shape.name,
        "layers": describe(source.plan),
        "trained_length": source.trained_length,
        "rope_base": shape.rope_base,
        "rope_scaling": asdict(shape.rope_scaling),
        "precision": source.config.precision,
        "data": str(documents.path.resolve()),
        "bytes_per_token": documents.info.bytes_per_token,
        "device": f"{model.groups.world_size} x {devices.device_name()}",
        "layout": axes,
        "loss_by_position": by_length,
        "passkey": [asdict(cell) for cell in cells],
    }
