"""Small training runs for tests: a corpus of real text, a tiny hybrid model, losses and gradient norms step by step."""

from __future__ import annotations

import gc
import logging
import math
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moba_train.config.compose import compose
from moba_train.config.schema import ModelConfig, RunConfig
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import GRAD_NORM_RTOL, LOSS_RTOL

__all__ = [
    "SMALL",
    "Trained",
    "assert_same_training",
    "corpus",
    "log_messages",
    "losses",
    "losses_of_layouts",
    "shape_overrides",
    "small_config",
    "train_layouts",
]

Trained = tuple[list[tuple[float, float]], float]  # (loss, gradient norm) of every step, validation loss after the last

# Recipe tiny shrunk to milliseconds a step: four layers, MoBA and full in turn, documents of many blocks.
SMALL = [
    "recipe=tiny",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=4",
    "model.head_dim=8",
    "model.vocab_size=512",
    "attention.pattern=moba,full",
    "attention.dense_last_layers=0",
    "attention.block_size=16",
    "attention.top_k=3",
    "train.sequence_length=128",
    "train.global_batch_size=4",
    "train.steps=20",
    "train.validate_every=0",
    "train.validation_batches=1",
    "optim.warmup_steps=2",
    "checkpoint.save_every=0",
]


def corpus(folder: Path) -> Path:
    """A prepared folder of a few standard-library sources: text that does not change with this project."""
    from moba_train.data.prepare import PrepareArguments, prepare

    library = Path(sysconfig.get_path("stdlib"))
    sources = tuple(str(library / name) for name in ("bisect.py", "colorsys.py", "heapq.py", "sched.py", "this.py"))
    prepare(PrepareArguments(inputs=sources, output=str(folder), vocab_size=384, valid_fraction=0.3))
    return folder


def small_config(data: Path, run: Path, *overrides: str) -> RunConfig:
    """`SMALL` on this corpus and run folder."""
    return compose([*SMALL, f"data.path={data}", f"run.dir={run}", *overrides])


def shape_overrides(model: ModelConfig) -> list[str]:
    """The overrides that give a recipe this model's shape."""
    keys = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    more = (
        "num_layers",
        "qkv_bias",
        "qk_norm",
        "tie_embeddings",
        "rope_base",
        "norm_epsilon",
        "max_position_embeddings",
    )
    return [f"model.{key}={getattr(model, key)}" for key in (*keys, *more)]


def losses(config: RunConfig, steps: int, save: bool = False) -> list[tuple[float, float]]:
    """(loss, gradient norm) of `steps` steps from where the configuration starts; then perhaps a checkpoint."""
    return _train(config, steps, save)[0]


def _train(config: RunConfig, steps: int, save: bool = False, validate: bool = False) -> Trained:
    """The validation loss is nan unless asked for."""
    from megatron.core import parallel_state

    from moba_train.train import checkpoint
    from moba_train.train.setup import preflight, setup
    from moba_train.train.step import train_step, validate_model

    torch.set_num_threads(1)
    preflight(config)
    run = setup(config)
    try:
        results = [train_step(run, stop_requested=False) for _ in range(steps)]
        if save:
            checkpoint.save(run)
        validation = validate_model(run).loss if validate else math.nan
        return [(result.loss, result.grad_norm) for result in results], validation
    finally:
        parallel_state.destroy_model_parallel()  # the process group belongs to the spawned test
        if torch.cuda.is_available():  # for the next layout's model
            del run
            gc.collect()
            torch.cuda.empty_cache()


def losses_of_layouts(
    rank: int,
    world_size: int,
    data: Path,
    root: Path,
    layouts: dict[str, list[str]],
    steps: int,
    model: tuple[str, ...] = (),
) -> dict[str, Trained]:
    """Per named layout, curve and validation loss from the same initial weights, saved by the one-process call.

    model: overrides that change the weights' shapes, and so have initial weights of their own.
    """
    initial = root / "-".join(["initial", *model])
    if not initial.exists():
        assert world_size == 1
        losses(small_config(data, initial, *model), 0, save=True)
    start = [f"checkpoint.load={initial}", "checkpoint.load_weights_only=true", *model]
    return {
        name: _train(small_config(data, root / name, *start, *overrides), steps, validate=True)
        for name, overrides in layouts.items()
    }


@contextmanager
def log_messages() -> Iterator[list[str]]:
    """What the log says from INFO on, also in a spawned rank, which pytest's caplog does not reach."""
    messages: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Kept(), logging.getLogger("moba_train")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def train_layouts(
    root: Path,
    world_size: int,
    layouts: dict[str, list[str]],
    steps: int,
    model: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, Trained]:
    """`losses_of_layouts` on as many ranks, which must agree; one process makes the initial weights for all others.

    options: run_distributed's.
    """
    data = root / "data"
    if not data.exists():
        corpus(data)
    by_rank = run_distributed(losses_of_layouts, world_size, data, root, layouts, steps, model, **options)
    assert all(result == by_rank[0] for result in by_rank), "ranks disagree about a loss or gradient norm"
    return by_rank[0]


def assert_same_training(trained: Trained, expected: Trained) -> None:
    """Equal to rounding in fp32: every step's loss and gradient norm, and the validation loss."""
    losses, norms = zip(*trained[0], strict=True)
    expected_losses, expected_norms = zip(*expected[0], strict=True)
    assert losses == pytest.approx(expected_losses, rel=LOSS_RTOL)
    assert norms == pytest.approx(expected_norms, rel=GRAD_NORM_RTOL)
    assert trained[1] == pytest.approx(expected[1], rel=LOSS_RTOL)
