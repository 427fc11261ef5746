#!/usr/bin/env python3
"""Chat rows with few loss tokens: a long piece of real source code, then questions whose short answers stand in it.

python experiments/sparse_loss_sft/build.py --output data/code_questions
python experiments/sparse_loss_sft/build.py --output data/code_long --characters 24000 --input src/ --rows 4000

A piece is consecutive top-level statements of one file, up to --characters. Questions are made from its syntax tree:
the default of an argument, what a function returns, the value of a constant, the base of a class. They are asked only
where one answer is right, and answered by the source's own characters; as many as bring the answers to --loss-share of
all characters. Which files are for validation is decided by a hash of their text, the rest by --seed.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import json
import multiprocessing
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moba_train.config.arguments import argument_parser
from moba_train.config.schema import ConfigError
from moba_train.data.sources import Corpus, find_files, standard_library_files
from moba_train.data.split import text_hash, valid_threshold

MAX_ANSWER = 40  # characters
_PARALLEL = 100  # texts from which on all cores are used
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Question:
    """A question about a piece of source code, and the answer as the source spells it."""

    text: str
    answer: str


def main() -> int:
    arguments = parse_arguments()
    try:
        files = find_files(arguments.input, [".py"]) if arguments.input else standard_library_files()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    texts = [text for text in Corpus(files) if text.strip()]
    threshold = valid_threshold(arguments.valid_fraction, min(map(text_hash, texts), default=0))
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    for split, limit in (("train", arguments.rows), ("valid", arguments.valid_rows)):
        chosen = [text for text in texts if (text_hash(text) < threshold) == (split == "valid")]
        rows = make_rows(chosen, arguments.characters, arguments.loss_share, arguments.seed)[:limit]
        if not rows:
            print(f"error: no {split} row: give more or longer sources, or a smaller --characters", file=sys.stderr)
            return 2
        path = output / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        answers = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
        everything = sum(len(message["content"]) for row in rows for message in row["messages"])
        common = Counter(answers).most_common(1)[0][1] / len(answers)
        share = sum(map(len, answers)) / everything
        print(
            f"{path}: {len(rows):,} rows, {len(answers):,} questions, answers are {share:.2%} of {everything:,} "
            f"characters; the commonest answer is right for {common:.1%}"
        )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="where train.jsonl and valid.jsonl go")
    add("--input", nargs="+", default=[], metavar="PATH", help="Python sources; none: the standard library's")
    add("--characters", type=int, default=2400, metavar="N", help="at most, of a piece of source (default: 2400)")
    add("--loss-share", type=float, default=0.01, metavar="F", help="of all characters, in answers (default: 0.01)")
    add("--rows", type=int, default=4000, metavar="N", help="at most, for training (default: 4000)")
    add("--valid-rows", type=int, default=200, metavar="N", help="at most, for validation (default: 200)")
    add("--valid-fraction", type=float, default=0.1, metavar="F", help="of the files (default: 0.1)")
    add("--seed", type=int, default=1234, help="of the choice of questions and the order of rows (default: 1234)")
    return parser.parse_args()


def make_rows(texts: list[str], characters: int, loss_share: float, seed: int) -> list[dict]:
    """A chat row for each piece of each text that can be asked about, in an order of its own."""
    make = functools.partial(_rows_of, characters=characters, loss_share=loss_share, seed=seed)
    if len(texts) < _PARALLEL:
        rows = list(itertools.chain.from_iterable(map(make, texts)))
    else:
        # spawn: a fork would take along whatever threads its parent has
        with multiprocessing.get_context("spawn").Pool() as pool:
            rows = list(itertools.chain.from_iterable(pool.imap(make, texts, chunksize=16)))
    random.Random(seed).shuffle(rows)
    return rows


def _rows_of(text: str, characters: int, loss_share: float, seed: int) -> list[dict]:
    """The rows of one text. What is asked depends on the text and the seed alone."""
    document = f"{text_hash(text):016x}"
    choice = random.Random(f"{seed} {document}")
    rows = []
    for piece in pieces(text, characters):
        found = questions(piece)
        choice.shuffle(found)
        budget = loss_share * len(piece)
        chosen: list[Question] = []
        for question in found:
            if chosen and budget < len(question.answer):
                break
            chosen.append(question)
            budget -= len(question.answer)
        if chosen:
            rows.append({"messages": conversation(piece, chosen), "document": document})
    return rows


def conversation(piece: str, asked: list[Question]) -> list[dict[str, str]]:
    """The piece and the first question in one turn, an answer, and so on."""
    messages = []
    for number, question in enumerate(asked):
        content = question.text if number else f"{piece}\n\n{question.text}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
    return messages


def pieces(text: str, characters: int) -> Iterator[str]:
    """Runs of consecutive top-level statements, none longer than `characters` and at least half as long."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = _lines(text)
    # A statement begins after the one before it ends, so that its comments and decorators come with it.
    ends = [node.end_lineno or 0 for node in tree.body]
    start = size = 0
    for begin, end in zip([0, *ends], ends, strict=False):
        length = sum(map(len, lines[begin:end]))
        if size and size + length > characters:
            yield from _piece(lines[start:begin], characters)
            start, size = begin, 0
        size += length
    yield from _piece(lines[start:], characters)


def _piece(lines: list[str], characters: int) -> Iterator[str]:
    piece = "".join(lines).strip("\n")
    if characters // 2 <= len(piece) <= characters:
        yield piece


def questions(source: str) -> list[Question]:
    """Every question about `source` that has one short answer, in the order of the source."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # such as a piece that begins inside a statement line with semicolons
        return []
    # A name that is defined twice, or bound elsewhere too, has no single answer.
    names = Counter(node.name for node in ast.walk(tree) if isinstance(node, _DEFINITIONS))
    names.update(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    lines = _lines(source)
    return [
        Question(text, answer)
        for name, text, node in _asked(tree)
        if names[name] == 1 and (answer := _spelling(lines, node)) is not None
    ]


def _asked(tree: ast.Module) -> Iterator[tuple[str, str, ast.expr]]:
    """(name that is asked about, question, the expression that answers it)"""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            positional = [*node.args.posonlyargs, *node.args.args]
            defaults = node.args.defaults
            pairs = list(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
            pairs += [(a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None]
            for argument, default in pairs:
                yield node.name, f"What is the default of argument {argument.arg} of function {node.name}?", default
            returned = list(_returns(node))
            if len(returned) == 1 and returned[0] is not None:
                yield node.name, f"What does function {node.name} return?", returned[0]
        elif isinstance(node, ast.ClassDef) and len(node.bases) == 1 and not node.keywords:
            yield node.name, f"Which class is the base of class {node.name}?", node.bases[0]
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, f"What is the value of {node.targets[0].id}?", node.value


def _returns(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.expr | None]:
    """What the function's own return statements give; those of functions inside it are not its own."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Return):
            yield node.value
        elif not isinstance(node, (*_DEFINITIONS, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def _spelling(lines: list[str], node: ast.expr) -> str | None:
    """The expression as the source spells it, if that is short and on one line. Columns of a tree count UTF-8 bytes."""
    if node.end_lineno != node.lineno:
        return None
    segment = lines[node.lineno - 1].encode()[node.col_offset : node.end_col_offset].decode()
    return segment if len(segment) <= MAX_ANSWER else None


def _lines(text: str) -> list[str]:
    """Lines as the parser counts them, ends kept: str.splitlines also breaks at form feeds and the like."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", text)


if __name__ == "__main__":
    sys.exit(main())
