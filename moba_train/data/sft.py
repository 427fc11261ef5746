"""Chat rows -> packed rows to train and validate on.

Every chat row is a document of its own: positions from 0, no attention across, and its first tokens - 1 tokens are
inputs with the next token as the label. What a context does not fill is known by its place (`pack_documents`), never by
a token id. The order of a pass (epoch) depends on data.seed and the number of the pass alone, so a run resumes exactly.
Loss weights (sft.loss_weighting), w of a label; the loss is sum(w * loss) / sum(w) over the global batch:
  - token: 1. Every loss token counts the same.
  - sample: 1 / loss tokens of the chat row. Every chat row counts the same.
  - document: that, divided by the chat rows of the split with the same `document`. Every source counts the same.
Letters: S tokens of a context.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moba_train.config.schema import ConfigError, DataConfig, SftConfig
from moba_train.data.batch import Batch
from moba_train.data.bins import epoch_bins, pack
from moba_train.data.chat_rows import ChatRows, tokenised_rows
from moba_train.data.chat_template import ChatTokenizer
from moba_train.data.packing import pack_documents
from moba_train.data.split import valid_threshold

__all__ = ["RUN_TOKENIZER", "SftData", "SftRows", "build_sft", "check_sft"]

RUN_TOKENIZER = "tokenizer"  # folder of a run that keeps its tokenizer with the chat template
_LOG = logging.getLogger(__name__)
_VALID_FRACTION = 0.05


@dataclass(frozen=True)
class SftData:
    """Rows to train on, rows to validate on, and what made tokens of them. content: a hash of what is trained on."""

    train: SftRows
    valid: SftRows
    tokenizer: ChatTokenizer
    content: str


class SftRows:
    """Contexts of S tokens by number: packed bins, then rows without loss up to `length`."""

    def __init__(self, split: _Split, bins: Sequence[np.ndarray], length: int) -> None:
        self._split, self._bins, self._length = split, bins, length

    @property
    def num_rows(self) -> int:
        """Contexts with text: a validation need not go past them."""
        return len(self._bins)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        items = self._bins[index].tolist() if index < len(self._bins) else []
        return pack_documents([self._split.document(item) for item in items], self._split.sequence_length)


@dataclass(frozen=True)
class _Split:
    """The chat rows of train or valid that are trained on. counts [n]: tokens of each, cut to the context."""

    name: str
    rows: ChatRows
    chosen: np.ndarray  # [n] numbers in `rows`
    counts: np.ndarray  # [n]
    weights: np.ndarray  # [n] of each loss token of a row, float64
    loss_tokens: int
    truncated: int
    dropped: int  # as too long
    emptied: int  # as no loss token is left of them
    sequence_length: int

    @property
    def lengths(self) -> np.ndarray:
        """Places that each row takes: its last token is a label only."""
        return self.counts - 1

    @property
    def content(self) -> str:
        """Hash of the rows as the template writes them, in order, and of how much of each is taken."""
        parts = (self.rows.table["hash"][self.chosen], self.counts)
        return hashlib.sha256(b"".join(part.astype("<u8").tobytes() for part in parts)).hexdigest()

    def document(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (int64 [n]) and the weight of each as a label (float32 [n])."""
        row, count = int(self.chosen[item]), int(self.counts[item])
        weights = self.rows.loss(row, count) * self.weights[item]
        return torch.from_numpy(self.rows.ids(row, count)), torch.from_numpy(weights.astype(np.float32))

    def report(self, packing: str, bins: Sequence[np.ndarray]) -> None:
        """Say what there is and what was left out; the share of the contexts that is text."""
        tokens = int(self.lengths.sum())
        _LOG.info(
            "%s: %s chat rows, %s tokens, %s with loss (%.2f %%); left out: %s without assistant tokens, %s too long, "
            "%s without loss once truncated; truncated: %s",
            self.name,
            *(f"{n:,}" for n in (len(self.chosen), tokens, self.loss_tokens)),
            100 * self.loss_tokens / tokens,
            *(f"{n:,}" for n in (self.rows.without_loss, self.dropped, self.emptied, self.truncated)),
        )
        share = 100 * tokens / (len(bins) * self.sequence_length)
        contexts = f"{len(bins):,} contexts of {self.sequence_length:,}"
        _LOG.info("%s: packing %s makes %s, %.1f %% of them text", self.name, packing, contexts, share)


def check_sft(config: SftConfig, data: DataConfig, vocab_size: int, sequence_length: int, timeout_s: float) -> str:
    """ConfigError for the first thing that keeps the chat rows from being trained on; tokenises them on the way.

    Returns `SftData.content`. Needs no process group: rank 0 tokenises, the others wait for its cache.
    """
    if not 0 <= data.seed < 2**31:
        raise ConfigError("data.seed", data.seed, f"must lie between 0 and {2**31 - 1}")
    return _splits(config, data, vocab_size, sequence_length, timeout_s)[1].content


def build_sft(
    config: SftConfig,
    data: DataConfig,
    *,
    vocab_size: int,
    sequence_length: int,
    train_samples: int,
    valid_samples: int,
    timeout_s: float = 600,
) -> SftData:
    """Build `train_samples` packed rows to train on and `valid_samples` to validate on; the same on every rank.

    Of more validation rows than asked for, as many at even distances; the same ones each time. ConfigError as
    `check_sft`.
    """
    tokenizer, train, valid = _splits(config, data, vocab_size, sequence_length, timeout_s)
    bins: list[np.ndarray] = []
    first_pass: list[np.ndarray] = []
    epoch = 0
    while len(bins) < train_samples or not epoch:
        packed = epoch_bins(train.lengths, sequence_length, config.packing, data.seed, epoch)
        first_pass, epoch = first_pass or packed, epoch + 1
        bins += packed
    _LOG.info("chat template: %s", tokenizer.source)
    train.report(config.packing, first_pass)
    fixed = [np.array(items) for items in pack(valid.lengths.tolist(), sequence_length, config.packing)]
    valid.report(config.packing, fixed)
    taken = min(valid_samples, len(fixed))
    spread = [fixed[i * len(fixed) // taken] for i in range(taken)]
    return SftData(
        train=SftRows(train, bins[:train_samples], train_samples),
        valid=SftRows(valid, spread, valid_samples),
        tokenizer=tokenizer,
        content=train.content,
    )


def _splits(
    config: SftConfig, data: DataConfig, vocab_size: int, sequence_length: int, timeout_s: float
) -> tuple[ChatTokenizer, _Split, _Split]:
    assert config.path is not None
    assert config.tokenizer is not None
    tokenizer = ChatTokenizer(config.tokenizer, config.chat_template, last_turn_only=config.last_turn_only)
    if tokenizer.vocab_size > vocab_size:
        remedy = f"{config.tokenizer} has {tokenizer.vocab_size} tokens; set model.vocab_size to at least that"
        raise ConfigError("model.vocab_size", vocab_size, remedy)
    rows = tokenised_rows(config.path, tokenizer, cache_dir=data.cache_dir, timeout_s=timeout_s)
    if config.valid_path is not None:
        other = tokenised_rows(
            config.valid_path, tokenizer, key="sft.valid_path", cache_dir=data.cache_dir, timeout_s=timeout_s
        )
        chosen = (rows, np.arange(len(rows))), (other, np.arange(len(other)))
    else:
        fraction = _VALID_FRACTION if config.valid_fraction is None else config.valid_fraction
        hashes = rows.table["document"]
        is_valid = hashes < np.uint64(valid_threshold(fraction, int(hashes.min())))
        if is_valid.all():
            remedy = "no row is left for training; give rows about at least two documents, or a sft.valid_path"
            raise ConfigError("sft.path", config.path, remedy)
        chosen = (rows, np.flatnonzero(~is_valid)), (rows, np.flatnonzero(is_valid))
    train, valid = (
        _select(name, part, numbers, config, sequence_length)
        for name, (part, numbers) in zip(("train", "valid"), chosen, strict=True)
    )
    return tokenizer, train, valid


def _select(name: str, rows: ChatRows, numbers: np.ndarray, config: SftConfig, sequence_length: int) -> _Split:
    """What sft.overlong leaves of these rows, cut where it says so, and the weight of their loss tokens."""
    lengths = rows.table["length"][numbers]
    too_long = lengths - 1 > sequence_length
    if config.overlong == "refuse" and too_long.any():
        first = int(numbers[too_long][0])
        what = (
            f"{int(too_long.sum()):,} of {len(numbers):,} {name} rows are longer than train.sequence_length="
            f"{sequence_length}, the first {rows.place(first)} with {int(rows.table['length'][first]) - 1:,} tokens; "
            "choose truncate or drop, or a longer context"
        )
        raise ConfigError("sft.overlong", config.overlong, what)
    dropped = int(too_long.sum()) if config.overlong == "drop" else 0
    if dropped:
        numbers, lengths, too_long = numbers[~too_long], lengths[~too_long], too_long[~too_long]
    counts = np.minimum(lengths, sequence_length + 1)
    loss_tokens = np.array(
        [rows.loss(int(row), int(count))[1:].sum() for row, count in zip(numbers, counts, strict=True)], dtype=np.int64
    )
    kept = loss_tokens > 0
    if not kept.any():
        remedy = f"no {name} row with a loss token is left; choose another sft.overlong or a longer context"
        raise ConfigError("sft.overlong", config.overlong, remedy)
    chosen = numbers[kept]
    weights = np.ones(len(chosen))
    if config.loss_weighting in ("sample", "document"):
        weights /= loss_tokens[kept]
    if config.loss_weighting == "document":
        _, which, sizes = np.unique(rows.table["document"][chosen], return_inverse=True, return_counts=True)
        weights /= sizes[which]
    return _Split(
        name=name,
        rows=rows,
        chosen=chosen,
        counts=counts[kept],
        weights=weights,
        loss_tokens=int(loss_tokens[kept].sum()),
        truncated=int((too_long & kept).sum()) if config.overlong == "truncate" else 0,
        dropped=dropped,
        emptied=int((~kept).sum()),
        sequence_length=sequence_length,
    )
