"""Loss by position in the document, over validation documents at least as long as the length that is asked about.

Every bucket is a mean over the same documents. Text differs from bucket to bucket, though; what context far back is
worth shows in pairs: the same tokens predicted from the whole context, and from the last `context` tokens of it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moba_train.config.schema import ConfigError
from moba_train.eval.documents import Documents
from moba_train.eval.model import Model
from moba_train.eval.scoring import document_row, score
from moba_train.train.loss import position_sums

__all__ = ["PositionLoss", "documents_of_length", "position_loss", "windows"]


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss in nats per token over `documents` documents cut to `length` tokens; by bucket of equal width.

    context: tokens before each predicted one that were shown at most, and three quarters of that at least; None: all.
    """

    length: int
    documents: int
    loss: float
    by_position: list[float]
    context: int | None = None


def documents_of_length(documents: Documents, length: int, most: int) -> list[int]:
    """Up to `most` documents with a label for each of `length` tokens, evenly spread; ConfigError if there is none."""
    found = documents.at_least(length + 1)
    if not found:
        longest = int(documents.lengths.max()) - 1
        remedy = f"no validation document of {documents.path} is that long, the longest has {longest} tokens"
        raise ConfigError("--lengths", length, f"{remedy}; ask for shorter ones, or give other --data")
    taken = min(most, len(found))
    return [found[i * len(found) // taken] for i in range(taken)]


def position_loss(
    model: Model,
    documents: Documents,
    chosen: list[int],
    length: int,
    buckets: int,
    progress: Callable[[list[int]], Iterable[int]] = iter,
    context: int | None = None,
) -> PositionLoss:
    """Loss over the first `length` tokens of the `chosen` documents, which data-parallel ranks share among them.

    With `context` a document is read in windows of so many tokens, each a quarter further on, that count for what no
    window before them counted: the same tokens, without what lies further back.
    """
    data = model.groups.data
    total = torch.zeros(2, buckets, dtype=torch.float64, device=model.device)
    for document in progress(chosen[data.rank :: data.size]):
        tokens = documents.read(document, length + 1)
        for start, end, first in windows(length, context):
            scores = score(model, document_row(tokens[start : end + 1]))
            places_R = scores.positions_R + start
            counted = (places_R >= first).to(scores.losses_R.dtype)
            total += position_sums(scores.losses_R, counted, places_R, buckets, length)
    if model.groups.tensor.rank != 0:
        total.zero_()
    dist.all_reduce(total)
    sums, counts = total.tolist()
    by_position = [s / n if n else float("nan") for s, n in zip(sums, counts, strict=True)]
    return PositionLoss(length, len(chosen), sum(sums) / sum(counts), by_position, context)


def windows(length: int, context: int | None) -> Iterator[tuple[int, int, int]]:
    """(start, end, first position that counts) of every window over `length` tokens."""
    covered = 0
    while covered < length:
        end = min(covered + max(1, context // 4), length) if context and covered else min(context or length, length)
        yield max(0, end - (context or length)), end, covered
        covered = end
