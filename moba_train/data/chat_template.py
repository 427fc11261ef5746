"""Conversations -> token ids and which of them carry loss, by the tokenizer's chat template.

Invariants:
  - the ids are those of transformers' `apply_chat_template(messages, tokenize=True)`
  - loss lies on assistant turns only: what the template puts between {% generation %} and {% endgeneration %}, else
    what a turn adds to the rendering of the messages before it with the generation prompt, up to the end token
  - a token carries loss by its place in the text, never by its id: an end token closing an assistant turn does, also
    where it is the pad token, and one in any other turn does not
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moba_train.config.schema import ConfigError
from moba_train.data.chat import Conversation

__all__ = ["BUILT_IN_TEMPLATE", "ChatTokenizer", "Encoded"]

_LOG = logging.getLogger(__name__)
# Plain text: a tokenizer without a chat template has no tokens for roles either.
BUILT_IN_TEMPLATE = """\
{%- for message in messages -%}
{{- '### ' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}
{{- message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### assistant\\n' -}}{%- endif -%}
"""
_BUILT_IN_ROLES = ("system", "user", "assistant", "tool")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """One tokenised row. ids [n] and whether each, as an answer, carries loss: bool [n]."""

    ids: np.ndarray
    loss: np.ndarray
    text: str


class ChatTokenizer:
    """A pretrained folder's tokenizer with its chat template, the one in `template_file`, or the built-in one."""

    def __init__(self, folder: str, template_file: str | None = None, *, last_turn_only: bool = False) -> None:
        self._tokenizer, self._folder = _load(folder), Path(folder)
        self._last_turn_only = last_turn_only
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.source = "the tokenizer's own"
        if template_file is not None:
            self._tokenizer.chat_template, self.source = _read_template(template_file), template_file
        elif not self._tokenizer.chat_template:
            if not self._tokenizer.eos_token:
                remedy = "it has neither a chat template nor an end token; give sft.chat_template=FILE"
                raise ConfigError("sft.tokenizer", folder, remedy)
            self._tokenizer.chat_template, self.source = BUILT_IN_TEMPLATE, "built-in"
        self._key = ("sft.tokenizer", folder) if template_file is None else ("sft.chat_template", template_file)

    def save(self, folder: Path) -> None:
        """Write the tokenizer with the template that was used, for whoever talks to the tuned model."""
        original = self._folder / "tokenizer.json"
        content = original.read_bytes() if original.is_file() else None  # `folder` may be the one it came from
        self._tokenizer.save_pretrained(folder)
        if content is not None:  # to the byte: data are known as prepared with a tokenizer by its hash
            (folder / original.name).write_bytes(content)

    @cached_property
    def identity(self) -> str:
        """A hash of all that decides what `encode` returns."""
        parts = (
            self._backend.to_str(),
            repr(self._tokenizer.chat_template),
            repr(sorted(self._tokenizer.special_tokens_map.items())),
            repr(self._last_turn_only),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Tokenise rows, on all cores; ConfigError names a row that the template cannot render or tell apart."""
        rendered = [self._render(conversation) for conversation in conversations]
        texts = [text for text, _, _ in rendered]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        found = []
        for encoding, (text, spans, marked) in zip(encodings, rendered, strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            loss = np.zeros(len(ids), dtype=bool)
            for span in spans:
                inside = _overlapping(offsets, *span)
                loss[inside if marked else self._up_to_end_token(ids, inside)] = True
            found.append(Encoded(ids, loss, text))
        return found

    def _render(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]], bool]:
        """The row's text, the character spans that carry loss, and whether the template marks them itself."""
        messages, turns = conversation.messages, self._turns(conversation)
        if self.source == "built-in":
            _check_for_built_in(conversation)
        template = self._tokenizer.get_chat_template(tools=conversation.tools)
        marked = _GENERATION.search(template) is not None
        text, marks = self._text(conversation, messages, template, marked=marked)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            what = f"its text is not valid Unicode ({error.reason}); mend or drop the row"
            raise ConfigError(conversation.key, conversation.place, what) from error
        if not marked:
            return text, [self._span(conversation, template, text, turn) for turn in turns], False
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if turns == assistants:
            return text, marks, True
        if len(marks) != len(assistants):
            what = f"it marks {len(marks)} generations for the {len(assistants)} assistant turns of"
            remedy = f"{what} {conversation.place}, so a part of them cannot be chosen; mark one for each turn"
            raise ConfigError(*self._key, remedy)
        return text, [mark for mark, turn in zip(marks, assistants, strict=True) if turn in turns], True

    def _turns(self, conversation: Conversation) -> list[int]:
        """The messages that carry loss."""
        roles = [message["role"] for message in conversation.messages]
        turns = [i for i, role in enumerate(roles) if role == "assistant" and i >= conversation.first_loss]
        return turns[-1:] if self._last_turn_only else turns

    def _span(self, conversation: Conversation, template: str, text: str, turn: int) -> tuple[int, int]:
        """Characters that message `turn` adds to the text; ConfigError where a prefix is not rendered as one."""
        before, _ = self._text(conversation, conversation.messages[:turn], template, prompt=True)
        after, _ = self._text(conversation, conversation.messages[: turn + 1], template)
        if not (text.startswith(after) and after.startswith(before)):
            remedy = (
                f"the template writes the first {turn + 1} messages of {conversation.place} otherwise than the whole, "
                "so assistant turns cannot be told apart; put {% generation %} and {% endgeneration %} around them in "
                "a copy of it, and give that as sft.chat_template=FILE"
            )
            raise ConfigError(*self._key, remedy)
        return len(before), len(after)

    def _text(
        self,
        conversation: Conversation,
        messages: list[dict[str, Any]],
        template: str,
        *,
        prompt: bool = False,
        marked: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        import jinja2
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotation leaves out the generation marks
        try:
            texts, marks = render(
                conversations=[messages],
                tools=conversation.tools,
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **self._tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            remedy = f"it cannot render {conversation.place} ({error}); mend the row or the template"
            raise ConfigError(*self._key, remedy) from error
        return texts[0], [(start, end) for start, end in marks[0]] if marked else []

    def _up_to_end_token(self, ids: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Of the tokens of a turn those up to its last end token: a model stops there, what follows is the template."""
        ends = inside[ids[inside] == self._tokenizer.eos_token_id]
        return inside[inside <= ends[-1]] if len(ends) else inside


def _overlapping(offsets: np.ndarray, start: int, end: int) -> np.ndarray:
    """Tokens that hold at least a part of characters start..end; several tokens may share a character."""
    first, last = offsets[:, 0], offsets[:, 1]
    return np.flatnonzero((first < end) & ((last > start) | ((first == last) & (first >= start))))


def _check_for_built_in(conversation: Conversation) -> None:
    remedy = "give the model's own as sft.chat_template=FILE"
    for index, message in enumerate(conversation.messages):
        if message["role"] not in _BUILT_IN_ROLES:
            what = f"messages[{index}] has role {message['role']!r}, the built-in chat template knows"
            raise ConfigError(conversation.key, conversation.place, f"{what} {', '.join(_BUILT_IN_ROLES)}; {remedy}")
        if "content" not in message or "tool_calls" in message:
            what = f"messages[{index}] calls a tool, which the built-in chat template cannot write"
            raise ConfigError(conversation.key, conversation.place, f"{what}; {remedy}")
    if conversation.tools:
        what = "it lists tools, which the built-in chat template cannot write"
        raise ConfigError(conversation.key, conversation.place, f"{what}; {remedy}")


def _load(folder: str) -> Any:
    if not Path(folder).is_dir():
        remedy = (
            "no such folder; name a pretrained folder, or the tokenizer/ of a prepared one; that of recipe sft_tiny is "
            "made, with its rows, by: make sft"
        )
        raise ConfigError("sft.tokenizer", folder, remedy)
    from transformers import AutoTokenizer  # takes seconds to import

    remedy = "transformers finds no tokenizer here; name a folder with tokenizer.json and tokenizer_config.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError("sft.tokenizer", folder, f"{remedy} ({str(error).splitlines()[0]})") from error
    if not tokenizer.is_fast:
        raise ConfigError("sft.tokenizer", folder, "it tells no character offsets; name a folder with tokenizer.json")
    return tokenizer


def _read_template(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("sft.chat_template", file, f"cannot be read ({error}); name a jinja file") from error
