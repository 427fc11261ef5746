"""Full attention by batch for bench_attention.py: one document, packed documents, the shard of a context-parallel rank.

Nothing is padded and no mask is read, so each should run near the rate of one document.
"""

from __future__ import annotations

import statistics

import torch
from attention_shapes import LIMIT, SETTINGS, error_of, inputs
from torch import Tensor

from moba_train.attention import SequenceInfo, full_attention

__all__ = ["documents"]

_SETTING = SETTINGS["medium"]  # for its heads
_RANKS = 4
_STEPS = 7


def documents(backends: list[str], queries: int) -> str:
    """TFLOP/s of forward and backward as Markdown, one batch a line; a pair that no query sees is no work.

    A backend whose out or gradients err too much on a small packed batch is left out.
    """
    backends = [backend for backend in backends if error_of(backend, _SETTING, sparse=False) <= LIMIT]
    batches = {
        "one document": SequenceInfo([0, queries]),
        f"{len(_packed(queries)) - 1} packed documents": SequenceInfo(_packed(queries)),
        f"rank 0 of {_RANKS}, zigzag, one document": _rank(SequenceInfo([0, _RANKS * queries])),
        f"rank 0 of {_RANKS}, zigzag, packed documents": _rank(SequenceInfo(_packed(_RANKS * queries))),
    }
    lines = []
    for name, seq in batches.items():
        cells = [_tflops(backend, seq) for backend in backends]
        lines.append("| " + " | ".join([name, str(seq.num_queries), str(_pairs(seq)), *cells]) + " |")
    head = "## Full attention by batch\n\nHeads of the setting medium; TFLOP/s of forward and backward, median of "
    head += f"{_STEPS}. Documents have log-normal lengths (median 4096, sigma 1).\n\n"
    head += f"| batch | queries | pairs of a head | {' | '.join(backends)} |\n|{'---|' * (3 + len(backends))}\n"
    return head + "\n".join(lines)


def _packed(rows: int) -> list[int]:
    """Bounds of documents of log-normal lengths; the last is cut."""
    generator = torch.Generator().manual_seed(0)
    bounds = [0]
    while bounds[-1] < rows:
        length = int(4096 * torch.randn((), generator=generator).exp())
        bounds.append(min(rows, bounds[-1] + max(1, length)))
    return bounds


def _rank(seq: SequenceInfo) -> SequenceInfo:
    """Rank 0's queries: the first and the last chunk."""
    chunk = seq.num_keys // (2 * _RANKS)
    rows = torch.arange(seq.num_keys)
    return SequenceInfo(seq.cu_seqlens, torch.cat([rows[:chunk], rows[-chunk:]]))


def _pairs(seq: SequenceInfo) -> int:
    rows = torch.arange(seq.num_keys) if seq.q_positions is None else seq.q_positions
    document = torch.searchsorted(seq.cu_seqlens[1:].contiguous(), rows, right=True)
    return int((rows - seq.cu_seqlens[document] + 1).sum())


def _tflops(backend: str, seq: SequenceInfo) -> str:
    try:
        return f"{_measured(backend, seq):.0f}"
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"


def _measured(backend: str, seq: SequenceInfo) -> float:
    q = inputs(seq.num_queries, _SETTING)[0]
    _, k, v = inputs(seq.num_keys, _SETTING)
    dout = torch.randn_like(q)

    def step() -> float:
        leaves: list[Tensor] = [x.detach().requires_grad_() for x in (q, k, v)]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.autograd.grad(full_attention(*leaves, seq, backend=backend)[0], leaves, dout)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    step()
    ms = statistics.median(step() for _ in range(_STEPS))
    return 3.5 * _SETTING.flops(_pairs(seq), backward=False) / ms / 1e9
