"""Chat rows in the common shapes -> conversations: JSONL lines or Parquet rows, every broken one named by file:line.

Shapes, by the first of these keys that a row has:
  - messages: [{"role": ..., "content": ...}, ...]; other keys of a message (tool_calls, name) are the template's affair
  - conversations (ShareGPT): [{"from": ..., "value": ...}, ...], with an optional `system` text beside it
  - prompt and completion: texts (a user and an assistant turn) or lists of messages; the prompt carries no loss
A row may also have `tools` (for the template) and `document` (the source it is about, for splits and weights).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moba_train.config.schema import ConfigError
from moba_train.data.sources import JSONL_SUFFIXES, PARQUET_SUFFIXES, find_files, json_lines, parquet_rows

__all__ = ["Conversation", "chat_files", "read_conversations"]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_SHAPES = "messages, conversations, or prompt and completion"


@dataclass(frozen=True)
class Conversation:
    """One chat row. Messages before `first_loss` carry no loss whatever their role."""

    messages: list[dict[str, Any]]
    key: str  # the setting that named its file
    file: Path
    line: int  # of a JSONL file, or row of a Parquet one, from 1
    first_loss: int = 0
    tools: list[dict[str, Any]] | None = None
    document: str | None = None

    @property
    def place(self) -> str:
        """Where it was read, for messages to people."""
        return f"{self.file}:{self.line}"


def chat_files(given: str, key: str) -> list[Path]:
    """The JSONL and Parquet files of a file, folder or glob; ConfigError (about `key`) where there are none."""
    hint = "; those of recipe sft_tiny are made by: make sft"
    files = find_files([given], (*JSONL_SUFFIXES, *PARQUET_SUFFIXES), key, hint)
    for file in files:
        if file.suffix.lower() not in (*JSONL_SUFFIXES, *PARQUET_SUFFIXES):
            raise ConfigError(key, str(file), "neither .jsonl nor .parquet; convert it to JSON lines")
    return files


def read_conversations(files: Sequence[Path], key: str) -> Iterator[Conversation]:
    """Every row of `files` in order; ConfigError (about `key`) at the first broken one."""
    for file in files:
        records = json_lines if file.suffix.lower() in JSONL_SUFFIXES else parquet_rows
        for line, record in records(file, key):
            try:
                yield _conversation(record, key, file, line)
            except _BrokenRow as broken:
                raise ConfigError(key, f"{file}:{line}", f"{broken}; mend or drop the row") from None


class _BrokenRow(Exception):
    """What is wrong with a row, for the reader to add where it stands."""


def _conversation(record: Any, key: str, file: Path, line: int) -> Conversation:
    if not isinstance(record, dict):
        raise _BrokenRow(f"a row is an object with {_SHAPES}, not a {type(record).__name__}")
    row = {name: value for name, value in record.items() if value is not None}  # Parquet has every column in every row
    first_loss = 0
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
    elif "conversations" in row:
        messages = _sharegpt(row["conversations"])
        if "system" in row and not (messages and messages[0]["role"] == "system"):
            messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
    elif "prompt" in row and "completion" in row:
        prompt = _side(row["prompt"], "prompt", "user")
        messages, first_loss = prompt + _side(row["completion"], "completion", "assistant"), len(prompt)
    else:
        raise _BrokenRow(f"it has none of {_SHAPES} (its keys: {', '.join(sorted(map(str, row))) or 'none'})")
    tools, document = row.get("tools"), row.get("document")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _BrokenRow("tools must be a list of objects")
    if document is not None and not isinstance(document, (str, int)):
        raise _BrokenRow(f"document must be text or a number, not {type(document).__name__}")
    source = None if document is None else str(document)
    return Conversation(messages, key, file, line, first_loss, tools or None, source)


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _BrokenRow(f"{where} must be a list, not {type(value).__name__}")
    messages = []
    for index, message in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise _BrokenRow(f"{place} must be an object with role and content, not {type(message).__name__}")
        message = {name: item for name, item in message.items() if item is not None}
        if not isinstance(message.get("role"), str):
            raise _BrokenRow(f"{place} has no role")
        if not ("content" not in message and "tool_calls" in message):  # a call may have nothing to say
            _text(message.get("content"), f"{place}.content")
        messages.append(message)
    return messages


def _sharegpt(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _BrokenRow(f"conversations must be a list, not {type(value).__name__}")
    if any(isinstance(message, dict) and "role" in message for message in value):
        return _messages(value, "conversations")
    messages = []
    for index, message in enumerate(value):
        place = f"conversations[{index}]"
        if not isinstance(message, dict):
            raise _BrokenRow(f"{place} must be an object with from and value, not {type(message).__name__}")
        speaker = message.get("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise _BrokenRow(f"{place} is from {speaker!r}, not one of {', '.join(_SHAREGPT_ROLES)}")
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": _text(message.get("value"), f"{place}.value")})
    return messages


def _side(value: Any, where: str, role: str) -> list[dict[str, Any]]:
    if not isinstance(value, str | list):
        raise _BrokenRow(f"{where} must be text or a list of messages, not {type(value).__name__}")
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _BrokenRow(f"{where} must be text, not {'null' if value is None else type(value).__name__}")
    return value
