"""Text to a prepared folder and back, for every kind of input; split, interruption, repetition."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moba_train.config.schema import ConfigError
from moba_train.data.info import DatasetInfo, PrepareArguments, dataset_info
from moba_train.data.prepare import prepare
from moba_train.data.sources import standard_library_files
from moba_train.data.tokenizer import EOD_TOKEN, load_tokenizer
from tests.data.conftest import Prepared, sentences, write_jsonl

ODD_TEXTS = ["", "naïve — 日本語 🎉\r\n\ttab", f"before{EOD_TOKEN}after <|pad|>", "\ufeffmarked", "\x00", " \n "]
TEXTS = ODD_TEXTS + sentences(20)


def read_back(folder: Path) -> dict[str, list[str]]:
    """The documents of each split, checked to end with the end token and to hold it nowhere else."""
    tokenizer, info = load_tokenizer(folder / "tokenizer"), dataset_info(folder)
    found = {}
    for split in ("train", "valid"):
        data = IndexedDataset(str(folder / split))
        found[split] = []
        for i in range(len(data)):
            ids = data[i].tolist()
            assert ids.index(info.eod_id) == len(ids) - 1
            found[split].append(tokenizer.decode(ids[:-1]))
    return found


def write_files(folder: Path) -> list[str]:
    for i, text in enumerate(TEXTS):
        path = folder / f"{i % 3}" / f"{i:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (folder / "0" / "code.py").write_text("not asked for")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("hidden")
    return [str(folder)]


def as_folder(folder: Path) -> dict:
    return {"inputs": tuple(write_files(folder / "in")), "suffixes": (".txt",)}


def as_glob(folder: Path) -> dict:
    write_files(folder / "in")
    return {"inputs": (str(folder / "in" / "*" / "*.txt"),)}


def as_jsonl(folder: Path) -> dict:
    return {"inputs": (str(write_jsonl(folder / "in.jsonl", TEXTS)),)}


def as_parquet(folder: Path) -> dict:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "body": TEXTS}), folder / "in.parquet")
    return {"inputs": (str(folder / "in.parquet"),), "text_key": "body"}


@pytest.mark.parametrize("kind", [as_folder, as_glob, as_jsonl, as_parquet])
def test_every_document_comes_back_from_every_kind_of_input(kind: Callable[[Path], dict], tmp_path: Path) -> None:
    output = tmp_path / "out"
    info = prepare(PrepareArguments(str(output), vocab_size=300, valid_fraction=0.3, **kind(tmp_path)))
    found = read_back(output)
    assert sorted(found["train"] + found["valid"]) == sorted(TEXTS)
    assert len(found["train"]) == info.train.documents > 0
    assert len(found["valid"]) == info.valid.documents > 0
    # Of what kind the input is does not matter to the split.
    in_valid = {t for t in TEXTS if int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) < 0.3 * 2**64}
    assert set(found["valid"]) == in_valid
    assert info.train.bytes + info.valid.bytes == sum(len(t.encode()) for t in TEXTS)
    assert info == dataset_info(output)
    for split, facts in (("train", info.train), ("valid", info.valid)):
        content = (output / f"{split}.bin").read_bytes()
        assert hashlib.sha256(content).hexdigest() == facts.sha256
        assert len(content) == 2 * facts.tokens


def test_unigram_losses_by_their_definition(corpus: Prepared) -> None:
    folder, info = corpus
    tokens = {split: np.fromfile(folder / f"{split}.bin", dtype=np.uint16).tolist() for split in ("train", "valid")}
    raw = {split: "".join(texts).encode() for split, texts in read_back(folder).items()}

    def loss(train, valid, symbols: int) -> float:
        probability = [(list(train).count(s) + 1) / (len(train) + symbols) for s in range(symbols)]
        return -sum(math.log(probability[s]) for s in valid) / info.valid.bytes

    assert info.unigram_loss_per_byte == pytest.approx(
        loss(tokens["train"], tokens["valid"], info.vocab_size), rel=1e-9
    )
    assert info.byte_unigram_loss_per_byte == pytest.approx(loss(raw["train"], raw["valid"], 256), rel=1e-9)
    assert info.bytes_per_token == info.valid.bytes / info.valid.tokens


def test_the_same_everywhere(make: Callable[..., Prepared]) -> None:
    (one, first), (two, second), (three, _) = make(TEXTS), make(TEXTS), make(TEXTS[::-1] + TEXTS[:3])
    assert (first.train, first.valid, first.tokenizer_sha256) == (second.train, second.valid, second.tokenizer_sha256)
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer/tokenizer.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    # Neither order nor copies move a text to the other side.
    assert {s: set(t) for s, t in read_back(one).items()} == {s: set(t) for s, t in read_back(three).items()}


def test_a_small_corpus_still_gets_a_validation_document(make: Callable[..., Prepared]) -> None:
    _, info = make(["only one", "and another"], valid_fraction=0.001)
    assert (info.train.documents, info.valid.documents) == (1, 1)
    with pytest.raises(ConfigError, match="no document is left for training"):
        make(["the same", "the same"])
    with pytest.raises(ConfigError, match="no document; give at least two"):
        make([])


def test_a_given_tokenizer_and_a_bound_on_the_text(make: Callable[..., Prepared], corpus: Prepared) -> None:
    folder, base = corpus
    output, info = make(sentences(60, "other"), tokenizer=str(folder / "tokenizer"), max_megabytes=0.002)
    assert (info.tokenizer_sha256, info.vocab_size, info.eod_id) == (
        base.tokenizer_sha256,
        base.vocab_size,
        base.eod_id,
    )
    found = read_back(output)
    taken = len(found["train"] + found["valid"])
    assert sorted(found["train"] + found["valid"]) == sorted(sentences(60, "other")[:taken])
    assert (
        sum(len(t) for t in sentences(60, "other")[:taken])
        <= 2000
        < sum(len(t) for t in sentences(60, "other")[: taken + 1])
    )


def test_large_vocabularies_take_wider_tokens(make: Callable[..., Prepared], corpus: Prepared, tmp_path: Path) -> None:
    source = json.loads((corpus[0] / "tokenizer" / "tokenizer.json").read_text())
    source["model"]["vocab"]["<far>"] = 70000
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    output, info = make(TEXTS, tokenizer=str(tmp_path / "tokenizer.json"))
    assert info.vocab_size == 70001
    assert (output / "train.bin").stat().st_size == 4 * info.train.tokens
    found = read_back(output)
    assert sorted(found["train"] + found["valid"]) == sorted(TEXTS)


def test_what_is_not_text_is_skipped_and_counted_or_named(tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    write_files(inputs)
    (inputs / "binary.txt").write_bytes(b"\xff\xfe\x00")
    lines = inputs / "lines.jsonl"
    lines.write_text('{"text": null}\n\n{"text": "x"}\n')
    arguments = PrepareArguments(str(tmp_path / "out"), inputs=(str(inputs),), vocab_size=300)
    info = prepare(arguments)
    assert (info.skipped_files, info.skipped_texts) == (1, 1)
    for line, message in (
        ("{", r"lines.jsonl:1'?: not a line of JSON"),
        ('{"body": "x"}', r"--text-key='text': not among the keys of .*lines.jsonl:1: body"),
        ('{"text": 3}', "holds int, not text"),
        ('{"text": "\\ud800"}', "not valid Unicode"),
        ("[1]", "a list"),
    ):
        lines.write_text(line)
        with pytest.raises(ConfigError, match=message):
            prepare(arguments, overwrite=True)
    lines.unlink()
    (inputs / "broken.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ConfigError, match=r"broken.parquet'?: not a readable Parquet file"):
        prepare(arguments, overwrite=True)
    assert dataset_info(tmp_path / "out") == info  # the failures left the finished folder alone


@pytest.mark.parametrize("stage", ["reading", "training the tokenizer", "encoding"])
def test_an_interrupted_run_leaves_nothing(stage: str, tmp_path: Path) -> None:
    arguments = PrepareArguments(str(tmp_path / "out"), inputs=(str(write_jsonl(tmp_path / "in.jsonl", TEXTS)),))

    def interrupt(reached: str, done: int, total: int) -> None:
        if reached == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(arguments, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_repeated_changed_and_overwritten(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    arguments = PrepareArguments(str(tmp_path / "out"), inputs=(str(source),), vocab_size=300)
    first = prepare(arguments)
    source.unlink()
    assert prepare(arguments) == first  # finished: the input is not even looked at
    write_jsonl(source, sentences(9))
    changed = PrepareArguments(str(tmp_path / "out"), inputs=(str(source),), vocab_size=301)
    with pytest.raises(ConfigError, match=r"vocab_size was 300, is 301.*--overwrite"):
        prepare(changed)
    assert prepare(changed, overwrite=True).train.documents != first.train.documents
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else"):
        prepare(PrepareArguments(str(other), inputs=(str(source),)), overwrite=True)
    assert (other / "thesis.tex").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"valid_fraction": 1.0}, "--valid-fraction=1.0"),
        ({"max_megabytes": 0.0}, "--max-megabytes=0.0"),
        ({"max_megabytes": float("inf")}, "--max-megabytes=inf"),
        ({"inputs": ("",)}, "--input=''"),
        ({"eod_token": "</s>"}, "goes with --tokenizer"),
        ({"inputs": ("/no/such/place",)}, "--input='/no/such/place': no file found"),
    ],
)
def test_nonsense_arguments_are_named(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(PrepareArguments(str(tmp_path / "out"), **options))


def test_the_default_corpus_is_the_librarys_own_sources() -> None:
    files = standard_library_files()
    names = {file.name for file in files}
    assert {"argparse.py", "typing.py"} <= names
    assert files == standard_library_files()
    assert not [f for f in files if {"test", "tests", "idle_test", "site-packages"} & set(f.parts)]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    path = Path(__file__).parents[2] / "launch" / "prepare_data.py"
    spec = importlib.util.spec_from_file_location("prepare_data", path)
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
        return command.main(), " ".join(capsys.readouterr().err.split())

    output, source = str(tmp_path / "out"), str(write_jsonl(tmp_path / "in.jsonl", TEXTS))
    code, text = call("--output", output, "--input", source, "--vocab-size", "300")
    assert code == 0
    assert "documents end with <|endoftext|> (0)" in text
    assert isinstance(dataset_info(output), DatasetInfo)
    code, text = call("--output", output, "--input", source, "--vocab-size", "300")
    assert (code, text.endswith("already prepared")) == (0, True)
    code, text = call("--output", output, "--input", source, "--vocab-size", "301")
    assert code == 2
    assert "--overwrite" in text
    assert "Traceback" not in text
