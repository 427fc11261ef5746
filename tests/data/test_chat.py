"""Chat rows of every shape, and what is said about broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moba_train.config.schema import ConfigError
from moba_train.data.chat import Conversation, chat_files, read_conversations


def read(tmp_path: Path, *rows: object) -> list[Conversation]:
    file = tmp_path / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return list(read_conversations([file], "sft.path"))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


HELLO = [turn("user", "Hello"), turn("assistant", "Hi")]


def test_the_three_shapes_say_the_same(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {"messages": HELLO, "id": 7},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
        {"conversations": HELLO},
        {"prompt": "Hello", "completion": "Hi"},
        {"prompt": HELLO[:1], "completion": HELLO[1:]},
        {"prompt": HELLO[:1], "completion": "Hi"},
    )
    assert [row.messages for row in found] == [HELLO] * 6
    assert [row.first_loss for row in found] == [0, 0, 0, 1, 1, 1]
    assert [row.line for row in found] == [1, 2, 3, 4, 5, 6]


def test_a_prompt_may_hold_assistant_turns_that_carry_no_loss(tmp_path: Path) -> None:
    prompt = [*HELLO, turn("user", "And?")]
    (row,) = read(tmp_path, {"prompt": prompt, "completion": [turn("assistant", "So")]})
    assert row.first_loss == 3
    assert row.messages == [*prompt, turn("assistant", "So")]


def test_sharegpt_roles_and_system(tmp_path: Path) -> None:
    speakers = ["system", "human", "function_call", "observation", "gpt"]
    (row, other) = read(
        tmp_path,
        {"conversations": [{"from": speaker, "value": speaker} for speaker in speakers]},
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    )
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert other.messages[0] == turn("system", "Be brief.")


def test_other_keys_of_a_message_and_row_reach_the_template(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    (row,) = read(tmp_path, {"messages": [HELLO[0], call], "tools": [{"name": "f"}], "document": 12})
    assert row.messages[1] == {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    assert (row.tools, row.document) == ([{"name": "f"}], "12")


def test_parquet_with_columns_of_several_shapes(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": HELLO, "prompt": None}, {"messages": None, "prompt": "Hello", "completion": "Hi"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema([
        ("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))),
        ("prompt", pyarrow.string()),
        ("completion", pyarrow.string()),
    ])), tmp_path / "rows.parquet")  # fmt: skip
    found = list(read_conversations(chat_files(str(tmp_path), "sft.path"), "sft.path"))
    assert [row.messages for row in found] == [HELLO, HELLO]
    assert found[1].place.endswith("rows.parquet:2")


@pytest.mark.parametrize(
    "row, said",
    [
        ("{not json", "not a line of JSON"),
        ("[1, 2]", "not a list"),
        ({"text": "plain"}, "none of messages"),
        ({}, "none of messages"),
        ({"prompt": "only"}, "none of messages"),
        ({"messages": "Hello"}, "messages must be a list"),
        ({"messages": ["Hello"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role"),
        ({"messages": [turn("user", "x"), {"role": "assistant"}]}, r"messages\[1\]\.content must be text, not null"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "must be text, not list"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "from 'martian', not one of human"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]\.value must be text, not null"),
        ({"prompt": 3, "completion": "x"}, "prompt must be text or a list"),
        ({"conversations": [{"from": ["human"], "value": "q"}]}, r"is from \['human'\], not one of"),
        ({"messages": HELLO, "tools": "f"}, "tools must be a list"),
        ({"messages": HELLO, "document": [1]}, "document must be text"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read(tmp_path, {"messages": HELLO}, "", row)
    assert caught.value.key == "sft.path"
    assert str(caught.value.value).endswith("rows.jsonl:3")


def test_files_that_are_not_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ConfigError, match=r"sft\.valid_path=.*neither \.jsonl nor \.parquet"):
        chat_files(str(tmp_path / "rows.csv"), "sft.valid_path")
    with pytest.raises(ConfigError, match="no file"):
        chat_files(str(tmp_path / "none"), "sft.path")
    with pytest.raises(ConfigError, match="not a readable Parquet file"):
        list(read_conversations(chat_files(str(tmp_path), "sft.path"), "sft.path"))


def test_a_parquet_file_damaged_within_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a" * 200] * 50, "completion": ["b"] * 50}), file)
    content = bytearray(file.read_bytes())
    content[4:64] = b"\xff" * 60
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"rows\.parquet'?: not a readable Parquet file"):
        list(read_conversations([file], "sft.path"))
