"""Decoding and chunked prefill for bench_attention.py: few queries at the end of documents whose keys are all held.

As a decoder with a cache does it (attention/kv_cache.py): means of blocks are there, so a step is the gate over them
and attention to the picks. Forward only.
"""

from __future__ import annotations

import torch
from attention_shapes import SETTINGS, K, median_ms

from moba_train.attention import SequenceInfo, block_means, full_attention, moba_attention, select_from_means

__all__ = ["serving"]

_CASES = (("decode", 8, 1), ("prefill", 1, 512), ("prefill", 1, 2048))  # what, documents, queries of each


@torch.no_grad()
def serving(name: str, backends: list[str], keys: int) -> str:
    """Milliseconds of one step at the setting as Markdown, by case; documents of `keys` tokens."""
    lines = []
    full = ("flash", "sdpa") if "flash" in backends else ("sdpa",)
    columns = ["gate", *(f"moba {b}" for b in backends if b != "mixed"), *(f"full {b}" for b in full)]
    for what, documents, queries in _CASES:
        try:
            times = _times(name, columns, documents, queries, keys)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            times = {}
        cells = [f"{times[column]:.3f}" if column in times else "out of memory" for column in columns]
        lines.append("| " + " | ".join([what, str(documents), str(queries), *cells]) + " |")
    head = f"## Decoding and chunked prefill: {name}, documents of {keys // K}K tokens, forward, ms\n\n"
    head += f"| | documents | queries each | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}\n"
    return head + "\n".join(lines)


def _times(name: str, columns: list[str], documents: int, queries: int, keys: int) -> dict[str, float]:
    setting = SETTINGS[name]
    positions = torch.cat([torch.arange((d + 1) * keys - queries, (d + 1) * keys) for d in range(documents)])
    seq = SequenceInfo([d * keys for d in range(documents + 1)], positions)
    q, k, v = (
        torch.randn(rows, heads, setting.head_dim, dtype=torch.bfloat16, device="cuda")
        for rows, heads in (
            (documents * queries, setting.heads),
            (documents * keys, setting.key_heads),
            (documents * keys, setting.key_heads),
        )
    )
    sizes = {"block_size": setting.block_size, "top_k": setting.top_k}
    means = block_means(k, seq, setting.block_size)
    picks = select_from_means(q, means, seq, **sizes)
    times = {}
    for column in columns:
        what, _, backend = column.partition(" ")
        if what == "gate":
            times[column] = median_ms(lambda: select_from_means(q, means, seq, **sizes))
        elif what == "moba":
            times[column] = median_ms(
                lambda b=backend: moba_attention(q, k, v, seq, picks=picks, backend=b, **sizes)[0]
            )
        else:
            times[column] = median_ms(lambda b=backend: full_attention(q, k, v, seq, backend=b)[0])
    return times
