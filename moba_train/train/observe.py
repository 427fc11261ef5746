"""A look at the model's own routing: rows go forward once, and every MoBA layer's picks are kept.

The pass is its own, without gradients: it changes no weight, no optimizer or random state and no training step, needs
no activations, and costs nothing while nobody looks. Picks are those that the layer's attention uses, under every
context-parallel strategy (routing does not depend on it: context_parallel/ring.py). Padding that a layout needs is left
out, so that nothing told of a row depends on the layout.

Letters: S rows of the whole context, T of them on this context rank, H query heads and G key heads of this tensor rank,
R = H // G, D head dim, K = top_k picks, n sampled queries, N blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.attention import SequenceInfo
from moba_train.context_parallel.ring import route
from moba_train.data.batch import Batch
from moba_train.data.loader import Loader, RowDataset
from moba_train.model.core_attention import CoreAttention, observed_by, set_layer_plan
from moba_train.model.layer_plan import LayerAttention, LayerKind
from moba_train.train.setup import Run
from moba_train.train.step import forward_rows

__all__ = ["ObservedLayer", "ObservedRow", "covered_mass", "observe", "queries_with_choice", "sample_rows"]

# Share of dense attention mass is measured on this many queries a row: their logits over all keys are formed.
_SAMPLED_QUERIES = 64


@dataclass(frozen=True)
class ObservedLayer:
    """A MoBA layer on one row: this rank's picks [T, H, K], and the dense attention mass that they cover.

    mass_H: summed over the row's sampled queries (all context ranks have the sum); None where no query had a choice.
    """

    picks_THK: Tensor
    mass_H: Tensor | None
    num_sampled: int


@dataclass(frozen=True)
class ObservedRow:
    """A whole row, where this rank's queries sit in it, and its MoBA layers held here, by number from 0."""

    plan: tuple[LayerAttention, ...]
    batch: Batch
    sequence: SequenceInfo
    layers: dict[int, ObservedLayer]


def sample_rows(run: Run, dataset: RowDataset, at_least: int) -> list[list[Batch]]:
    """The first rows of `dataset`, at least so many over all data ranks if it has them: this rank's part, as passes."""
    parallel = run.config.parallel
    a_pass = parallel.pipeline if parallel.virtual_pipeline > 1 else 1  # the interleaved schedule takes no fewer
    rows_per_pass = a_pass * run.groups.data.size
    passes = min(-(-at_least // rows_per_pass), len(dataset) // rows_per_pass)
    loader = Loader(
        dataset, global_batch_size=rows_per_pass, dp_rank=run.groups.data.rank, dp_size=run.groups.data.size
    )
    return [[next(loader) for _ in range(a_pass)] for _ in range(passes)]


def observe(run: Run, plan: tuple[LayerAttention, ...], rows: list[Batch]) -> list[ObservedRow]:
    """Send this data rank's `rows` through the model under `plan` and keep what its layers picked. All ranks call it.

    The number of rows is the same on all ranks; an interleaved pipeline takes multiples of its stages.
    """
    watch = _Watch(run.groups.context.group, rows)
    set_layer_plan(run.chunks, plan)
    with observed_by(watch, run.chunks):
        forward_rows(run, rows)
    return [
        ObservedRow(plan, batch, held, {layer: seen[i] for layer, seen in watch.layers.items()})
        for i, (batch, held) in enumerate(zip(rows, watch.held.values(), strict=True))
    ]


def queries_with_choice(seq: SequenceInfo, layer: LayerAttention) -> Tensor:
    """bool [T] on the host: queries with more earlier blocks than picks for them; others say nothing of the gate."""
    table = seq.blocks(layer.block_size)
    return table.own_T - table.first_T >= layer.top_k


@torch.no_grad()
def covered_mass(
    q_nHD: Tensor,
    k_TGD: Tensor,
    picks_nHK: Tensor,
    rows_n: Tensor,
    seq: SequenceInfo,
    layer: LayerAttention,
    scale: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Of the softmax over all keys at or before each query in its document, the share on its picks -> fp32 [n, H].

    k holds this rank's rows, those of `seq`; `rows_n` (host) are global. Partial sums are added up over `group`.
    """
    device, num_key_heads = q_nHD.device, k_TGD.shape[1]
    keys = seq.blocks(layer.block_size).on(device)
    whole = SequenceInfo(seq.cu_seqlens, rows_n).blocks(layer.block_size)
    position_T, position_n = seq.on(device).q_positions, rows_n.to(device)
    same_nT = whole.on(device).first_T[:, None] == keys.first_T
    hidden_nT = ~(same_nT & (position_T <= position_n[:, None]))
    ratio = q_nHD.shape[1] // num_key_heads
    picked_nHN = torch.zeros(*picks_nHK.shape[:2], keys.num_blocks + 1, dtype=torch.bool, device=device)
    spare_nHK = picks_nHK.long().masked_fill(picks_nHK < 0, keys.num_blocks)
    picked_nHN.scatter_(2, spare_nHK, True)
    most, sums = [], []
    for g in range(num_key_heads):  # one key head at a time: logits are [n, R, T]
        heads = slice(g * ratio, (g + 1) * ratio)
        logits_nRT = torch.einsum("nrd,td->nrt", q_nHD[:, heads].float(), k_TGD[:, g].float()) * scale
        logits_nRT.masked_fill_(hidden_nT[:, None], -torch.inf)
        lse_nR = logits_nRT.logsumexp(-1)
        logits_nRT.masked_fill_(~picked_nHN[:, heads][:, :, keys.own_T], -torch.inf)
        most.append(lse_nR)
        sums.append(logits_nRT.logsumexp(-1))
    all_nH, on_picks_nH = torch.cat(most, 1), torch.cat(sums, 1)
    top_nH = all_nH.clone()
    if group is not None and group.size() > 1:
        dist.all_reduce(top_nH, dist.ReduceOp.MAX, group=group)
    parts = torch.stack([all_nH, on_picks_nH]).sub_(top_nH).exp_()
    if group is not None and group.size() > 1:
        dist.all_reduce(parts, group=group)
    return parts[1] / parts[0]


@dataclass
class _Watch:
    """The observer of every layer held here. Layers come in order, micro-batch after micro-batch each.

    held: of each sequence seen, this rank's part of the row that was given, without padding.
    """

    group: dist.ProcessGroup
    rows: list[Batch]
    layers: dict[int, list[ObservedLayer]] = field(default_factory=dict)
    held: dict[SequenceInfo, SequenceInfo] = field(default_factory=dict)
    _sampled: dict[tuple[SequenceInfo, LayerAttention], Tensor] = field(default_factory=dict)

    def __call__(self, module: CoreAttention, q_THD: Tensor, k_TGD: Tensor, seq: SequenceInfo) -> None:
        if seq not in self.held:
            cu_seqlens, positions = self.rows[len(self.held)].cu_seqlens, seq.q_positions
            if positions is not None:
                positions = positions[positions < cu_seqlens[-1]]
            self.held[seq] = SequenceInfo(cu_seqlens, positions, positions)
        layer, held = module.layer, self.held[seq]
        if layer.kind is not LayerKind.MOBA:
            return
        # Padding is the end of a row, so of this rank's part too.
        q_THD, k_TGD = q_THD[: held.num_queries], k_TGD[: held.num_queries]
        picks_THK = route(q_THD, k_TGD, held, [self.group], layer.routing)
        if (held, layer) not in self._sampled:
            self._sampled[held, layer] = _sample(held, layer)
        mass_H, rows_n = None, self._sampled[held, layer]
        if len(rows_n):
            scale = q_THD.shape[2] ** -0.5 if module.softmax_scale is None else module.softmax_scale
            q_nHD, picks_nHK = (_from_all(x, rows_n, held, self.group) for x in (q_THD, picks_THK))
            mass_H = covered_mass(q_nHD, k_TGD, picks_nHK, rows_n, held, layer, scale, self.group).sum(0)
        self.layers.setdefault(module.layer_number - 1, []).append(ObservedLayer(picks_THK, mass_H, len(rows_n)))


def _sample(seq: SequenceInfo, layer: LayerAttention) -> Tensor:
    """Global rows (host) at even distances among those with a choice; the same on all context ranks."""
    rows = queries_with_choice(SequenceInfo(seq.cu_seqlens), layer).nonzero().flatten()
    step = max(1.0, len(rows) / _SAMPLED_QUERIES)
    return rows[((torch.arange(min(len(rows), _SAMPLED_QUERIES)) + 0.5) * step).long()]


def _from_all(x_T: Tensor, rows_n: Tensor, seq: SequenceInfo, group: dist.ProcessGroup) -> Tensor:
    """The global rows `rows_n` of a tensor whose rows the context ranks share."""
    positions = torch.arange(seq.num_keys) if seq.q_positions is None else seq.q_positions
    mine = torch.isin(rows_n, positions).nonzero().flatten()
    at = torch.searchsorted(positions, rows_n[mine])
    x_n = x_T.new_zeros(len(rows_n), *x_T.shape[1:])
    x_n[mine.to(x_T.device)] = x_T[at.to(x_T.device)]
    if group.size() > 1:
        dist.all_reduce(x_n, group=group)
    return x_n
