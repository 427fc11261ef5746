"""Full attention by batch for bench_attention.py: one document, packed documents, the shard of a context-parallel rank.

Nothing is padded and no mask is read, so each should run near the rate of one document.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from attention_shapes import LIMIT, SETTINGS, error_of, inputs, median_ms
from packed import log_normal
from torch import Tensor

from moba_train.attention import SequenceInfo, full_attention
from moba_train.context_parallel.layout import causal_pairs, zigzag

__all__ = ["documents"]

_SETTING = SETTINGS["medium"]  # for its heads
_RANKS = 4
_MEDIAN, _SIGMA = 4096, 1.0  # of document lengths


def documents(backends: list[str], queries: int) -> str:
    """TFLOP/s of forward and backward as Markdown, one batch a line; a pair that no query sees is no work.

    A backend whose out or gradients err too much on a small packed batch is left out.
    """
    backends = [backend for backend in backends if error_of(backend, _SETTING, sparse=False) <= LIMIT]
    mean = _MEDIAN * math.exp(_SIGMA**2 / 2)
    packed, packed_ranks = (log_normal(rows, mean, _SIGMA) for rows in (queries, _RANKS * queries))
    rank = zigzag(_RANKS * queries, _RANKS).positions(0)
    batches = {
        "one document": SequenceInfo([0, queries]),
        f"{len(packed) - 1} packed documents": SequenceInfo(packed),
        f"rank 0 of {_RANKS}, zigzag, one document": SequenceInfo([0, _RANKS * queries], rank),
        f"rank 0 of {_RANKS}, zigzag, packed documents": SequenceInfo(packed_ranks, rank),
    }
    lines = []
    for name, seq in batches.items():
        cells = [_tflops(backend, seq) for backend in backends]
        lines.append("| " + " | ".join([name, str(seq.num_queries), str(pairs_of(seq)), *cells]) + " |")
    head = "## Full attention by batch\n\nHeads of the setting medium; TFLOP/s of forward and backward, median of ten. "
    head += f"Documents have log-normal lengths (median {_MEDIAN}, sigma {_SIGMA:g}).\n\n"
    head += f"| batch | queries | pairs of a head | {' | '.join(backends)} |\n|{'---|' * (3 + len(backends))}\n"
    return head + "\n".join(lines)


def pairs_of(seq: SequenceInfo) -> int:
    """(query, key) pairs of one head that the queries of `seq` see."""
    bounds = seq.cu_seqlens.tolist()
    rows = torch.arange(seq.num_keys) if seq.q_positions is None else seq.q_positions
    before = torch.tensor(causal_pairs(range(seq.num_keys + 1), bounds))
    return int((before[rows + 1] - before[rows]).sum())


def _tflops(backend: str, seq: SequenceInfo) -> str:
    q = inputs(seq.num_queries, _SETTING)[0]
    leaves = [q, *inputs(seq.num_keys, _SETTING)[1:]]
    step = partial(_both_passes, leaves, torch.randn_like(q), seq, backend)
    try:
        return f"{3.5 * _SETTING.flops(pairs_of(seq), backward=False) / median_ms(step) / 1e9:.0f}"
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"


def _both_passes(leaves: list[Tensor], dout: Tensor, seq: SequenceInfo, backend: str) -> Tensor:
    return torch.autograd.grad(full_attention(*leaves, seq, backend=backend)[0], leaves, dout)[0]
