"""Train and validation rows of prepared folders, on megatron-core's memory-mapped datasets.

Train: a folder is one megatron-core GPTDataset of one pass (an epoch) over shuffled documents, each as often as
data.length_buckets says; the first pass takes its rows in megatron-core's order, each later one in an order of its own.
A blend deals samples to folders by its blending order. Sample i is the same row however many are asked for: a run that
is made longer sees what it would have seen.
Validation: the same rows each time, in file order, spread evenly over the split, none of them twice.
Shapes: S tokens a row.
"""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from moba_train.config.schema import ConfigError, DataConfig
from moba_train.data.batch import Batch
from moba_train.data.info import DatasetInfo, dataset_info
from moba_train.data.length_buckets import describe_buckets, times_of_documents
from moba_train.data.packing import pack_row
from moba_train.data.validate import content_hash, weighted_folders

__all__ = ["PretrainData", "TrainRows", "ValidRows", "build_datasets"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainData:
    """Rows to train on and rows to validate on. content: `content_hash` of what is trained on."""

    train: TrainRows
    valid: ValidRows
    content: str


def build_datasets(
    data: DataConfig,
    *,
    sequence_length: int,
    train_samples: int,
    valid_samples: int,
    cache_dir: str | Path | None = None,
) -> PretrainData:
    """Build `train_samples` train rows and `valid_samples` validation rows of S = `sequence_length` tokens.

    Call it on every rank, with or without a process group; in a group rank 0 writes the sample indices and the others
    wait for them. `cache_dir` (None: data.cache_dir, else `cache/` in each folder) must be shared by all nodes.
    Raises ConfigError for data that `check_data` would refuse for lack of files or rows, and for damaged indices.
    """
    cache_dir = cache_dir if cache_dir is not None else data.cache_dir
    folders = [_Folder(path, dataset_info(path), data.mode, sequence_length) for path, _ in weighted_folders(data)]
    weights = [weight for _, weight in weighted_folders(data)]
    order = _blend_order(weights, train_samples)
    passes = [
        _build_pass(folder, data, Path(cache_dir) if cache_dir is not None else folder.path / "cache")
        for folder in folders
    ]
    shares = _largest_remainder(weights, valid_samples)
    valid = [ValidRows.spread(folder, share) for folder, share in zip(folders, shares, strict=True)]
    return PretrainData(
        train=TrainRows(folders, passes, data.seed, *order),
        valid=ValidRows([row for part in valid for row in part.rows], valid_samples),
        content=content_hash(data),
    )


@dataclass(frozen=True)
class _Folder:
    """A prepared folder and how its rows are cut."""

    path: Path
    info: DatasetInfo
    mode: str
    sequence_length: int

    def row(self, text: torch.Tensor, split: str, num_real: int | None = None) -> Batch:
        highest = int(text.max())
        # A wrong id would fail in the embedding on a GPU, far from its cause.
        if highest >= self.info.vocab_size:
            what = f"{split}.bin is corrupt: it holds token {highest} of a vocabulary of {self.info.vocab_size}"
            raise ConfigError("data.path", str(self.path), f"{what}; prepare the folder again")
        return pack_row(text, self.info.eod_id, self.mode, num_real)

    def empty_row(self) -> Batch:
        text = torch.full((self.sequence_length + 1,), self.info.eod_id, dtype=torch.int64)
        return pack_row(text, self.info.eod_id, self.mode, num_real=0)

    @cached_property
    def valid_tokens(self) -> IndexedDataset:
        return IndexedDataset(str(self.path / "valid"))


class TrainRows:
    """Train rows by sample number."""

    def __init__(
        self,
        folders: Sequence[_Folder],
        passes: Sequence[GPTDataset],
        seed: int,
        folder_of_sample: np.ndarray,
        row_of_sample: np.ndarray,
    ) -> None:
        self._folders, self._passes, self._seed = folders, passes, seed
        self._folder_of_sample, self._row_of_sample = folder_of_sample, row_of_sample

    def __len__(self) -> int:
        return len(self._folder_of_sample)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        which = int(self._folder_of_sample[index])
        rows = self._passes[which]
        epoch, row = divmod(int(self._row_of_sample[index]), len(rows))
        sample = rows[int(_epoch_order(len(rows), self._seed, epoch)[row]) if epoch else row]
        return self._folders[which].row(torch.cat([sample["tokens"], sample["labels"][-1:]]), "train")


class ValidRows:
    """Validation rows by number: `num_rows` with text, then rows without loss up to the number that was asked for."""

    def __init__(self, rows: list[tuple[_Folder, int]], length: int) -> None:
        self.rows, self._length = rows, length

    @classmethod
    def spread(cls, folder: _Folder, count: int) -> ValidRows:
        """Up to `count` rows of one folder, at even distances over its validation split."""
        # The last row may be partly filler, so that a small split is covered to its end.
        available = max(1, math.ceil((folder.info.valid.tokens - 1) / folder.sequence_length))
        taken = min(count, available)
        return cls([(folder, i * available // taken) for i in range(taken)], taken)

    @property
    def num_rows(self) -> int:
        """Rows with text: a validation need not go past them."""
        return len(self.rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if index >= len(self.rows):
            return self.rows[0][0].empty_row()
        folder, row = self.rows[index]
        start, wanted = row * folder.sequence_length, folder.sequence_length + 1
        dtype = folder.valid_tokens.index.dtype
        found = min(wanted, folder.info.valid.tokens - start)
        tokens = folder.valid_tokens.bin_reader.read(dtype=dtype, count=found, offset=start * DType.size(dtype))
        text = torch.full((wanted,), folder.info.eod_id, dtype=torch.int64)
        text[:found] = torch.from_numpy(tokens.astype(np.int64))
        return folder.row(text, "valid", num_real=found)


@dataclass(frozen=True)
class _TokenizerFacts:
    """What GPTDataset asks of a tokenizer. It blanks out `pad` by id, so pad is an id that no text has."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, Any]
    pad: int = -1


@lru_cache(maxsize=8)  # rows are read one after another: one epoch a folder is in use at a time
def _epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which a later epoch takes a folder's rows."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def _build_pass(folder: _Folder, data: DataConfig, cache_dir: Path) -> GPTDataset:
    """One pass over the train split, its documents as often as data.length_buckets says."""
    if folder.info.train.tokens - 1 < folder.sequence_length:
        what = f"the train split of {folder.path} has {folder.info.train.tokens} tokens, fewer than one row"
        raise ConfigError("train.sequence_length", folder.sequence_length, f"{what}; prepare more text")
    # The content's hash is part of the cache's key: data prepared anew in the same place gets new indices.
    facts: dict[str, Any] = {"tokenizer": folder.info.tokenizer_sha256, "content": folder.info.train.sha256}
    kind: type[GPTDataset] = GPTDataset
    if data.length_buckets is not None:
        facts["length_buckets"] = dict(sorted(data.length_buckets.items()))
        kind = _repeating(data.length_buckets)
    config = GPTDatasetConfig(
        random_seed=data.seed,
        sequence_length=folder.sequence_length,
        blend_per_split=[([str(folder.path / "train")], None), None, None],
        path_to_cache=str(cache_dir),
        tokenizer=_TokenizerFacts(folder.info.vocab_size, folder.info.eod_id, facts),
        reset_position_ids=False,  # documents are kept apart by pack_row, for every version of megatron-core alike
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    try:
        return BlendedMegatronDatasetBuilder(kind, [None, 0, 0], lambda: True, config).build()[0]
    except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        remedy = f"its sample indices cannot be used ({error}); delete that folder, or name one that can be written"
        raise ConfigError("data.cache_dir", str(cache_dir), remedy) from error


def _repeating(buckets: Mapping[str, int]) -> type[GPTDataset]:
    """A GPTDataset whose documents come as often as `buckets` says, still one pass in one shuffled order."""

    class RepeatingDataset(GPTDataset):
        def __init__(self, dataset: IndexedDataset, path: str, documents: np.ndarray, *rest: Any) -> None:
            lengths = dataset.sequence_lengths[documents].astype(np.int64)
            _LOG.info("length buckets of %s: %s", path, describe_buckets(lengths, buckets))
            repeated = np.repeat(documents, times_of_documents(lengths, buckets))
            super().__init__(dataset, path, repeated.astype(documents.dtype), *rest)

    return RepeatingDataset


def _blend_order(weights: Sequence[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """For each sample its folder and the number of the row within it; the first n do not depend on `samples`."""
    folder_of_sample = np.zeros(samples, dtype=np.int16)
    row_of_sample = np.arange(samples, dtype=np.int64)
    if len(weights) > 1:
        helpers.build_blending_indices(folder_of_sample, row_of_sample, list(weights), len(weights), samples, False)
    return folder_of_sample, row_of_sample


def _largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares of `total` in proportion to the weights."""
    shares = [int(weight * total) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: shares[i] - weights[i] * total)
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
