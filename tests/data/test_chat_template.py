"""Which tokens carry loss, under templates of every kind; ids and masks against transformers' own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moba_train.config.schema import ConfigError
from moba_train.data.chat import Conversation
from moba_train.data.chat_template import ChatTokenizer, Encoded
from moba_train.data.tokenizer import Tokenizer, train_byte_bpe

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>"
    "{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thoughts of earlier turns are dropped, as reasoning models do: a prefix is not rendered as in the whole.
FORGETFUL = CHATML.replace("['content'] }}", "['content'] if loop.last or message['role'] == 'user' else 'thought' }}")
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first, please') }}{% endif %}" + CHATML
EARLIER = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "First answer"}]
TWO_TURNS = [*EARLIER, {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Zweite é🙂"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_bpe(["user assistant answer One Two first é🙂 " * 20], 300).save(folder)
    return folder


def tokenizer(base: Path, folder: Path, template: str | None, **config: Any) -> ChatTokenizer:
    """`base` with a template, chat tokens and `config`."""
    from tokenizers import Tokenizer as Backend

    folder.mkdir()
    backend = Backend.from_file(str(base / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    values = json.loads((base / "tokenizer_config.json").read_text()) | {"eos_token": "<|im_end|>"} | config
    if template is not None:
        values["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    last = values.pop("last", False)
    return ChatTokenizer(str(folder), last_turn_only=last)


def row(messages: list[dict[str, Any]], **options: Any) -> Conversation:
    return Conversation(messages, "sft.path", Path("rows.jsonl"), 4, **options)


def encode(chat: ChatTokenizer, messages: list[dict[str, Any]], **options: Any) -> Encoded:
    (encoded,) = chat.encode([row(messages, **options)])
    return encoded


def learned(chat: ChatTokenizer, encoded: Encoded) -> list[str]:
    """The text of each run of loss tokens."""
    runs: list[list[int]] = []
    for i, token in enumerate(encoded.ids.tolist()):
        if encoded.loss[i]:
            runs = runs if i and encoded.loss[i - 1] else [*runs, []]
            runs[-1].append(token)
    return [chat._backend.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("pad", ["<|pad|>", "<|im_end|>"])
def test_loss_on_assistant_turns_and_their_end_token(base: Path, tmp_path: Path, template: str, pad: str) -> None:
    chat = tokenizer(base, tmp_path / "t", template, pad_token=pad)
    encoded = encode(chat, TWO_TURNS)
    assert learned(chat, encoded) == ["First answer<|im_end|>", "Zweite é🙂<|im_end|>"]
    # The end tokens of the user's turns have the same id and carry none.
    ends = encoded.loss[encoded.ids == chat._backend.token_to_id("<|im_end|>")]
    assert ends.tolist() == [False, True, False, True]


def test_ids_and_generation_masks_are_transformers_own(base: Path, tmp_path: Path) -> None:
    chat = tokenizer(base, tmp_path / "t", MARKED)
    encoded = encode(chat, TWO_TURNS)
    own = chat._tokenizer.apply_chat_template(
        TWO_TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.ids.tolist() == own["input_ids"]
    assert encoded.loss.tolist() == [bool(x) for x in own["assistant_masks"]]
    plain = tokenizer(base, tmp_path / "u", CHATML)
    own = plain._tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=True)
    assert encode(plain, TWO_TURNS).ids.tolist() == own["input_ids"]


@pytest.mark.parametrize("template", [CHATML, MARKED, None])
def test_part_of_the_turns(base: Path, tmp_path: Path, template: str | None) -> None:
    last = tokenizer(base, tmp_path / "last", template, last=True)
    assert learned(last, encode(last, TWO_TURNS)) == ["Zweite é🙂<|im_end|>"]
    every = tokenizer(base, tmp_path / "every", template)
    assert learned(every, encode(every, TWO_TURNS, first_loss=2)) == ["Zweite é🙂<|im_end|>"]
    assert not encode(every, TWO_TURNS, first_loss=4).loss.any()
    assert last.identity != every.identity


def test_a_token_across_the_edge_of_a_turn_carries_loss(base: Path, tmp_path: Path) -> None:
    # Byte-level tokens share a character, and the last character of a turn may be several of them.
    chat = tokenizer(base, tmp_path / "t", MARKED.replace("<|im_end|>{% endgeneration", "{% endgeneration"))
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "漢字"}]
    assert learned(chat, encode(chat, messages)) == ["漢字"]


def test_consecutive_assistant_turns_tools_and_system(base: Path, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a1"},
        {"role": "assistant", "content": "a2"},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": ""},
    ]
    for name, template in {"chatml": CHATML, "marked": MARKED, "built-in": None}.items():
        chat = tokenizer(base, tmp_path / name, template)
        assert learned(chat, encode(chat, messages)) == ["a1<|im_end|>", "a2<|im_end|>", "<|im_end|>"]


def test_no_assistant_turn_no_loss(base: Path, tmp_path: Path) -> None:
    for name, template in {"chatml": CHATML, "marked": MARKED, "built-in": None}.items():
        chat = tokenizer(base, tmp_path / name, template)
        assert not encode(chat, EARLIER[:1]).loss.any()


def test_a_template_whose_prefixes_disagree_is_refused(base: Path, tmp_path: Path) -> None:
    chat = tokenizer(base, tmp_path / "t", FORGETFUL)
    with pytest.raises(ConfigError, match=r"first 2 messages of rows\.jsonl:4 .*\{% generation %\}"):
        encode(chat, TWO_TURNS)
    assert learned(chat, encode(chat, EARLIER)) == ["First answer<|im_end|>"]  # here they agree
    marked = tmp_path / "marked.jinja"
    marked.write_text(MARKED)
    mended = ChatTokenizer(str(tmp_path / "t"), str(marked))
    assert learned(mended, encode(mended, TWO_TURNS)) == ["First answer<|im_end|>", "Zweite é🙂<|im_end|>"]
    assert mended.identity != chat.identity


def test_marks_that_cannot_be_told_apart_are_refused(base: Path, tmp_path: Path) -> None:
    split = MARKED.replace("<|im_end|>{% endgen", "{% endgeneration %}{% generation %}<|im_end|>{% endgen")
    whole = tokenizer(base, tmp_path / "whole", split)
    assert learned(whole, encode(whole, TWO_TURNS)) == ["First answer<|im_end|>", "Zweite é🙂<|im_end|>"]
    with pytest.raises(ConfigError, match="marks 4 generations for the 2 assistant turns"):
        encode(tokenizer(base, tmp_path / "last", split, last=True), TWO_TURNS)


def test_the_templates_own_refusal_is_passed_on(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot render rows\.jsonl:4 \(user first, please\)"):
        encode(tokenizer(base, tmp_path / "t", STRICT), TWO_TURNS[1:])


def test_the_built_in_template(base: Path) -> None:
    chat = ChatTokenizer(str(base))
    assert chat.source == "built-in"
    encoded = encode(chat, [{"role": "system", "content": "s"}, *EARLIER])
    assert encoded.text == "### system\ns\n### user\nOne?\n### assistant\nFirst answer<|endoftext|>\n"
    assert learned(chat, encoded) == ["First answer<|endoftext|>"]
    with pytest.raises(ConfigError, match=r"rows\.jsonl:4'.*role 'critic'.* knows system, user, assistant, tool"):
        encode(chat, [{"role": "critic", "content": "x"}])
    with pytest.raises(ConfigError, match="calls a tool"):
        encode(chat, [{"role": "assistant", "tool_calls": [{}]}])
    with pytest.raises(ConfigError, match="lists tools"):
        encode(chat, EARLIER, tools=[{"name": "f"}])


def test_broken_unicode_is_named(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl:4.*not valid Unicode"):
        encode(ChatTokenizer(str(base)), [{"role": "user", "content": "\ud800"}])


def test_tokenizers_that_cannot_be_used(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        ChatTokenizer(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="finds no tokenizer"):
        ChatTokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match=r"sft\.chat_template=.*cannot be read"):
        ChatTokenizer(str(base), str(tmp_path / "none.jinja"))
    with pytest.raises(ConfigError, match="neither a chat template nor an end token"):
        tokenizer(base, tmp_path / "t", None, eos_token=None)


def test_a_saved_tokenizer_is_known_as_the_same(base: Path, tmp_path: Path) -> None:
    """Prepared data name their tokenizer by this file's hash; transformers would write it anew."""
    folder = tmp_path / "source"
    shutil.copytree(base, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**values, "post_processor": None}, indent=7))
    ChatTokenizer(str(folder)).save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    again = ChatTokenizer(str(tmp_path / "saved"))
    assert again.source == "the tokenizer's own"
    again.save(tmp_path / "saved")  # where it came from
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.skipif("MOBA_TRAIN_SMOLLM2" not in os.environ, reason="MOBA_TRAIN_SMOLLM2 names no folder of SmolLM2")
def test_a_real_models_template(base: Path) -> None:
    chat = ChatTokenizer(os.environ["MOBA_TRAIN_SMOLLM2"])  # its pad token is its end token
    encoded = encode(chat, TWO_TURNS)
    assert learned(chat, encoded) == ["First answer<|im_end|>", "Zweite é🙂<|im_end|>"]
    own = chat._tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=True)["input_ids"]
    assert encoded.ids.tolist() == own
    assert encoded.text.startswith("<|im_start|>system\n")


def test_a_folder_prepared_for_pretraining_serves(base: Path) -> None:
    from moba_train.data.tokenizer import load_tokenizer

    plain: Tokenizer = load_tokenizer(base)
    chat = ChatTokenizer(str(base))
    assert chat.vocab_size == plain.vocab_size
    text = "### user\nOne?\n"
    assert encode(chat, EARLIER[:1]).ids.tolist() == plain.encode(text)
