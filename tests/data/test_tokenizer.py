"""Text stays text, nothing is cut or added, and pad is never the end token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import given, settings

from moba_train.config.schema import ConfigError
from moba_train.data.tokenizer import EOD_TOKEN, PAD_TOKEN, Tokenizer, load_tokenizer, train_byte_bpe

CORPUS = ["def run(self):\n    return self.value\n" * 20, "für die Prosa: naïve 日本語 🎉 " * 20]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_byte_bpe(CORPUS, 300)


@pytest.fixture
def saved(trained: Tokenizer, tmp_path: Path) -> Path:
    trained.save(tmp_path / "saved")
    return tmp_path / "saved"


@given(
    st.lists(st.sampled_from([EOD_TOKEN, PAD_TOKEN, "self", "\n    ", "\r\n", "\x00", "é", "日", "🎉", "\ufeff"])),
    st.text(),
)
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_and_is_never_a_special_token(trained: Tokenizer, parts: list[str], more: str) -> None:
    text = "".join(parts) + more
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not {trained.eod, trained.pad} & set(ids)
    assert trained.encode_batch([text, ""]) == [ids, []]


def test_training_gives_the_same_tokenizer_each_time(trained: Tokenizer) -> None:
    again = train_byte_bpe(iter(CORPUS), 300)
    assert again.sha256 == trained.sha256
    assert (trained.vocab_size, trained.eod, trained.pad, trained.pad_equals_eod) == (300, 0, 1, False)
    assert again.unique_identifiers == trained.unique_identifiers
    json.dumps(trained.unique_identifiers)


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--vocab-size=257: .* at least 258"):
        train_byte_bpe(CORPUS, 257)


def test_saved_and_loaded_it_is_the_same(trained: Tokenizer, saved: Path) -> None:
    for path in (saved, saved / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert (loaded.eod, loaded.pad, loaded.sha256) == (trained.eod, trained.pad, trained.sha256)
        assert loaded.encode(EOD_TOKEN + CORPUS[1]) == trained.encode(EOD_TOKEN + CORPUS[1])


def test_a_pretrained_folder_is_copied_without_weights(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"weights")
    (saved / "config.json").write_text("{}")
    load_tokenizer(saved).save(tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert load_tokenizer(tmp_path / "copy").sha256 == load_tokenizer(saved).sha256


def test_truncation_and_padding_of_the_file_are_ignored(trained: Tokenizer, saved: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(saved / "tokenizer.json"))
    assert load_tokenizer(saved).encode(CORPUS[0]) == trained.encode(CORPUS[0])
    assert load_tokenizer(saved).encode_batch(["a", CORPUS[0]])[0] == trained.encode("a")


def test_pad_equal_to_the_end_token_is_out_of_use(saved: Path) -> None:
    config = {"eos_token": {"content": EOD_TOKEN}, "pad_token": EOD_TOKEN}
    (saved / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(saved)
    assert (loaded.eod, loaded.pad, loaded.pad_equals_eod) == (0, -1, True)


def test_end_token_by_name_by_folder_and_by_habit(saved: Path) -> None:
    assert load_tokenizer(saved, eod_token=PAD_TOKEN).eod == 1
    (saved / "tokenizer_config.json").write_text(json.dumps({"eos_token": PAD_TOKEN}))
    assert load_tokenizer(saved).eod == 1
    (saved / "tokenizer_config.json").unlink()
    assert load_tokenizer(saved).eod == 0
    with pytest.raises(ConfigError, match="--eod-token='<none>': not in the tokenizer's vocabulary"):
        load_tokenizer(saved, eod_token="<none>")


def test_a_folder_without_tokenizer_json_goes_through_transformers(saved: Path, tmp_path: Path) -> None:
    model = json.loads((saved / "tokenizer.json").read_text())["model"]
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": EOD_TOKEN, "model_max_length": 8}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(folder)
    assert loaded.encode(CORPUS[0] + EOD_TOKEN) == load_tokenizer(saved).encode(CORPUS[0] + EOD_TOKEN)
    loaded.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").sha256 == loaded.sha256


@pytest.mark.parametrize(
    "content, reason", [(None, "no such file"), ("nonsense", "not a JSON file"), ('{"a": 1}', "not a tokenizer")]
)
def test_what_is_no_tokenizer_is_named(content: str | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=f"--tokenizer=.*{reason}"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_folder_without_any_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer=.*finds no tokenizer here"):
        load_tokenizer(tmp_path)


def test_a_folder_whose_settings_are_damaged_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"--tokenizer=.*tokenizer_config\.json': not a JSON file"):
        load_tokenizer(tmp_path / "copy")
