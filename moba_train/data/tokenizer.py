"""Text to token ids, for any tokenizer the `tokenizers` library can read, and a byte-level BPE trained on the spot.

Invariants:
  - text is only text: a special token's string inside a document is encoded like any other characters
  - no truncation or padding, whatever the tokenizer's file asks for, and no tokens added around a document
  - `pad` is never the end-of-document id: -1 where the tokenizer has no pad token of its own
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moba_train.config.schema import ConfigError

__all__ = ["EOD_TOKEN", "PAD_TOKEN", "Tokenizer", "load_tokenizer", "tokenizer_files", "train_byte_bpe"]

EOD_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
_TOKENIZER_JSON = "tokenizer.json"
_CONFIG_JSON = "tokenizer_config.json"
# Names of the end-of-document token, in order of preference, where nothing but tokenizer.json is given.
_USUAL_EOD = (EOD_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
# What a pretrained folder's tokenizer consists of; weights and model configuration stay behind.
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "chat_template*"),
)


class Tokenizer:
    """A tokenizer with the names that megatron-core's datasets ask for: vocab_size, eod, pad, unique_identifiers."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eod_token: str,
        pad_token: str | None,
        sha256: str,
        source: Path | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        eod, pad = backend.token_to_id(eod_token), backend.token_to_id(pad_token) if pad_token else None
        if eod is None:
            raise ConfigError("--eod-token", eod_token, "not in the tokenizer's vocabulary; name one that is")
        self.eod: int = eod
        self.eod_token, self.sha256 = eod_token, sha256
        self.pad_equals_eod = pad == eod
        self.pad: int = -1 if pad is None or pad == eod else pad
        # Ids may have holes (added tokens): a model needs the highest id, not the count.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._backend, self._source = backend, source

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What makes two tokenizers the same, in a form that JSON can hold."""
        return {"class": type(self).__name__, "sha256": self.sha256, "eod": self.eod}

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """The ids of `text`; `special_tokens` adds what the tokenizer puts around one, such as a beginning token."""
        return self._backend.encode(text, add_special_tokens=special_tokens).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> Callable[[int], str]:
        """A function from the next id to the text it completes: "" while a character still lacks bytes."""
        stream = decoders.DecodeStream(skip_special_tokens=False)
        return lambda token: stream.step(self._backend, token) or ""

    def save(self, folder: Path) -> None:
        """Write a folder that `load_tokenizer` and transformers' AutoTokenizer read; what was loaded is copied."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._source is not None and self._source.is_dir():
            for file in tokenizer_files(self._source):
                shutil.copyfile(file, folder / file.name)
        elif self._source is not None:
            shutil.copyfile(self._source, folder / _TOKENIZER_JSON)
        if not (folder / _TOKENIZER_JSON).exists():
            (folder / _TOKENIZER_JSON).write_bytes(_serialised(self._backend))
        if not (folder / _CONFIG_JSON).exists():
            config: dict[str, str | None] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eod_token}
            if self.pad >= 0:
                config["pad_token"] = self._backend.id_to_token(self.pad)
            (folder / _CONFIG_JSON).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a pretrained folder that make up its tokenizer."""
    return sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (any text can be encoded, nothing is lost) with an EOD and a separate pad token."""
    special = [EOD_TOKEN, PAD_TOKEN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        remedy = f"a byte-level vocabulary needs at least {len(alphabet) + len(special)} tokens"
        raise ConfigError("--vocab-size", vocab_size, remedy)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, EOD_TOKEN, PAD_TOKEN, hashlib.sha256(_serialised(backend)).hexdigest())


def load_tokenizer(path: str | Path, eod_token: str | None = None, key: str = "--tokenizer") -> Tokenizer:
    """Load a tokenizer.json, or a local pretrained Hugging Face folder.

    The end-of-document token is `eod_token`, else the folder's eos_token, else the first usual name in the vocabulary.
    Raises ConfigError (about `key`) where there is no tokenizer, it cannot be read, or no such token is found.
    """
    source = Path(path)
    file = source / _TOKENIZER_JSON if source.is_dir() else source
    if not source.exists():
        raise ConfigError(key, str(path), "no such file or folder; give a tokenizer.json or a local pretrained folder")
    pad_token, eos_token = _special_tokens(file.parent, key)
    if file.is_file():
        content = file.read_bytes()
        backend = _parse(content, key, file)
    else:
        backend, eos_token, pad_token = _through_transformers(source, key)
        content = _serialised(backend)
    if eod_token is None:
        usual = (name for name in _USUAL_EOD if backend.token_to_id(name) is not None)
        eod_token = eos_token or next(usual, None)
    if eod_token is None:
        raise ConfigError(key, str(path), "no end-of-document token is known for it; name one with --eod-token")
    return Tokenizer(backend, eod_token, pad_token, hashlib.sha256(content).hexdigest(), source)


def _parse(content: bytes, key: str, file: Path) -> tokenizers.Tokenizer:
    _parse_json(content, key, file)
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except ValueError as error:
        raise ConfigError(key, str(file), f"not a tokenizer ({error}); give a tokenizer.json or a folder") from error


def _parse_json(content: bytes, key: str, file: Path) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ConfigError(key, str(file), f"not a JSON file ({error}); mend it, or give another tokenizer") from error


def _special_tokens(folder: Path, key: str) -> tuple[str | None, str | None]:
    """(pad, eos) by tokenizer_config.json and special_tokens_map.json; a token is a string or {"content": string}."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", _CONFIG_JSON):
        if (folder / name).is_file():
            values = _parse_json((folder / name).read_bytes(), key, folder / name)
            for role in ("pad_token", "eos_token"):
                token = values.get(role)
                if token:
                    found[role] = token["content"] if isinstance(token, dict) else token
    return found.get("pad_token"), found.get("eos_token")


def _through_transformers(folder: Path, key: str) -> tuple[tokenizers.Tokenizer, str | None, str | None]:
    """A folder without tokenizer.json (vocab.json and merges.txt, or SentencePiece): transformers converts it."""
    from transformers import AutoTokenizer  # takes seconds to import, and few need it

    remedy = "give a folder with tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained writes one)"
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(key, str(folder), f"transformers finds no tokenizer here; {remedy}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ConfigError(key, str(folder), f"a tokenizer of pure Python, which cannot be used; {remedy}")
    return backend, loaded.eos_token, loaded.pad_token


def _serialised(backend: tokenizers.Tokenizer) -> bytes:
    return backend.to_str(pretty=True).encode()
