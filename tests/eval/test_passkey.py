"""Passkey cases hold what they say where they say; documents are read whole; what cannot be asked is refused."""

from __future__ import annotations

import pytest
import torch

from moba_train.config.schema import ConfigError
from moba_train.eval.documents import Documents
from moba_train.eval.passkey import build_case
from moba_train.eval.position_loss import documents_of_length
from tests.helpers.training import corpus


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return Documents(str(corpus(tmp_path_factory.mktemp("passkey") / "data")))


def case(documents, length=400, depth=0.5, sample=0, distractors=3, seed=7):
    return build_case(documents, length, depth, sample, distractors=distractors, seed=seed)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [161, 400])
def test_the_key_lies_where_it_should(documents, depth, length):
    found, tokenizer = case(documents, length, depth), documents.tokenizer
    row = found.rows[0].tolist()
    assert len(row) == length + 1
    needle = tokenizer.decode(row[found.needle])
    assert needle == f"\nThe pass key is {found.key}. Remember it. {found.key} is the pass key.\n"
    assert tokenizer.decode(row[found.answer]) == f" {found.key}"
    assert found.answer.stop == length
    question = tokenizer.encode("\nWhat is the pass key? The pass key is")
    assert row[found.answer.start - len(question) : found.answer.start] == question
    filler = row[: found.needle.start] + row[found.needle.stop : found.answer.start - len(question)]
    assert found.needle.start == round(depth * len(filler))
    # Real text, unbroken but for the wrap at its end, and no end of a document in it.
    text = torch.cat([documents.text, documents.text]).tolist()
    assert documents.info.eod_id not in filler
    assert any(text[i : i + len(filler)] == filler for i in range(len(text) // 2) if text[i] == filler[0])
    assert found.key not in tokenizer.decode(filler)


def test_distractors_differ_from_the_key_in_nothing_but_the_answer(documents):
    found = case(documents)
    rows = torch.stack(found.rows)
    assert len(rows) == 4
    assert len({tuple(row) for row in rows.tolist()}) == 4
    assert torch.equal(rows[:, : found.answer.start], rows[:1, : found.answer.start].expand(4, -1))
    answers = [documents.tokenizer.decode(row[found.answer].tolist()) for row in rows]
    assert all(answer.strip().isdigit() and len(answer) == 6 for answer in answers)


def test_depth_changes_the_place_alone_and_a_seed_fixes_the_rest(documents):
    low, high, again, other = case(documents, depth=0.1), case(documents, depth=0.9), case(documents), None
    assert low.key == high.key == again.key
    assert sorted(low.rows[0].tolist()) == sorted(high.rows[0].tolist())
    assert all(torch.equal(a, b) for a, b in zip(again.rows, case(documents).rows, strict=True))
    for other in (case(documents, seed=8), case(documents, sample=1)):
        assert not torch.equal(other.rows[0], again.rows[0])


def test_what_cannot_be_asked_is_refused(documents):
    with pytest.raises(ConfigError, match="needle, question and answer alone take"):
        case(documents, length=30)
    with pytest.raises(ConfigError, match="the longest has"):
        documents_of_length(documents, 10**6, most=5)
    with pytest.raises(ConfigError, match="in its vocabulary, the model 100"):
        documents.check_model(100, None)
    with pytest.raises(ConfigError, match="no such folder"):
        Documents("nowhere")


def test_documents_are_whole_and_chosen_by_their_length(documents):
    longest = int(documents.lengths.max())
    index = documents_of_length(documents, longest - 1, most=9)
    assert index == [int(documents.lengths.argmax())]
    tokens = documents.read(index[0], longest)
    assert int(tokens[-1]) == documents.info.eod_id
    assert documents.info.eod_id not in tokens[:-1]
    assert len(documents.text) == documents.info.valid.tokens - documents.info.valid.documents
    everything = documents_of_length(documents, 1, most=10**6)
    assert everything == list(range(documents.info.valid.documents))
    assert documents_of_length(documents, 1, most=1) == [0]
