"""The questions are right, by a second reading of the source; the experiment's reading of its runs."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest

from experiments.sparse_loss_sft import build
from experiments.sparse_loss_sft.page import Arm, has_gap, mean_losses, publish, rank_correlation
from experiments.sparse_loss_sft.run import _doublings, _other_data

SOURCE = '''
LIMIT = 0x10
NAMES = ["a", "b"]
twice = 1
twice = 2

class Base: pass

class Child(Base):
    def size(self, unit="KB", *, exact=False):
        """Docs."""
        return self._size

def pick(a, b=None, c=1.50):
    if a:
        return b
    return c

def nothing(x=(1, 2)):
    def inner():
        return 7
    return

def size_of(x):
    return len(x) + len("a text that is much too long to be an answer")
'''


def test_every_question_has_one_right_answer_in_the_sources_own_words() -> None:
    assert {question.text: question.answer for question in build.questions(SOURCE)} == {
        "What is the value of LIMIT?": "0x10",
        "What is the value of NAMES?": '["a", "b"]',
        "Which class is the base of class Child?": "Base",
        "What is the default of argument unit of function size?": '"KB"',
        "What is the default of argument exact of function size?": "False",
        "What does function size return?": "self._size",
        "What is the default of argument b of function pick?": "None",
        "What is the default of argument c of function pick?": "1.50",
        "What is the default of argument x of function nothing?": "(1, 2)",
        "What does function inner return?": "7",
    }


def test_rows_of_real_sources_are_about_their_document_and_nearly_free_of_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Path(json.__file__).parent.parent
    sources = [str(library / name) for name in ("argparse.py", "calendar.py", "textwrap.py", "heapq.py", "shlex.py")]
    command = ["build.py", "--output", str(tmp_path), "--valid-fraction", "0.3", "--input", *sources]
    monkeypatch.setattr(sys, "argv", command)
    assert build.main() == 0
    files = {split: (tmp_path / f"{split}.jsonl").read_text() for split in ("train", "valid")}
    rows = {split: [json.loads(line) for line in text.splitlines()] for split, text in files.items()}
    assert not {row["document"] for row in rows["train"]} & {row["document"] for row in rows["valid"]}
    texts = [Path(source).read_text() for source in sources]
    characters = answered = 0
    for row in (*rows["train"], *rows["valid"]):
        messages = row["messages"]
        source, _, first = messages[0]["content"].rpartition("\n\n")
        assert any(source in text for text in texts)
        assert 1200 <= len(source) <= 2400
        questions = [first, *(message["content"] for message in messages[2::2])]
        for question, answer in zip(questions, messages[1::2], strict=True):
            assert answer["role"] == "assistant"
            check(source, question, answer["content"])
            answered += len(answer["content"])
        characters += sum(len(message["content"]) for message in messages)
    assert 0.003 < answered / characters < 0.015
    assert build.main() == 0
    assert {split: (tmp_path / f"{split}.jsonl").read_text() for split in files} == files


def check(source: str, question: str, answer: str) -> None:
    """`answer` stands in the source, and evaluates to the same tree as what the question asks for."""
    assert answer in source
    assert "\n" not in answer
    ast.parse(answer, mode="eval")
    if match := re.match(r"What is the default of argument (\w+) of function (\w+)\?", question):
        assert re.search(rf"def {match[2]}\b", source)
        assert re.search(rf"\b{match[1]}\b.*=\s*{re.escape(answer)}", source)
    elif match := re.match(r"What does function (\w+) return\?", question):
        assert re.search(rf"def {match[1]}\b", source)
        assert f"return {answer}" in source or f"return ({answer}" in source
    elif match := re.match(r"Which class is the base of class (\w+)\?", question):
        assert f"class {match[1]}({answer})" in source
    else:
        (name,) = re.match(r"What is the value of (\w+)\?", question).groups()
        assert re.search(rf"^{name} *= *\(?{re.escape(answer)}", source, re.MULTILINE)


def test_lines_are_those_of_the_parser() -> None:
    source = '"""é"""; x = 1\r\n\n\x0cNAME = "ü"; OTHER = "é"\nSMALL = 3\n'
    assert {question.answer for question in build.questions(source)} == {"1", '"ü"', '"é"', "3"}
    assert next(build.pieces(source, 80)).endswith("SMALL = 3")


def test_sources_without_questions_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty.py").write_text("x\n")
    monkeypatch.setattr(sys, "argv", ["build.py", "--output", str(tmp_path / "o"), "--input", str(tmp_path)])
    assert build.main() == 2
    assert "no train row" in capsys.readouterr().err


def arms(*losses: float, seed: int = 0) -> list[Arm]:
    """With 0, 1, 2 and 4 full layers of 4."""
    return [
        Arm(n, seed, loss, [3.0, loss], direct=[0.1 * n + 0.1] * 4, through=[0.5] * 4, loss_share=0.01)
        for n, loss in zip([0, 1, 2, 4], losses, strict=True)
    ]


@pytest.mark.parametrize(
    "losses, met, correlation",
    [((2.0, 1.9, 1.05, 1.0), 3, "-1.00"), ((2.0, 2.1, 1.5, 1.0), 0, "-0.80"), ((1.0, 1.0, 1.0, 1.0), 0, "+nan")],
)
def test_the_page_says_what_was_found(tmp_path: Path, losses: tuple[float, ...], met: int, correlation: str) -> None:
    told = {"command": "how", "device": "where", "versions": {}, "packages": [], "date": "when", "setting": ["a.key=7"]}
    results = {"depth": 4, "characters": 2000, "pretrain_steps": 9, "environment": told | {"quick": False}}
    for name in ("own", "other"):
        found = [dataclasses.asdict(arm) for arm in arms(*losses)]
        (tmp_path / f"results_{name}.json").write_text(json.dumps(results | {"name": name, "arms": found}))
    publish(tmp_path)
    page = (tmp_path / "README.md").read_text()
    gap = losses[0] > losses[-1]
    assert page.count("| met |") == 2 * met
    assert page.count("| **not met** |") == 2 * (3 - met) * gap
    assert page.count("| **cannot be told** |") == 2 * 3 * (not gap)
    assert page.count("One seed: how much chance") == 2 * gap
    assert page.count("has yet to get used to MoBA") == gap
    assert page.count("there is no gap that could") == 2 * (not gap)
    assert page.count(f"rank correlation {correlation} ") == 2
    assert page.index("pretrained here for 9 steps") < page.index("## From other")
    if met == 3:
        assert "| 2 | 3.0000 | 1.0500 | 0.95 | 30.0% | 50.0% |" in page
    for name in ("own", "other"):
        assert f"(results_{name}.png)" in page
        assert (tmp_path / f"results_{name}.png").stat().st_size > 1000


def test_a_gap_within_chance_is_none() -> None:
    def pair(difference: float) -> list[Arm]:
        return [*arms(2.0, 1.9, 1.1, 2.0 - difference), *arms(2.2, 1.9, 1.1, 2.2 - difference, seed=1)]

    error = 0.1 * math.sqrt(2)  # of the difference: 0.1 at both ends
    assert [has_gap(mean_losses(pair(difference))) for difference in (1.9 * error, 2.1 * error)] == [False, True]


def test_full_layers_that_are_tried() -> None:
    assert _doublings(4) == [0, 1, 2, 4]
    assert _doublings(30) == [0, 1, 2, 4, 8, 15, 30]


@pytest.mark.parametrize(
    "hf, data, packages, said",
    [
        (None, None, ["numpy"], None),
        ("SmolLM2", "/home/a/books", ["numpy"], None),  # nothing is pretrained
        (None, "/home/a/books", ["torch", "numpy"], "of torch, numpy, pretraining on the folder books"),
        (None, "/home/a/books", [], "of the standard library, pretraining on the folder books"),
    ],
)
def test_the_page_names_another_folder(hf: str | None, data: str | None, packages: list[str], said: str | None) -> None:
    words = _other_data(argparse.Namespace(hf=hf, data=data), packages)
    assert words is None if said is None else words.endswith(said)


def test_ranks_are_correlated() -> None:
    assert rank_correlation([1.0, 5.0, 9.0], [0.3, 0.2, -4.0]) == pytest.approx(-1)
    assert math.isnan(rank_correlation([1.0], [2.0]))


def test_seeds_are_averaged() -> None:
    pair = [*arms(2.0, 1.9, 1.1, 1.0), *arms(2.2, 1.9, 1.1, 1.0, seed=1)]
    mean, error = mean_losses(pair)[0]
    assert mean == pytest.approx(2.1)
    assert error == pytest.approx(0.1)
    assert math.isnan(mean_losses(arms(2.0, 1.9, 1.1, 1.0))[0][1])
