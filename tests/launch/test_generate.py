"""launch/generate.py as a person uses it, on a folder that transformers wrote; launch/evaluate.py's refusals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moba_train.config.schema import ConfigError
from moba_train.data.tokenizer import load_tokenizer
from moba_train.eval.text import GenerateArguments, generate_text, prompt_ids, write_stream
from tests.helpers.training import corpus

ROOT = Path(__file__).resolve().parents[2]
GATE = {"force_previous_block": True, "share_picks_in_group": True}
LAYERS = [
    {"kind": "moba", "block_size": 16, "top_k": 2, **GATE},
    {"kind": "full"},
    {"kind": "moba", "block_size": 8, "top_k": 3, **GATE},
]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)
PROMPT = "def grüße(名):\n    '''🦉 " + "return (left + right) // 2, " * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model: Hugging Face folder with a plan whose layers differ, tokenizer and generation settings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("generate")
    tokenizer = load_tokenizer(corpus(root / "data") / "tokenizer")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        moba={"layers": LAYERS},
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save(root / "model")
    return root / "model"


def run(*command, text=""):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, input=text.encode(), capture_output=True, timeout=150
    )


def test_it_writes_what_transformers_writes(folder):
    from transformers import AutoModelForCausalLM

    from moba_train import hf

    hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="moba").eval()
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    expected = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    result = run("launch/generate.py", str(folder), "--max-tokens", "40", "--prefill-chunk", "50", text=PROMPT)
    said = result.stderr.decode()
    assert result.returncode == 0, said
    assert result.stdout.decode() == tokenizer.decode(expected.tolist()) + "\n"
    assert f"{ids.shape[1]} prompt tokens" in said
    assert "made for 128" in said
    assert "Traceback" not in said


def test_a_core_checkpoint_writes_what_its_folder_writes(folder, tmp_path):
    converted = run("launch/convert.py", "hf-to-core", str(folder), str(tmp_path / "core"))
    assert converted.returncode == 0, converted.stderr.decode()
    written = [
        run("launch/generate.py", str(x), "--max-tokens", "20", text=PROMPT) for x in (folder, tmp_path / "core")
    ]
    assert [result.returncode for result in written] == [0, 0], written[1].stderr.decode()
    assert written[0].stdout == written[1].stdout != b""


def test_a_character_is_written_whole_or_at_the_end(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(PROMPT + "🦉")
    pieces = []
    count, _ = write_stream(iter(ids), tokenizer, pieces.append)
    assert count == len(ids)
    assert "".join(pieces) == PROMPT + "🦉"
    assert all("\ufffd" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 50  # as they come, not at the end
    pieces.clear()
    write_stream(iter(ids[:-1]), tokenizer, pieces.append)  # the owl's last byte is missing
    assert "".join(pieces) == tokenizer.decode(ids[:-1])


def test_a_prompt_under_a_chat_template_or_as_text(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    plain = prompt_ids(folder, tokenizer, "Hi", chat=False, special_tokens=False)
    assert plain == tokenizer.encode("Hi")
    with pytest.raises(ConfigError, match="no chat template"):
        prompt_ids(folder, tokenizer, "Hi", chat=True, special_tokens=False)
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    chat = prompt_ids(tmp_path, tokenizer, "Hi", chat=True, special_tokens=False)
    assert tokenizer.decode(chat) == "[user]Hi[me]"
    with pytest.raises(ConfigError, match="drop one of the two"):
        prompt_ids(tmp_path, tokenizer, "Hi", chat=True, special_tokens=True)
    with pytest.raises(ConfigError, match="is empty"):
        prompt_ids(folder, tokenizer, "", chat=False, special_tokens=False)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"checkpoint": "nowhere"}, "no such folder"),
        ({"overrides": ("model.num_layers=5",)}, "model.num_layers=5"),
        ({"overrides": ("attention.pattern=dense",)}, "attention.pattern='dense'"),
        ({"temperature": -1.0}, "--temperature"),
        ({"decode": "sparse"}, "--decode"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"tokenizer": "nowhere"}, "no such file"),
        ({"temperature": 1.0, "seed": 2**64}, "--seed"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_built(folder, options, said, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=said):
        generate_text(GenerateArguments(**{"checkpoint": str(folder), "prompt": "Hi", **options}))


@pytest.mark.parametrize("given", ["--prompt", "standard input"])
def test_a_prompt_that_is_not_utf8_is_refused(given, capsys, monkeypatch):
    from launch import generate

    monkeypatch.setattr(sys, "argv", ["generate.py", "nowhere", *(["--prompt", "caf\udce9"] * (given == "--prompt"))])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="latin-1"))
    assert generate.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--prompt" in line
    assert "is not UTF-8" in line


def test_fp8_is_refused(folder, monkeypatch, as_if_transformer_engine):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    overrides = ("model.transformer_impl=transformer_engine", "precision=fp8")
    with pytest.raises(ConfigError, match="precision=bf16"):
        generate_text(GenerateArguments(str(folder), "Hi", overrides))


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        generate_text(GenerateArguments(str(folder), "Hi"))


def test_evaluate_says_in_one_line_what_is_wrong(folder, capsys, monkeypatch):
    from launch import evaluate

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    command = ["evaluate.py", str(folder), "--lengths", "64,128", "parallel.context=2", "--output", str(folder / "no")]
    monkeypatch.setattr(sys, "argv", command)
    assert evaluate.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "world_size=1" in line
    assert not (folder / "no").exists()
