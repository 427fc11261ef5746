"""What the gate does, per layer and head: numbers for metrics.jsonl, the same on every layout, and what they mean.

Measured every `metrics.gate_every` steps and at the end, on the first validation rows, one a data rank, in a forward
pass of its own.
Only queries with a choice count: more earlier blocks than picks for them. Only picks of earlier blocks count: the own
block is no choice. Lists have an entry per layer, from 0: None in full layers, and where there was nothing to count.

    gate/load_max_over_mean   most picked block of a row over the mean block, mean over heads and rows (1: even)
    gate/sink_share           share of picks that fall on the first block of a document
    gate/distance_blocks      own block minus picked block, mean (1: the neighbour)
    gate/distance_tokens      query minus middle of the picked block, mean
    gate/mass_covered         share of dense attention's softmax on the picks, own block included; 64 queries a row
    gate/choice               share of queries with a choice
    gate/pick_rate            a list a layer: of the queries that could pick the i-th block of their document, the share
                              that did. An entry is gate/pick_rate_tokens[layer] tokens: at most 64 entries a layer
    gate/seconds              what the measurement took
    gradient_density/...      loss, pairs, positions, direct: see gradient_density.py

`metrics.gate_per_head=true` adds the first five and gradient_density/pairs as `..._by_head`: a list of heads a layer.

Letters: T queries of this context rank, H query heads of this tensor rank, N blocks of a row, L layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.attention import SequenceInfo
from moba_train.model.layer_plan import LayerAttention, LayerKind, layer_plan
from moba_train.train.gradient_density import GradientDensity, density_of
from moba_train.train.observe import ObservedRow, observe, queries_with_choice, sample_rows
from moba_train.train.setup import Run

__all__ = ["block_loads", "gate_record", "gate_sums"]

_COLUMNS = 64  # of gate/pick_rate and gate.png
# What is summed over rows, per layer and head.
_SUMS = ("picks", "sink", "blocks", "tokens", "load", "rows", "mass", "sampled")
_MEANS = {  # metric -> which sum over which
    "load_max_over_mean": ("load", "rows"),
    "sink_share": ("sink", "picks"),
    "distance_blocks": ("blocks", "picks"),
    "distance_tokens": ("tokens", "picks"),
    "mass_covered": ("mass", "sampled"),
}
# What is summed over rows, per layer: picks and possible picks by column, queries with a choice and all.
_LAYER_SUMS = 2 * _COLUMNS + 2


def gate_record(run: Run, rows: int = 1) -> dict[str, Any]:
    """Measure gate and gradient density by the plan of the step just done, on at least `rows` validation rows.

    All ranks call it; all get the record for metrics.jsonl.
    """
    started = time.perf_counter()
    config = run.config
    plan = layer_plan(config.attention, config.model.num_layers, max(run.step - 1, 0))
    passes = sample_rows(run, run.data.valid, rows)
    observed = [row for batches in passes for row in observe(run, plan, batches)]
    per_head, length = config.metrics.gate_per_head, config.train.sequence_length
    record = _gate_metrics(*_totals(run, plan, observed), plan, length, per_head)
    record |= _density_metrics(density_of(run, observed, plan), per_head)
    return {"step": run.step, **record, "gate/seconds": round(time.perf_counter() - started, 4)}


def block_loads(picks_THK: Tensor, choice_T: Tensor, own_T: Tensor, num_blocks: int) -> Tensor:
    """int64 [H, N]: how many queries with a choice picked each block, their own aside."""
    num_heads = picks_THK.shape[1]
    loads_HN = torch.zeros(num_heads, num_blocks + 1, dtype=torch.int64, device=picks_THK.device)
    for h in range(num_heads):  # one at a time: int64 copies of all picks would be large
        picks_TK = picks_THK[:, h]
        counted_TK = (picks_TK >= 0) & (picks_TK != own_T[:, None]) & choice_T[:, None]
        blocks = torch.where(counted_TK, picks_TK, num_blocks).flatten().long()
        loads_HN[h].scatter_add_(0, blocks, torch.ones_like(blocks))
    return loads_HN[:, :num_blocks]


def gate_sums(loads_HN: Tensor, seq: SequenceInfo, layer: LayerAttention) -> tuple[Tensor, Tensor]:
    """What the loads of a whole row say: fp64 [H, 6], the first six of `_SUMS`, and fp64 [2, N]: picks of each block
    by all heads, and how many there could have been. `seq` has all rows; everything is on the host."""
    table = seq.blocks(layer.block_size)
    rows_c = queries_with_choice(seq, layer).nonzero().flatten()
    own_c, loads_HN = table.own_T[rows_c], loads_HN.double()
    # Queries with a choice whose own block comes later in the document could have picked the block.
    until_N = torch.bincount(own_c, minlength=table.num_blocks).cumsum(0)
    could_N = until_N[table.first_block[table.document_N + 1] - 1] - until_N
    # Such a query fills all its picks, so how far they reach in all follows from where they landed.
    earlier, middle_N = layer.top_k - 1, (table.start_N + table.end_N - 1) / 2.0
    ids_N = torch.arange(table.num_blocks)
    blocks_H = earlier * own_c.sum() - loads_HN @ ids_N.double()
    tokens_H = earlier * rows_c.sum() - loads_HN @ middle_N.double()
    picks_H = loads_HN.sum(1)
    sink_H = loads_HN[:, ids_N == table.first_block[table.document_N]].sum(1)
    mean_H = picks_H / max(int((could_N > 0).sum()), 1)
    counted = earlier > 0 and len(rows_c) > 0
    load_H = loads_HN.amax(1) / mean_H if counted else torch.zeros_like(picks_H)
    rows_H = torch.full_like(picks_H, float(counted))
    sums_HC = torch.stack([picks_H, sink_H, blocks_H, tokens_H, load_H, rows_H], 1)
    return sums_HC, torch.stack([loads_HN.sum(0), could_N.double() * len(loads_HN) * (earlier > 0)])


def _totals(run: Run, plan: tuple[LayerAttention, ...], observed: list[ObservedRow]) -> tuple[Tensor, Tensor]:
    """Sums over all rows, per head [L, H of all ranks, 8] and per layer [L, 2 * 64 + 2]; on the host of every rank."""
    model, tensor = run.config.model, run.groups.tensor
    heads = model.num_attention_heads // tensor.size
    by_head = torch.zeros(len(plan), model.num_attention_heads, len(_SUMS), dtype=torch.float64)
    by_layer = torch.zeros(len(plan), _LAYER_SUMS, dtype=torch.float64)
    for row, number, loads_HN in _whole_loads(run, plan, observed):
        layer, seen, whole = plan[number], row.layers[number], SequenceInfo(row.batch.cu_seqlens)
        if run.groups.context.rank != 0:  # the first context rank speaks for all: each has the whole row's loads
            continue
        sums_HC, picks_2N = gate_sums(loads_HN, whole, layer)
        mine_HC = by_head[number, tensor.rank * heads : (tensor.rank + 1) * heads]
        mine_HC[:, :6] += sums_HC
        if seen.mass_H is not None:
            mine_HC[:, 6:] += torch.stack(
                [seen.mass_H.double().cpu(), torch.full((heads,), float(seen.num_sampled))], 1
            )
        table = whole.blocks(layer.block_size)
        place_N = table.start_N - whole.cu_seqlens[table.document_N]
        column_N = place_N // _column_tokens(run.config.train.sequence_length, layer)
        by_layer[number, :-2].view(2, _COLUMNS).index_add_(1, column_N, picks_2N)
        choice_S = queries_with_choice(whole, layer)
        by_layer[number, -2:] += torch.tensor([int(choice_S.sum()), len(choice_S)])
    flat = torch.cat([by_head.flatten(), by_layer.flatten()]).to(run.device)
    dist.all_reduce(flat)
    by_head_flat, by_layer_flat = flat.cpu().split([by_head.numel(), by_layer.numel()])
    return by_head_flat.view_as(by_head), by_layer_flat.view_as(by_layer)


def _whole_loads(
    run: Run, plan: tuple[LayerAttention, ...], observed: list[ObservedRow]
) -> Iterator[tuple[ObservedRow, int, Tensor]]:
    """(row, layer, [H, N] on the host) of the MoBA layers held here, summed over context ranks."""
    loads = []
    for row in observed:
        for number, seen in row.layers.items():
            table = row.sequence.blocks(plan[number].block_size)
            choice_T = queries_with_choice(row.sequence, plan[number]).to(run.device)
            loads_HN = block_loads(seen.picks_THK, choice_T, table.on(run.device).own_T, table.num_blocks)
            loads.append((row, number, loads_HN))
    if loads:
        flat = torch.cat([x.flatten() for *_, x in loads])
        if run.groups.context.size > 1:
            dist.all_reduce(flat, group=run.groups.context.group)
        parts = flat.cpu().split([x.numel() for *_, x in loads])  # one wait for the device
        yield from ((row, number, part.view_as(x)) for part, (row, number, x) in zip(parts, loads, strict=True))


def _column_tokens(sequence_length: int, layer: LayerAttention) -> int:
    """Tokens that an entry of gate/pick_rate covers: a block, or so many blocks that at most 64 entries are left."""
    blocks = -(-sequence_length // layer.block_size)
    return layer.block_size * -(-blocks // _COLUMNS)


def _gate_metrics(
    by_head: Tensor, by_layer: Tensor, plan: tuple[LayerAttention, ...], sequence_length: int, per_head: bool
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    sums = dict(zip(_SUMS, by_head.unbind(-1), strict=True))
    for name, (of, over) in _MEANS.items():
        of_LH, over_LH = sums[of], sums[over]
        record[f"gate/{name}"] = [_ratio(*x) for x in zip(of_LH.sum(1), over_LH.sum(1), strict=True)]
        if per_head:
            heads = [[_ratio(*x) for x in zip(*layer, strict=True)] for layer in zip(of_LH, over_LH, strict=True)]
            layers = zip(heads, record[f"gate/{name}"], strict=True)
            record[f"gate/{name}_by_head"] = [None if mean is None else layer for layer, mean in layers]
    record["gate/choice"] = [_ratio(*x) for x in by_layer[:, -2:]]
    record["gate/pick_rate"], record["gate/pick_rate_tokens"] = [], []
    for layer, sums_X in zip(plan, by_layer[:, :-2].unflatten(1, (2, _COLUMNS)), strict=True):
        moba, width = layer.kind is LayerKind.MOBA, _column_tokens(sequence_length, layer)
        rates = [_ratio(*x) for x in sums_X.T[: -(-sequence_length // width)]]
        record["gate/pick_rate"].append(rates if moba else None)
        record["gate/pick_rate_tokens"].append(width if moba else None)
    return record


def _density_metrics(density: GradientDensity, per_head: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"gradient_density/loss": round(density.loss, 6)}
    for name in ("pairs", "positions", "direct"):
        record[f"gradient_density/{name}"] = [round(x, 6) for x in getattr(density, name)]
    if per_head:
        record["gradient_density/pairs_by_head"] = [[round(x, 6) for x in layer] for layer in density.by_head]
    return record


def _ratio(of: Tensor, over: Tensor) -> float | None:
    return round(float(of / over), 6) if over > 0 else None
