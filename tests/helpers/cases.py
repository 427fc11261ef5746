"""The one list of attention edge cases, and how to run an op on one.

Every backend and, where the queries are all rows, every context-parallel strategy is tested over `CASES`. A case is
small enough for the O(T * S) reference and is built from a seed, so two runs of it see the same numbers on every device
and in every dtype (up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moba_train.attention import SequenceInfo
from moba_train.attention.reference import masked_attention

__all__ = ["CASES", "CASES_BY_NAME", "Case", "Inputs", "Result", "run_masked", "run_op", "to_dtype", "zigzag_positions"]


class Inputs(NamedTuple):
    """Leaves q, k, v and the gradients that flow into out and lse."""

    q_THD: Tensor
    k_SGD: Tensor
    v_SGD: Tensor
    dout_THD: Tensor
    dlse_TH: Tensor


class Result(NamedTuple):
    """Outputs of an op and the gradients of its inputs."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


@dataclass(frozen=True)
class Case:
    """One edge. `quantised` draws small whole numbers: scores tie and every dot product is exact in any order."""

    name: str
    cu_seqlens: tuple[int, ...]
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 16
    block_size: int = 8
    top_k: int = 3
    q_positions: tuple[int, ...] | None = None
    quantised: bool = False
    q_factor: float = 1.0  # 2**k with `quantised`: exact logits of any size
    strided: bool = False
    force_first_block: bool = False
    force_previous_block: bool = False
    share_picks_in_group: bool = False
    fp32_gradients: bool = True  # False where rounding lse itself to fp32 costs gradients more than their tolerance

    def __str__(self) -> str:
        return self.name

    @property
    def routing(self) -> dict[str, int | bool]:
        """What `select_blocks` and `moba_attention` take to pick blocks."""
        return {
            "block_size": self.block_size,
            "top_k": self.top_k,
            "force_first_block": self.force_first_block,
            "force_previous_block": self.force_previous_block,
            "share_picks_in_group": self.share_picks_in_group,
        }

    def sequence(self) -> SequenceInfo:
        return SequenceInfo(self.cu_seqlens, self.q_positions)

    def inputs(self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Inputs:
        """Drawn in fp64 on the host, then rounded: every dtype sees the same case."""
        seq = self.sequence()
        generator = torch.Generator().manual_seed(seed)

        def draw(rows: int, heads: int, *, leaf: bool = True) -> Tensor:
            x = torch.randn(rows, heads, self.head_dim, dtype=torch.float64, generator=generator)
            x = x.round() if self.quantised and leaf else x
            x = x.to(device, dtype)
            if self.strided and leaf:
                # Heads before rows and every other channel: no stride is what a kernel would guess.
                wide = torch.zeros(heads, rows, 2 * self.head_dim, dtype=dtype, device=device)
                x = wide[..., ::2].copy_(x.transpose(0, 1)).transpose(0, 1)
            return x.requires_grad_(leaf)

        q_THD = (draw(seq.num_queries, self.heads).detach() * self.q_factor).requires_grad_()
        if self.strided:
            q_THD = draw(seq.num_queries, self.heads)
        k_SGD, v_SGD = draw(seq.num_keys, self.key_heads), draw(seq.num_keys, self.key_heads)
        dout_THD = draw(seq.num_queries, self.heads, leaf=False)
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        dlse_TH = draw(seq.num_queries, self.heads, leaf=False)[..., 0].to(lse_dtype)
        return Inputs(q_THD, k_SGD, v_SGD, dout_THD, dlse_TH)


def run_op(op: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], inputs: Inputs) -> Result:
    """Run `op(q, k, v) -> (out, lse)` forward and backward, gradients entering through both outputs."""
    out, lse = op(inputs.q_THD, inputs.k_SGD, inputs.v_SGD)
    leaves = (inputs.q_THD, inputs.k_SGD, inputs.v_SGD)
    grads = torch.autograd.grad((out, lse), leaves, (inputs.dout_THD, inputs.dlse_TH))
    return Result(out.detach(), lse.detach(), *grads)


def run_masked(inputs: Inputs, mask_THS: Tensor, scale: float) -> Result:
    """Plain torch attention under a mask, every step in the dtype of `inputs`: the error a user accepts today."""
    dlse_TH = inputs.dlse_TH.to(inputs.q_THD.dtype)
    return run_op(lambda q, k, v: masked_attention(q, k, v, mask_THS, scale), inputs._replace(dlse_TH=dlse_TH))


def to_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same values in another dtype, as fresh leaves."""
    q, k, v, dout, dlse = (tensor.detach().to(dtype) for tensor in inputs)
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout, dlse)


def zigzag_positions(num_rows: int, rank: int, size: int) -> tuple[int, ...]:
    """Rows of rank `rank` of `size` when chunks r and 2 * size - 1 - r of the batch go to rank r."""
    chunk = num_rows // (2 * size)
    assert chunk * 2 * size == num_rows, f"{num_rows} rows do not divide into {2 * size} chunks"
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return (*range(first, first + chunk), *range(second, second + chunk))


CASES = (
    Case("no-documents", (0,)),
    Case("no-queries", (0, 12), q_positions=()),
    Case("only-empty-documents", (0, 0, 0)),
    Case("one-token", (0, 1)),
    Case("empty-documents", (0, 0, 7, 7, 7, 29, 29)),
    Case("documents-shorter-than-a-block", (0, 3, 5, 9, 10, 17)),
    Case("packed", (0, 5, 5, 6, 23, 24, 25, 34, 34, 64), block_size=4, top_k=2),
    Case("single-tokens", tuple(range(24)), block_size=4, top_k=2),
    Case("last-block-short", (0, 37)),
    Case("last-block-of-one", (0, 33, 58)),
    Case("top-1", (0, 40, 61), top_k=1),
    Case("top-2", (0, 40, 61), top_k=2),
    Case("picks-cover-exactly", (0, 24, 61), top_k=5),
    Case("picks-exceed-blocks", (0, 24, 61), top_k=12),
    Case("picks-miss-one-block", (0, 24, 61), top_k=4),
    Case("mha", (0, 50), heads=3, key_heads=3),
    Case("mqa", (0, 50), heads=4, key_heads=1),
    Case("gqa-odd-group", (0, 50, 71), heads=6, key_heads=2),
    Case("one-head", (0, 50), heads=1, key_heads=1),
    Case("odd-everything", (0, 17, 130), heads=3, key_heads=1, head_dim=24, block_size=7, top_k=5),
    Case("long-lists", (0, 300), heads=4, key_heads=1, block_size=16, top_k=3),
    Case("block-of-one", (0, 33), block_size=1, top_k=4),
    Case("block-larger-than-documents", (0, 10, 33), block_size=64, top_k=2),
    Case("block-as-long-as-document", (0, 16, 32), block_size=16, top_k=1),
    Case("ties", (0, 70), head_dim=8, block_size=2, top_k=5, quantised=True),
    Case("logits-of-1000", (0, 45, 60), quantised=True, q_factor=256.0, fp32_gradients=False),
    Case("strided-inputs", (0, 20, 57), strided=True),
    Case("query-subset", (0, 25, 64), q_positions=(0, 1, 7, 8, 9, 23, 24, 25, 40, 63)),
    Case("zigzag-first-rank", (0, 25, 64), q_positions=zigzag_positions(64, 0, 2)),
    Case("zigzag-last-rank", (0, 25, 64), q_positions=zigzag_positions(64, 1, 2)),
    Case("zigzag-one-document", (0, 96), q_positions=zigzag_positions(96, 1, 3)),
    Case("chunked-prefill", (0, 70), q_positions=tuple(range(43, 70))),
    Case("decode", (0, 70), q_positions=(69,)),
    Case("decode-batch", (0, 21, 50, 51, 70), q_positions=(20, 49, 50, 69)),
    Case("previous-forced", (0, 40, 40, 43, 111), top_k=4, force_previous_block=True),
    Case("previous-forced-into-two", (0, 40, 61), top_k=2, force_previous_block=True),
    Case("previous-forced-zigzag", (0, 25, 64), force_previous_block=True, q_positions=zigzag_positions(64, 1, 2)),
    Case(
        "previous-forced-ties", (0, 9, 70), head_dim=8, block_size=2, top_k=5, quantised=True, force_previous_block=True
    ),
    Case("first-forced", (0, 40, 40, 43, 111), top_k=4, force_first_block=True),
    Case("first-forced-into-two", (0, 40, 61), top_k=2, force_first_block=True),
    Case("first-forced-zigzag", (0, 25, 64), force_first_block=True, q_positions=zigzag_positions(64, 1, 2)),
    Case("first-forced-ties", (0, 9, 70), head_dim=8, block_size=2, top_k=5, quantised=True, force_first_block=True),
    Case("first-and-previous-forced", (0, 20, 57), force_first_block=True, force_previous_block=True),
    Case(
        "first-previous-shared-decode",
        (0, 21, 50, 51, 70),
        key_heads=1,
        top_k=4,
        q_positions=(20, 49, 50, 69),
        force_first_block=True,
        force_previous_block=True,
        share_picks_in_group=True,
    ),
    Case("picks-shared", (0, 50, 71), heads=6, key_heads=2, share_picks_in_group=True),
    Case("picks-shared-ties", (0, 70), head_dim=8, block_size=2, top_k=5, quantised=True, share_picks_in_group=True),
    Case("picks-shared-by-one-head", (0, 50), heads=2, key_heads=2, share_picks_in_group=True),
    Case(
        "picks-shared-previous-forced",
        (0, 20, 57),
        heads=8,
        top_k=4,
        strided=True,
        force_previous_block=True,
        share_picks_in_group=True,
    ),
    Case(
        "picks-shared-decode", (0, 21, 50, 51, 70), key_heads=1, q_positions=(20, 49, 50, 69), share_picks_in_group=True
    ),
    Case("blocks-without-queries", (0, 64), top_k=1, q_positions=(40, 63)),
)
CASES_BY_NAME = {case.name: case for case in CASES}
assert len(CASES_BY_NAME) == len(CASES), "case names must differ"
