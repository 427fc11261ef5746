"""Passkey retrieval (needle in a haystack; arXiv 2305.16300): a number hidden in real text, asked for at its end.

A case is a row of exactly `length` tokens: filler, with the needle at `depth` of it, then the question and the answer.
  - exact: whether greedy decoding would give the key. It would exactly when every token of the key is the likeliest
    after those before it, so a forward pass over the row with the key in place says so, on any number of ranks.
  - margin: log-likelihood of the key less that of the best distractor (other numbers of as many tokens), nats. Above 0
    the model prefers the key: a finer measure for models too small to answer.
Filler, key and distractors depend on seed, length and sample alone, so that depths and models see the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moba_train.config.schema import ConfigError
from moba_train.data.tokenizer import Tokenizer
from moba_train.eval.documents import Documents
from moba_train.eval.model import Model
from moba_train.eval.scoring import document_row, score

__all__ = ["Case", "Cell", "build_case", "passkey_grid"]

_NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"
_ANSWER = " {key}"
_DIGITS = 5
_TRIES = 10000  # draws of numbers until enough have the key's count of tokens


@dataclass(frozen=True)
class Case:
    """rows: int64 [length + 1] each, the last token unread; the key's row first, then one per distractor."""

    key: str
    rows: list[torch.Tensor]
    needle: slice  # its tokens
    answer: slice


@dataclass(frozen=True)
class Cell:
    """Means over the samples of one length and depth; margin and preferred are None without distractors."""

    length: int
    depth: float
    samples: int
    exact: float
    preferred: float | None
    margin: float | None


def build_case(documents: Documents, length: int, depth: float, sample: int, *, distractors: int, seed: int) -> Case:
    """ConfigError where `length` tokens do not hold needle, question and answer."""
    tokenizer = documents.tokenizer
    draw = random.Random(f"{seed}/{length}/{sample}")
    key, others = _numbers(tokenizer, draw, distractors)
    needle, question, answer = (tokenizer.encode(text.format(key=key)) for text in (_NEEDLE, _QUESTION, _ANSWER))
    fixed = len(needle) + len(question) + len(answer)
    if length < fixed:
        raise ConfigError("--lengths", length, f"needle, question and answer alone take {fixed} tokens; ask for more")
    filler = _filler(documents.text, length - fixed, draw)
    at = round(depth * len(filler))
    prompt = [*filler[:at], *needle, *filler[at:], *question]
    answers = [answer, *(tokenizer.encode(_ANSWER.format(key=other)) for other in others)]
    return Case(
        key=key,
        rows=[torch.tensor([*prompt, *ids, tokenizer.eod]) for ids in answers],
        needle=slice(at, at + len(needle)),
        answer=slice(len(prompt), length),
    )


def passkey_grid(
    model: Model,
    documents: Documents,
    lengths: list[int],
    depths: list[float],
    *,
    samples: int,
    distractors: int,
    seed: int,
    progress: Callable[[list[tuple[int, float, int]]], Iterable[tuple[int, float, int]]] = iter,
) -> list[Cell]:
    """Every length at every depth, the same on all ranks: data-parallel ranks share cases, context ranks each row."""
    places = [(length, depth, sample) for length in lengths for depth in depths for sample in range(samples)]
    data = model.groups.data
    mine = {}
    for place in progress(places[data.rank :: data.size]):
        mine[place] = _judge(model, build_case(documents, *place, distractors=distractors, seed=seed))
    parts: list[dict[tuple[int, float, int], tuple[bool, float | None]]] = [{} for _ in range(model.groups.world_size)]
    dist.all_gather_object(parts, mine)
    results = {place: result for part in parts for place, result in part.items()}
    cells = []
    for length in lengths:
        for depth in depths:
            found = [results[length, depth, sample] for sample in range(samples)]
            margins = [margin for _, margin in found if margin is not None]
            cells.append(
                Cell(
                    length=length,
                    depth=depth,
                    samples=samples,
                    exact=sum(exact for exact, _ in found) / samples,
                    preferred=sum(margin > 0 for margin in margins) / samples if margins else None,
                    margin=sum(margins) / samples if margins else None,
                )
            )
    return cells


def _judge(model: Model, case: Case) -> tuple[bool, float | None]:
    """(exact, margin) of one case."""
    sums = torch.zeros(len(case.rows), 2, dtype=torch.float64, device=model.device)
    for i, row in enumerate(case.rows):
        scores = score(model, document_row(row, first_loss=case.answer.start - 1, end_loss=case.answer.stop - 1))
        sums[i] = torch.stack([-scores.losses_R.double().sum(), scores.hits_R.double().sum()])
    dist.all_reduce(sums, group=model.groups.context.group)
    likelihoods, hits = sums.T.tolist()
    exact = hits[0] == case.answer.stop - case.answer.start
    return exact, likelihoods[0] - max(likelihoods[1:]) if len(likelihoods) > 1 else None


def _numbers(tokenizer: Tokenizer, draw: random.Random, distractors: int) -> tuple[str, list[str]]:
    """A key and other numbers whose answers have as many tokens."""

    def number() -> str:
        return str(draw.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))

    key, others = number(), list[str]()
    size = len(tokenizer.encode(_ANSWER.format(key=key)))
    for _ in range(_TRIES):
        if len(others) == distractors:
            return key, others
        other = number()
        if other != key and other not in others and len(tokenizer.encode(_ANSWER.format(key=other))) == size:
            others.append(other)
    raise ConfigError("--distractors", distractors, f"only {len(others)} numbers have as many tokens as the key")


def _filler(text: torch.Tensor, count: int, draw: random.Random) -> list[int]:
    """`count` tokens of text from a drawn place on, from its beginning again where it ends."""
    start = draw.randrange(len(text))
    return text[(start + torch.arange(count)) % len(text)].tolist()
