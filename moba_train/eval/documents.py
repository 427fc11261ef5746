"""The validation documents of a prepared folder, whole: what training cuts into rows is read uncut here."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moba_train.config.schema import ConfigError
from moba_train.data.info import dataset_info
from moba_train.data.tokenizer import Tokenizer, load_tokenizer
from moba_train.data.validate import check_split_files

__all__ = ["Documents"]


class Documents:
    """`lengths`: tokens of each document, its end-of-document token included."""

    def __init__(self, path: str, key: str = "--data") -> None:
        """ConfigError (about `key`) where there is no prepared folder, or it is damaged."""
        self.path = Path(path)
        self.info = dataset_info(self.path, key)
        check_split_files(self.path, "valid", self.info.valid.tokens, key)
        self._dataset = IndexedDataset(str(self.path / "valid"))
        self.lengths = np.asarray(self._dataset.index.sequence_lengths).astype(np.int64)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path / "tokenizer", self.info.eod_token, key="--data")

    def check_model(self, vocab_size: int, tokenizer: Path | None) -> None:
        """ConfigError unless these are a model's tokens; `tokenizer` is the model's own where it is known."""
        remedy = f"prepare the data for this model: launch/prepare_data.py --tokenizer {tokenizer or 'ITS FOLDER'}"
        if self.info.vocab_size > vocab_size:
            what = f"has {self.info.vocab_size} tokens in its vocabulary, the model {vocab_size}"
            raise ConfigError("--data", str(self.path), f"{what}; {remedy}")
        if tokenizer is not None and load_tokenizer(tokenizer).sha256 != self.info.tokenizer_sha256:
            raise ConfigError("--data", str(self.path), f"was made with another tokenizer than the model's; {remedy}")

    def at_least(self, tokens: int) -> list[int]:
        """Numbers of the documents with that many tokens."""
        return np.flatnonzero(self.lengths >= tokens).tolist()

    def read(self, document: int, tokens: int) -> torch.Tensor:
        """The first `tokens` tokens of a document, int64."""
        return torch.from_numpy(self._dataset.get(document, 0, tokens).astype(np.int64))

    @cached_property
    def text(self) -> torch.Tensor:
        """All documents behind one another without their end-of-document tokens, int64."""
        tokens = [self.read(document, int(length)) for document, length in enumerate(self.lengths)]
        joined = torch.cat(tokens)
        return joined[joined != self.info.eod_id]
