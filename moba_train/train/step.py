"""One optimizer step, and one validation: micro-batches through megatron-core's schedules, sums over all ranks after.

Letters: T tokens of this context rank.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from moba_train.attention import SequenceInfo
from moba_train.config.schema import RunConfig
from moba_train.config.validate import padded_length
from moba_train.context_parallel.layout import RULES
from moba_train.data.batch import Batch
from moba_train.data.loader import Loader
from moba_train.model.core_attention import RowParams, set_layer_plan
from moba_train.model.layer_plan import layer_plan
from moba_train.model.rope import Frequencies, rotary_table
from moba_train.parallel.groups import Groups
from moba_train.parallel.watchdog import phase
from moba_train.train.flops import training_flops
from moba_train.train.loss import masked_sum, position_sums
from moba_train.train.setup import Run

__all__ = ["HasModel", "Row", "StepResult", "Validation", "forward_rows", "to_row", "train_step", "validate_model"]


@dataclass(frozen=True)
class StepResult:
    """What a step did, summed over all ranks. loss is nats per token; flops the whole step's model FLOPs."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    flops: int
    stop: bool


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats per token, and by position bucket (nan where no token fell)."""

    loss: float
    by_position: list[float]


class HasModel(Protocol):
    """What a row is laid out for: a run in training, or a model that is only asked."""

    config: RunConfig
    groups: Groups
    device: torch.device
    frequencies: Frequencies


@dataclass(frozen=True)
class Row:
    """One micro-batch on this rank's device."""

    batch: Batch
    params: RowParams


def train_step(run: Run, stop_requested: bool) -> StepResult:
    """One optimizer step on the loader's next global batch. `stop` is true when any rank was asked to stop."""
    config = run.config
    plan = layer_plan(config.attention, config.model.num_layers, run.step)
    set_layer_plan(run.chunks, plan)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    flops = 0
    step = f"step {run.step + 1}"

    def counted(batches: Iterator[Batch]) -> Iterator[Batch]:
        nonlocal flops
        for batch in batches:
            lengths = batch.cu_seqlens.diff().tolist()
            flops += training_flops(config.model, plan, lengths, config.attention.key_conv)
            yield batch

    weights = _WeightSum(run.device)
    _prepare_schedule(run, weights)
    report = functools.partial(_loss_sums, weights=weights)
    sums = _run_schedule(run, counted(_global_batch(run.loader)), report, 2, step)
    phase(f"{step}: loss")
    # One collective for the loss, the token count, the counted FLOPs and the wish to stop.
    mine = run.groups.tensor.rank == 0
    share = 1 / (run.groups.context.size * run.groups.pipeline.size)  # data ranks count different rows, these the same
    stats = torch.stack(
        [
            *(sums if mine else torch.zeros_like(sums)),
            torch.tensor(flops * share * mine).to(sums),
            torch.tensor(stop_requested).to(sums),
        ]
    )
    dist.all_reduce(stats)
    loss_sum, count, all_flops, stop = stats.tolist()

    phase(f"{step}: optimizer")
    run.scheduler.step(increment=1)
    learning_rate = max(group["lr"] for group in run.optimizer.param_groups)
    succeeded, grad_norm, _ = run.optimizer.step()
    assert succeeded
    run.step += 1
    tokens = config.train.global_batch_size * config.train.sequence_length
    run.tokens += tokens
    return StepResult(
        loss=loss_sum / count if count else 0.0,
        grad_norm=float(grad_norm),
        learning_rate=learning_rate,
        tokens=tokens,
        flops=round(all_flops),
        stop=stop > 0,
    )


def validate_model(run: Run) -> Validation:
    """Loss over the validation rows, by the plan of the step just done; the same rows at every call."""
    config = run.config
    plan = layer_plan(config.attention, config.model.num_layers, max(run.step - 1, 0))
    set_layer_plan(run.chunks, plan)
    loader = Loader(
        run.data.valid,
        global_batch_size=config.train.global_batch_size,
        dp_rank=run.groups.data.rank,
        dp_size=run.groups.data.size,
    )
    report = functools.partial(
        _position_report, buckets=config.metrics.position_buckets, length=config.train.sequence_length
    )
    total = torch.zeros(2, config.metrics.position_buckets, dtype=torch.float64, device=run.device)
    where = f"validation after step {run.step}"
    for chunk in run.chunks:
        chunk.eval()
    with torch.no_grad():
        for _ in range(-(-run.data.valid.num_rows // config.train.global_batch_size)):
            sums = _run_schedule(run, _global_batch(loader), report, total.numel(), where, forward_only=True)
            total += sums.view_as(total)
    for chunk in run.chunks:
        chunk.train()
    if run.groups.tensor.rank != 0:
        total.zero_()
    dist.all_reduce(total)
    sums, counts = total.tolist()
    by_position = [s / n if n else float("nan") for s, n in zip(sums, counts, strict=True)]
    return Validation(loss=sum(sums) / sum(counts) if any(counts) else 0.0, by_position=by_position)


class _WeightSum:
    """The loss weights of a step: what gradients are divided by. megatron-core counts whole tokens only."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def finalize(self, model: list[torch.nn.Module], num_tokens: torch.Tensor, **kwargs: Any) -> None:
        """megatron-core's finish of a step, with the weights of this rank in place of its count of tokens."""
        finalize_model_grads(model, self.total, **kwargs)


def forward_rows(run: Run, rows: list[Batch]) -> None:
    """Whole rows as micro-batches through the model, forward alone, for what listens on the way; by the plan set."""
    for chunk in run.chunks:
        chunk.eval()
    with torch.no_grad():
        _run_schedule(run, iter(rows), _nothing, 1, "observation", forward_only=True, count=len(rows))
    for chunk in run.chunks:
        chunk.train()


def _global_batch(loader: Loader) -> Iterator[Batch]:
    """This rank's micro-batches of one global batch, read as the schedule asks for them."""
    return itertools.islice(loader, loader.micro_batches_per_step)


def _run_schedule(
    run: Run,
    batches: Iterator[Batch],
    report: Callable[..., torch.Tensor],
    report_size: int,
    where: str,
    forward_only: bool = False,
    count: int | None = None,
) -> torch.Tensor:
    """`count` micro-batches (None: a global batch) through the pipeline; this rank's summed report (zeros off the
    last stage)."""
    rows = (to_row(run, batch) for batch in batches)
    iterators = list(itertools.tee(rows, len(run.chunks))) if len(run.chunks) > 1 else [rows]
    reports = get_forward_backward_func()(
        forward_step_func=functools.partial(_forward_step, report=report, where=where),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=run.chunks if len(run.chunks) > 1 else run.chunks[0],
        num_microbatches=count or run.config.train.global_batch_size // run.groups.data.size,
        seq_length=padded_length(run.config.train.sequence_length, run.config),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if reports:
        return torch.stack(reports).sum(0)
    return torch.zeros(report_size, dtype=torch.float64, device=run.device)


def _forward_step(
    rows: Iterator[Row], model: torch.nn.Module, report: Callable[..., torch.Tensor], where: str
) -> tuple[torch.Tensor, Any]:
    phase(f"{where}: data")
    row = next(rows)
    phase(f"{where}: forward and backward")
    batch = row.batch
    output = model(
        batch.tokens[None], batch.positions[None], None, labels=batch.labels[None], packed_seq_params=row.params
    )

    def loss(losses: torch.Tensor, non_loss_data: bool = False) -> Any:
        losses_T = losses.reshape(-1)
        total, _ = masked_sum(losses_T, batch.loss_mask)
        count = (batch.loss_mask > 0).sum().to(torch.int32)
        return total, count, report(losses_T.detach(), batch)

    return output, loss


def _loss_sums(losses_T: torch.Tensor, batch: Batch, weights: _WeightSum) -> torch.Tensor:
    total, weight = masked_sum(losses_T, batch.loss_mask)
    weights.total += weight
    return torch.stack([total.double(), weight])


def _nothing(losses_T: torch.Tensor, batch: Batch) -> torch.Tensor:
    return losses_T.new_zeros(1, dtype=torch.float64)


def _position_report(losses_T: torch.Tensor, batch: Batch, buckets: int, length: int) -> torch.Tensor:
    return position_sums(losses_T, batch.loss_mask, batch.positions, buckets, length).reshape(-1)


def to_row(run: HasModel, batch: Batch) -> Row:
    """Pad the row, cut it to this context rank and lay out what every layer needs to know of it."""
    context = run.groups.context
    batch = batch.pad(padded_length(len(batch.tokens), run.config))
    if context.size > 1:
        rule = RULES[run.config.parallel.context_layout]
        batch = batch.shard(rule(len(batch.tokens), context.size, batch.cu_seqlens.tolist()), context.rank)
    batch = batch.to(run.device)
    params = RowParams(
        qkv_format="thd",
        sequence=SequenceInfo(batch.cu_seqlens, q_positions=batch.q_positions),
        rotary=rotary_table(batch.positions, run.frequencies),
    )
    return Row(batch, params)


def _prepare_schedule(run: Run, weights: _WeightSum) -> None:
    """Tell megatron-core's schedules how to scale, overlap and finish gradients; cheap, and idempotent."""
    config = get_model_config(run.chunks[0])
    config.finalize_model_grads_func = weights.finalize
    config.grad_scale_func = run.optimizer.scale_loss
    if run.config.parallel.overlap_grad_reduce:
        single = len(run.chunks) == 1
        config.no_sync_func = run.chunks[0].no_sync if single else [chunk.no_sync for chunk in run.chunks]
        if run.config.parallel.distributed_optimizer:
            starts = [chunk.start_param_sync for chunk in run.chunks]
            config.param_sync_func = starts[0] if single else starts
