"""Chat rows to packed contexts: what is in them, weights, splits, policies, order, the cache."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moba_train.config.schema import ConfigError, DataConfig, SftConfig
from moba_train.data import chat_rows
from moba_train.data.chat_template import ChatTokenizer
from moba_train.data.loader import Loader
from moba_train.data.sft import SftData, build_sft, check_sft
from moba_train.data.tokenizer import train_byte_bpe

S = 96
Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    train_byte_bpe(["user assistant number is question " * 20], 300).save(folder)
    return folder


def chat(question: str, answer: str, **extra: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **extra}


def numbered(count: int) -> Rows:
    """Rows of different lengths, each with its number in it."""
    return [chat(f"question {i} {'é' * (i % 9)}", f"number {i} is {'x' * (i % 5)}") for i in range(count)]


VALID = [chat("v", "w")]


def write(file: Path, rows: Rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def build(tokenizer: Path, tmp_path: Path) -> Callable[..., SftData]:
    def build_data(
        rows: Rows,
        *,
        train: int = 12,
        valid: int = 4,
        length: int = S,
        seed: int = 1,
        valid_rows: Rows | None = VALID,
        **options: Any,
    ) -> SftData:
        """All of `rows` to train on and `valid_rows` to validate on; None: a part of `rows`."""
        file = write(tmp_path / "rows.jsonl", rows)
        if valid_rows is not None:
            options["valid_path"] = str(write(tmp_path / "valid.jsonl", valid_rows))
        config = SftConfig(path=str(file), tokenizer=str(tokenizer), **options)
        data = DataConfig(seed=seed)
        samples = {"train_samples": train, "valid_samples": valid}
        return build_sft(config, data, vocab_size=300, sequence_length=length, **samples)

    return build_data


def documents(data: Any, count: int) -> list[tuple[list[int], list[int], list[float]]]:
    """(tokens, labels, weights) of every document of `count` contexts, filler left out."""
    found = []
    for i in range(count):
        batch = data[i]
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            part = slice(start, end)
            assert batch.positions[part].tolist() == list(range(end - start))
            if batch.loss_mask[part].any():
                found.append(tuple(t[part].tolist() for t in (batch.tokens, batch.labels, batch.loss_mask)))
            else:
                assert (end, i) == (len(batch.tokens), i)  # filler comes last
    return found


@pytest.mark.parametrize("packing", ["first_fit_decreasing", "sequential", "none"])
def test_a_pass_has_every_row_once_as_its_template_writes_it(build, tokenizer: Path, packing: str) -> None:
    rows = numbered(40)
    data = build(rows, train=50, packing=packing)
    expected = {}
    for row in ChatTokenizer(str(tokenizer)).encode([_conversation(row) for row in rows]):
        expected[tuple(row.ids.tolist())] = row.loss.tolist()
    for tokens, labels, weights in documents(data.train, _one_pass(data, 40)):
        assert labels[:-1] == tokens[1:]
        assert weights == expected.pop((*tokens, labels[-1]))[1:]
    assert not expected


def _one_pass(data: SftData, rows: int) -> int:
    """How many contexts hold the first `rows` rows."""
    count = next(n for n in range(1, len(data.train) + 1) if len(documents(data.train, n)) >= rows)
    assert len(documents(data.train, count)) == rows
    return count


def _conversation(row: dict[str, Any]) -> Any:
    from moba_train.data.chat import Conversation

    return Conversation(row["messages"], "sft.path", Path("rows.jsonl"), 1)


def test_packing_fills_contexts_and_says_so(build, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="moba_train"):
        data = build(numbered(60), train=60)
    text = caplog.text
    assert "train: 60 chat rows" in text
    assert "first_fit_decreasing makes" in text
    share = float(text.split("contexts of 96, ")[1].split(" %")[0])
    count = int(text.split("first_fit_decreasing makes ")[1].split(" contexts")[0])
    filled = sum(len(tokens) for tokens, _, _ in documents(data.train, count))
    assert share == pytest.approx(100 * filled / (count * S), abs=0.06)
    assert share > 80


def test_weightings(build) -> None:
    rows = [
        chat("q", "number is number is x is number", document="a"),
        chat("q", "x", document="b"),
        chat("q2", "xxxxxxxx", document="b"),
    ]
    for weighting in ("token", "sample", "document"):
        data = build(rows, loss_weighting=weighting, length=600, train=1, packing="sequential")
        weights = sorted((row for _, _, row in documents(data.train, 1)), key=lambda row: sum(w > 0 for w in row))
        sizes = [sum(w > 0 for w in row) for row in weights]
        assert len(set(sizes)) == 3  # a's row is the last
        expected = {"token": sizes, "sample": [1, 1, 1], "document": [0.5, 0.5, 1]}[weighting]
        assert [sum(row) for row in weights] == pytest.approx(expected, rel=1e-6)
        assert all(len({w for w in row if w}) == 1 for row in weights)  # spread evenly


def test_the_split_is_by_document_and_the_same_for_every_seed(build) -> None:
    rows = [chat(f"question {i}", f"number {i}", document=str(i // 3)) for i in range(60)]
    splits = []
    for seed in (1, 2):
        data = build(rows, train=60, valid=60, packing="none", valid_fraction=0.3, seed=seed, valid_rows=None)
        parts = [documents(data.valid, data.valid.num_rows), documents(data.train, 60 - data.valid.num_rows)]
        splits.append([sorted(map(str, part)) for part in parts])
        assert len(parts[0]) % 3 == 0
        assert 3 <= len(parts[0]) <= 30
    assert splits[0] == splits[1]


def test_past_the_rows_to_validate_on_there_is_no_loss(build) -> None:
    data = build(numbered(5), train=5, packing="none", valid=4)
    assert (data.valid.num_rows, len(data.valid)) == (1, 4)
    assert [bool(data.valid[i].loss_mask.any()) for i in range(4)] == [True, False, False, False]


def test_one_source_leaves_nothing_to_train_on(build) -> None:
    with pytest.raises(ConfigError, match="no row is left for training"):
        build([chat("a", "b", document="x"), chat("c", "d", document="x")], valid_rows=None)


def test_rows_longer_than_the_context(build, caplog: pytest.LogCaptureFixture) -> None:
    long = [chat("question " * 99, "never seen"), chat("q", "number is " * 99)]
    rows = [*numbered(12), *long]
    with pytest.raises(ConfigError, match=r"sft\.overlong='refuse': 2 of 14 train rows .*rows\.jsonl:13 with"):
        build(rows)
    with caplog.at_level("INFO", logger="moba_train"):
        dropped = build(rows, overlong="drop", packing="none", train=12)
    assert "2 too long" in caplog.text
    assert max(len(tokens) for tokens, _, _ in documents(dropped.train, 12)) < S
    caplog.clear()
    with caplog.at_level("INFO", logger="moba_train"):
        cut = build(rows, overlong="truncate", packing="none", train=13)
    assert "1 without loss once truncated; truncated: 1" in caplog.text
    assert max(len(tokens) for tokens, _, _ in documents(cut.train, 13)) == S
    with pytest.raises(ConfigError, match="no train row with a loss token is left"):
        build([*long[:1], chat("question " * 98, "nor this")], overlong="truncate")


def test_a_row_that_just_fits(build) -> None:
    rows = numbered(5)
    longest = max(len(tokens) for tokens, _, _ in documents(build(rows, train=5, packing="none").train, 5))
    fits = build(rows, train=5, packing="none", length=longest).train
    assert [0, longest] in [fits[i].cu_seqlens.tolist() for i in range(5)]
    with pytest.raises(ConfigError, match="refuse"):
        build(rows, length=longest - 1)


def test_rows_without_an_assistant_turn_are_counted_and_left_out(build, caplog: pytest.LogCaptureFixture) -> None:
    silent = [{"messages": [{"role": "user", "content": "hm"}]}, {"messages": []}]
    with caplog.at_level("INFO", logger="moba_train"):
        build([*numbered(6), *silent], train=2)
    assert "left out: 2 without assistant tokens" in caplog.text
    with pytest.raises(ConfigError, match="none of its 2 rows has an assistant turn"):
        build(silent)
    with pytest.raises(ConfigError, match="it has no rows"):
        build([])


def test_sample_numbers_decide_and_passes_differ(build) -> None:
    valid = numbered(9)
    data = build(numbered(30), train=40, valid_rows=valid)
    again = build(numbered(30), train=80, valid_rows=valid)
    other = build(numbered(30), train=40, valid_rows=valid, seed=2)
    for i in range(40):
        assert torch.equal(data.train[i].tokens, again.train[i].tokens)  # more samples: the same ones first
    assert any(not torch.equal(data.train[i].tokens, other.train[i].tokens) for i in range(40))
    one_pass = _one_pass(data, 30)
    first, second = ([data.train[i].tokens.tolist() for i in range(start, start + one_pass)] for start in (0, one_pass))
    assert first != second
    for i in range(4):
        assert torch.equal(data.valid[i].tokens, other.valid[i].tokens)


def test_a_loader_over_chat_rows_resumes_exactly(build) -> None:
    data = build(numbered(30), train=24).train
    straight = [batch.tokens.tolist() for batch in islice(Loader(data, global_batch_size=4, dp_rank=0, dp_size=1), 24)]
    resumed = [Loader(data, global_batch_size=4, dp_rank=r, dp_size=2, start_sample=12) for r in range(2)]
    again = [next(loader).tokens.tolist() for _ in range(3) for loader in resumed for _ in range(2)]
    assert again == straight[12:]


def test_tokenised_once_and_again_when_something_changed(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = ChatTokenizer.encode
    monkeypatch.setattr(ChatTokenizer, "encode", lambda self, rows: calls.append(len(rows)) or encode(self, rows))
    file = write(tmp_path / "rows.jsonl", numbered(20))
    place = {"path": str(file), "tokenizer": str(tokenizer)}
    for options in ({}, {}, {"packing": "none"}, {"loss_weighting": "sample"}, {"overlong": "drop"}):
        check_sft(SftConfig(**place, **options), DataConfig(), 300, S, 1.0)
    assert calls == [20]
    check_sft(SftConfig(**place, last_turn_only=True), DataConfig(), 300, S, 1.0)
    assert calls == [20, 20]
    write(file, numbered(21))
    check_sft(SftConfig(**place), DataConfig(), 300, S, 1.0)
    assert calls == [20, 20, 21]
    assert not list((tmp_path / "cache").glob(".*"))


def test_the_hash_of_the_content_is_of_what_is_trained_on_alone(build, tokenizer: Path, tmp_path: Path) -> None:
    rows = [*numbered(9), chat("q", "number is " * 99)]

    def content(rows: Rows, **options: Any) -> str:
        return build(rows, train=4, overlong="truncate", **options).content

    first = content(rows)
    path, valid_path = ((tmp_path / f"{name}.jsonl") for name in ("rows", "valid"))
    path = path.rename(tmp_path / "moved.jsonl")
    moved = SftConfig(str(path), str(valid_path), tokenizer=str(tokenizer), overlong="truncate")
    assert check_sft(moved, DataConfig(), 300, S, 1.0) == first
    assert content(rows, valid_rows=[chat("other", "rows")], packing="none", seed=2) == first
    changed = [[*rows[:-1], chat("q", "number is x" * 99)], rows[:-1], rows[::-1]]
    others = [content(other) for other in changed] + [content(rows, length=S - 1), content(rows, valid_rows=None)]
    assert len({first, *others}) == 6


def test_nothing_is_left_of_a_broken_file(build, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl:3.*none of messages"):
        build([*numbered(2), {"no": "messages"}])
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_ranks_wait_for_the_first(
    build, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_rows, "_POLL_S", 0.01)
    file = write(tmp_path / "rows.jsonl", VALID)
    reader = ChatTokenizer(str(tokenizer))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*all nodes share"):
        chat_rows.tokenised_rows(str(file), reader, timeout_s=0.05)
    found: list[int] = []
    began, wait_for = threading.Event(), chat_rows._wait_for
    monkeypatch.setattr(chat_rows, "_wait_for", lambda *args: began.set() or wait_for(*args))
    waiting = threading.Thread(target=lambda: found.append(len(chat_rows.tokenised_rows(str(file), reader))))
    waiting.start()
    assert began.wait(timeout=20)
    monkeypatch.setenv("RANK", "0")
    assert len(chat_rows.tokenised_rows(str(file), ChatTokenizer(str(tokenizer)))) == 1
    waiting.join(timeout=20)
    assert found == [1]


def test_a_vocabulary_larger_than_the_models_is_refused(build, tokenizer: Path, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", VALID)
    config = SftConfig(path=str(tmp_path / "rows.jsonl"), tokenizer=str(tokenizer))
    with pytest.raises(ConfigError, match=r"model\.vocab_size=200: .* has \d+ tokens"):
        check_sft(config, DataConfig(), 200, S, 1.0)


def test_a_cache_that_cannot_be_written(build, tokenizer: Path, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", VALID)
    (tmp_path / "file").write_text("")
    config = SftConfig(path=str(tmp_path / "rows.jsonl"), tokenizer=str(tokenizer))
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*cannot be written"):
        check_sft(config, DataConfig(cache_dir=str(tmp_path / "file" / "cache")), 300, S, 1.0)


def test_wide_token_ids_survive(tmp_path: Path) -> None:
    assert chat_rows._token_dtype(1 << 16) is np.uint16
    assert chat_rows._token_dtype((1 << 16) + 1) is np.uint32
