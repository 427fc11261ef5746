"""launch/sft.py as a person uses it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moba_train.config.compose import run_command_line
from moba_train.data.chat_template import ChatTokenizer
from moba_train.train.convert import core_to_hf
from moba_train.train.loop import finetune, pretrain
from moba_train.train.metrics import read_metrics
from tests.helpers.training import SMALL, corpus
from tests.launch.test_pretrain import finish, start


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sft")
    corpus(root / "data")
    rows = [{"prompt": f"{i} and {i}? " * (1 + i % 5), "completion": f"{2 * i}"} for i in range(60)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": []}]))
    (root / "broken.jsonl").write_text('{"messages": []}\n{"oops": 1}\n')
    return root


def overrides(place: Path, run: Path) -> list[str]:
    rows = [f"sft.path={place / 'rows.jsonl'}", f"sft.tokenizer={place / 'data' / 'tokenizer'}"]
    return [*SMALL, "recipe=sft_tiny", "sft.valid_path=null", *rows, f"run.dir={run}"]


def test_it_fine_tunes_on_rows_that_it_tokenises(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, text = finish(
        start(sys.executable, "launch/sft.py", *overrides(place, run), "train.steps=3", "metrics.gate_every=2")
    )
    assert code == 0, text
    for line in (
        "chat template: built-in",
        "train: 5",
        "left out: 1 without assistant tokens, 0 too long",
        "packing first_fit_decreasing makes",
        "% of them text",
        "sft_tiny finished",
        "validation loss, nats per token",
        "gate metrics every 2 steps, share of",
    ):
        assert line in text
    assert "nats per byte" not in text
    assert "Traceback" not in text
    assert "Warning" not in text
    assert [record["step"] for record in read_metrics(run) if "loss" in record] == [1, 2, 3]
    core_to_hf(str(run), str(tmp_path / "exported"))
    for folder in (run / "tokenizer", tmp_path / "exported"):  # what talks to the model finds the template it learnt
        assert ChatTokenizer(str(folder)).source == "the tokenizer's own"
        assert "### assistant" in (folder / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    "change, said",
    [
        ("sft.path=broken.jsonl", "broken.jsonl:2"),
        ("sft.path=nowhere", "by: make sft"),
        ("sft.path=null", "sft.path=None: name chat rows"),
        ("sft.tokenizer=nowhere", "by: make sft"),
        ("sft.tokenizer=null", "tokenizer/ of a prepared one"),
        ("checkpoint.load=nowhere", "no checkpoint there"),
        ("data.path=data", "drop one of the two"),
        ("train.freeze=embedding", "expects a list"),
        ("train.sequence_length=8", "sft.overlong='refuse'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    place: Path,
    tmp_path: Path,
    change: str,
    said: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(place)
    run = tmp_path / "run"
    assert run_command_line(finetune, "", [*overrides(place, run), "sft.overlong=refuse", change]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not run.exists()


def test_pretraining_does_not_take_chat_rows(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_command_line(pretrain, "", overrides(place, tmp_path / "run")) == 2
    assert "start launch/sft.py" in capsys.readouterr().err
