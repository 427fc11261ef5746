"""`data.length_buckets`: how often a document comes in a pass over the train split, by its length in tokens.

{32768: 4} takes documents of 32768 tokens and more four times a pass and all others once; {0: 0, 32768: 1, 131072: 3}
leaves the short ones out. Repeating documents within a folder keeps the mix of sources that `data.blend` asks for
(per-source length upsampling: Fu et al., arXiv 2402.10171). Lengths count the end-of-document token.
Standard library and numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moba_train.config.schema import ConfigError

__all__ = ["describe_buckets", "parsed_buckets", "times_of_documents"]

_KEY = "data.length_buckets"
_MOST_TIMES = 1000


def parsed_buckets(buckets: Mapping[str, int] | None) -> list[tuple[int, int]]:
    """(least tokens, times a pass) in increasing order, from 0 tokens on; ConfigError for what is no such thing."""
    found: dict[int, int] = {}
    for least, times in (buckets or {}).items():
        if not least.isdecimal():
            raise ConfigError(
                f"{_KEY}.{least}", times, "the key is the least number of tokens of a bucket, such as 32768"
            )
        if times < 0:
            raise ConfigError(f"{_KEY}.{least}", times, "a document comes so many times in a pass: 0 or more")
        if times > _MOST_TIMES:
            raise ConfigError(f"{_KEY}.{least}", times, f"a document comes at most {_MOST_TIMES} times in a pass")
        found[int(least)] = times
    return sorted({0: 1, **found}.items())


def times_of_documents(lengths: np.ndarray, buckets: Mapping[str, int] | None) -> np.ndarray:
    """How many times each document comes in a pass, int64, given the documents' tokens."""
    bounds, times = zip(*parsed_buckets(buckets), strict=True)
    return np.asarray(times, dtype=np.int64)[np.searchsorted(bounds, lengths, side="right") - 1]


def describe_buckets(lengths: np.ndarray, buckets: Mapping[str, int] | None) -> str:
    """One line: documents and share of the tokens of a pass, before and after, of every bucket."""
    parsed, times = parsed_buckets(buckets), times_of_documents(lengths, buckets)
    ends = [*(least for least, _ in parsed[1:]), None]
    total, after = int(lengths.sum()), int((lengths * times).sum())
    parts = []
    for (least, count), end in zip(parsed, ends, strict=True):
        inside = (lengths >= least) & (lengths < (end if end is not None else np.inf))
        tokens = int(lengths[inside].sum())
        parts.append(
            f"{least}{f' to {end - 1}' if end is not None else ' and more'}: {int(inside.sum())} documents x {count}, "
            f"{tokens / max(total, 1):.1%} -> {tokens * count / max(after, 1):.1%} of the tokens"
        )
    return "; ".join(parts)
