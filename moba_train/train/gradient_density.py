"""Gradient density: how many keys and values learn from the loss tokens, per layer, exactly, from the picks.

Under sparse attention a loss token's gradient reaches few positions, which makes learning from sparse loss masks slow
(MoBA report, arXiv 2502.13189, section 3.2). Two measures, each a share in [0, 1]:

* Through all layers. Let R be the rows whose hidden state has a gradient at a layer's output: at the last layer those
  that carry loss. In the layer, the queries in R send gradient to every key and value they attend to (full: all at or
  before them in their document; MoBA: picked blocks, their own up to themselves). Below it, R has grown by those rows.
  `pairs` is the share of (row, key head) pairs whose key or value has a gradient, `positions` that of rows.
* Direct: the same with R fixed to the loss tokens, that is, what their own queries reach in the layer, without a detour
  through other positions in layers above.

Every query reaches itself, so one full layer makes all layers below it as dense as they can be: the first measure is
saturated by any dense last layer, though loss goes on falling with more of them. The second grows with each.
With a key convolution (attention.key_conv) the rows that it mixes into a reached key join R too.
"Non-zero" means by structure: a gradient that underflows counts. What a value gets decides (a key that is the only one
its query sees gets exactly none).

Letters: S rows of a whole row, A = 2 sources (through, direct), H query and G key heads, N blocks, K picks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from moba_train.attention import SequenceInfo
from moba_train.config.schema import ModelConfig
from moba_train.model.layer_plan import LayerAttention, LayerKind
from moba_train.parallel.groups import Groups
from moba_train.train.observe import ObservedRow, observe
from moba_train.train.setup import Run

__all__ = ["GradientDensity", "density_of", "gradient_density", "picked_blocks", "trace"]

# (layer, sources_AS) -> bool [A, G, N]: blocks before their own that queries among the sources picked, any rank's.
Picked = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class GradientDensity:
    """Per layer of the model, from 0; loss is the share of rows that carry loss. `by_head` are `pairs` a key head."""

    loss: float
    pairs: list[float]
    positions: list[float]
    direct: list[float]
    by_head: list[list[float]]

    @property
    def mean_direct(self) -> float:
        """Mean over layers of `direct`."""
        return sum(self.direct) / len(self.direct)


def gradient_density(run: Run, passes: list[list], plan: tuple[LayerAttention, ...]) -> GradientDensity:
    """Density under `plan` on this data rank's `passes` of rows (observe.sample_rows). All ranks call it together."""
    return density_of(run, [row for rows in passes for row in observe(run, plan, rows)], plan)


def density_of(run: Run, observed: list[ObservedRow], plan: tuple[LayerAttention, ...]) -> GradientDensity:
    """Density under `plan` of rows observed already, the same on every rank.

    `plan` may be the observed one or have more dense last layers: the picks below them are the same.
    """
    model, groups = run.config.model, run.groups
    through_LG = torch.zeros(model.num_layers, model.num_key_value_heads, dtype=torch.int64, device=run.device)
    direct_L, positions_L = through_LG.new_zeros(2, model.num_layers)
    rows_2 = through_LG.new_zeros(2)
    for row in observed:
        sparse = [layer for layer in range(len(plan)) if plan[layer].kind is LayerKind.MOBA]
        assert all(plan[layer] == row.plan[layer] for layer in sparse), "the plan needs picks that were not observed"
        loss_S = row.batch.loss_mask.to(run.device) != 0
        rows_2 += torch.stack([loss_S.sum(), loss_S.new_ones(()) * len(loss_S)])
        whole = SequenceInfo(row.batch.cu_seqlens)
        picked = _picked_anywhere(row, whole, plan, model, groups)
        for layer, reached_AGS in trace(plan, whole, loss_S, picked, run.config.attention.key_conv):
            reached_AGS = reached_AGS.expand(-1, model.num_key_value_heads, -1)
            through_LG[layer] += reached_AGS[0].sum(-1)
            positions_L[layer] += reached_AGS[0].any(0).sum()
            direct_L[layer] += reached_AGS[1].sum()
    totals = torch.cat([rows_2, positions_L, direct_L, through_LG.flatten()])
    dist.all_reduce(totals, group=groups.data.group)  # other axes have counted the same
    loss, rows, *counts = totals.tolist()
    layers, heads, rows = model.num_layers, model.num_key_value_heads, max(rows, 1)
    through = [counts[i : i + heads] for i in range(2 * layers, len(counts), heads)]
    return GradientDensity(
        loss=loss / rows,
        pairs=[sum(layer) / (rows * heads) for layer in through],
        positions=[n / rows for n in counts[:layers]],
        direct=[n / (rows * heads) for n in counts[layers : 2 * layers]],
        by_head=[[n / rows for n in layer] for layer in through],
    )


def trace(
    plan: tuple[LayerAttention, ...], seq: SequenceInfo, loss_S: Tensor, picked: Picked, key_conv: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Backward through the layers: (layer, bool [A, G, S]), the rows and key heads whose value has a gradient.

    G is 1 in a full layer, where key heads do not differ.

    `seq` has all S rows; `picked` is asked of MoBA layers alone; `key_conv` is the convolution's width.
    """
    sources_AS = torch.stack([loss_S, loss_S])
    for number in reversed(range(len(plan))):
        layer = plan[number]
        moba = layer.kind is LayerKind.MOBA
        # A full layer is a document in one block, which is every query's own.
        table = seq.blocks(layer.block_size if moba else max(seq.max_document, 1)).on(loss_S.device)
        offset_S = torch.arange(seq.num_keys, device=loss_S.device) - table.start_N[table.own_T]
        own_AS = table.own_T.expand_as(sources_AS)
        seen_AS = (offset_S + 1) * sources_AS
        seen_AN = seen_AS.new_zeros(2, table.num_blocks).scatter_reduce_(1, own_AS, seen_AS, "amax")
        reached_AGS = (offset_S < seen_AN[:, table.own_T])[:, None]
        if moba:
            reached_AGS = reached_AGS | picked(number, sources_AS)[:, :, table.own_T]
        yield number, reached_AGS
        grown_S = _mixed_in(reached_AGS[0].any(0), seq, key_conv)
        sources_AS = torch.stack([sources_AS[0] | grown_S, loss_S])


def _mixed_in(keys_S: Tensor, seq: SequenceInfo, key_conv: int) -> Tensor:
    """These rows, and those that a causal convolution of that width mixes into their keys within each document."""
    rows_S = keys_S
    document_S = seq.blocks(max(seq.max_document, 1)).on(keys_S.device).own_T
    for lag in range(1, min(key_conv, len(keys_S))):
        earlier_S = keys_S[lag:] & (document_S[lag:] == document_S[:-lag])
        rows_S = rows_S | pad(earlier_S, (0, lag))
    return rows_S


def picked_blocks(picks_THK: Tensor, own_T: Tensor, sources_AT: Tensor, num_key_heads: int, num_blocks: int) -> Tensor:
    """bool [A, G, N]: the blocks but their own that queries among the sources picked, by any head of each group."""
    picked_AGN = torch.zeros(len(sources_AT), num_key_heads, num_blocks + 1, dtype=torch.bool, device=picks_THK.device)
    picks_GTK = picks_THK.unflatten(1, (num_key_heads, -1)).transpose(0, 1).flatten(2)
    for g in range(num_key_heads):  # one at a time: int64 copies of all picks would be large
        earlier_TK = (picks_GTK[g] >= 0) & (picks_GTK[g] != own_T[:, None])
        for a, sources_T in enumerate(sources_AT):
            blocks_TK = torch.where(earlier_TK & sources_T[:, None], picks_GTK[g], num_blocks)
            picked_AGN[a, g].scatter_(0, blocks_TK.flatten().long(), True)
    return picked_AGN[..., :num_blocks]


def _picked_anywhere(
    row: ObservedRow, whole: SequenceInfo, plan: tuple[LayerAttention, ...], model: ModelConfig, groups: Groups
) -> Picked:
    """Picks of all tensor ranks (heads), context ranks (queries) and pipeline stages (layers) on one row."""

    def picked(number: int, sources_AS: Tensor) -> Tensor:
        size = plan[number].block_size
        num_blocks = whole.blocks(size).num_blocks
        picked_AGN = sources_AS.new_zeros(2, model.num_key_value_heads, num_blocks, dtype=torch.int32)
        if number in row.layers:
            heads = model.num_key_value_heads // groups.tensor.size
            first = groups.tensor.rank * heads
            own_T = row.sequence.blocks(size).on(sources_AS.device).own_T
            mine_AT = sources_AS[:, row.sequence.on(sources_AS.device).q_positions]
            picks_THK = row.layers[number].picks_THK
            picked_AGN[:, first : first + heads] = picked_blocks(picks_THK, own_T, mine_AT, heads, num_blocks)
        for axis in (groups.tensor, groups.context, groups.pipeline):
            if axis.size > 1:
                dist.all_reduce(picked_AGN, dist.ReduceOp.MAX, group=axis.group)
        return picked_AGN.bool()

    return picked
