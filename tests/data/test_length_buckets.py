"""Long documents more often: how often each comes in a pass, in which order, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moba_train.config.schema import ConfigError, DataConfig
from moba_train.data.info import DatasetInfo
from moba_train.data.length_buckets import describe_buckets, times_of_documents
from moba_train.data.loader import Loader
from moba_train.data.pretrain import TrainRows, build_datasets
from moba_train.data.validate import check_data
from tests.data.conftest import Prepared
from tests.data.test_pretrain import S, documents, text_of

LONG = 34  # tokens: some of the corpus's documents are longer, most are not


def test_a_document_is_in_the_bucket_that_begins_at_or_below_its_length() -> None:
    lengths = np.array([1, 9, 10, 11, 99, 100, 5000])
    assert times_of_documents(lengths, {"100": 0, "10": 3}).tolist() == [1, 1, 3, 3, 3, 0, 0]
    assert times_of_documents(lengths, {"0": 0, "10": 1}).tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert times_of_documents(lengths, None).tolist() == [1] * 7


def test_the_log_line_counts_documents_and_shares() -> None:
    line = describe_buckets(np.array([10, 10, 80]), {"50": 4})
    assert line.split("; ") == [
        "0 to 49: 2 documents x 1, 20.0% -> 5.9% of the tokens",
        "50 and more: 1 documents x 4, 80.0% -> 94.1% of the tokens",
    ]


def train_rows(folder: Path, count: int, buckets: dict[str, int] | None, cache: Path | None = None) -> TrainRows:
    data = DataConfig(path=str(folder), length_buckets=buckets, cache_dir=str(cache) if cache else None)
    return build_datasets(data, sequence_length=S, train_samples=count, valid_samples=1).train


def tokens_of_a_pass(folder: Path, info: DatasetInfo, buckets: dict[str, int]) -> tuple[int, int]:
    """Rows of a pass, and its tokens."""
    lengths = np.array([len(document) for document in documents(folder, "train")])
    total = int((lengths * times_of_documents(lengths, buckets)).sum())
    return (total - 1) // S, total


@pytest.mark.parametrize("buckets", [{str(LONG): 3}, {"0": 0, str(LONG): 1}, {"0": 2, str(LONG): 1}])
def test_a_pass_holds_every_document_as_often_as_asked(corpus: Prepared, buckets: dict[str, int]) -> None:
    folder, info = corpus
    known = documents(folder, "train")
    assert 5 < sum(len(document) >= LONG for document in known) < len(known) - 5
    rows, total = tokens_of_a_pass(folder, info, buckets)
    data = train_rows(folder, rows, buckets)
    seen = Counter(token for i in range(rows) for token in text_of(data[i])[:S])
    wanted: Counter[int] = Counter()
    for document, times in zip(known, times_of_documents(np.array([len(d) for d in known]), buckets), strict=True):
        wanted.update({token: count * int(times) for token, count in Counter(document).items()})
    missing = wanted - seen
    assert not seen - wanted
    assert missing.total() == total - rows * S  # what fills no row


def test_buckets_have_indices_of_their_own(corpus: Prepared, tmp_path: Path) -> None:
    plain = [text_of(row) for row in map(train_rows(corpus[0], 6, None, tmp_path).__getitem__, range(6))]
    for buckets in ({str(LONG): 3}, {str(LONG): 4}):
        found = train_rows(corpus[0], 6, buckets, tmp_path)
        assert [text_of(found[i]) for i in range(6)] != plain
        again = train_rows(corpus[0], 6, buckets, tmp_path)
        assert [text_of(found[i]) for i in range(6)] == [text_of(again[i]) for i in range(6)]
    assert [text_of(row) for row in map(train_rows(corpus[0], 6, None, tmp_path).__getitem__, range(6))] == plain


def test_a_loader_goes_on_exactly_also_into_later_passes(corpus: Prepared) -> None:
    folder, info = corpus
    buckets = {"0": 0, str(LONG): 1}
    count = 2 * tokens_of_a_pass(folder, info, buckets)[0] + 4
    data = train_rows(folder, count, buckets)
    loader = Loader(data, global_batch_size=2, dp_rank=0, dp_size=1)
    straight = [text_of(next(loader)) for _ in range(count // 2 * 2)]
    stopped = Loader(data, global_batch_size=2, dp_rank=0, dp_size=1)
    for _ in range(6):
        next(stopped)
    resumed = Loader(train_rows(folder, count, buckets), global_batch_size=2, dp_rank=0, dp_size=1)
    resumed.load_state_dict(stopped.state_dict())
    assert [text_of(next(resumed)) for _ in range(len(straight) - 6)] == straight[6:]


@pytest.mark.parametrize(
    "buckets, said",
    [
        ({"long": 2}, r"data\.length_buckets\.long=2: the key is the least number"),
        ({"-5": 2}, r"data\.length_buckets\.-5"),
        ({"10": -1}, r"data\.length_buckets\.10=-1: .* 0 or more"),
        ({"10": 10**9}, r"data\.length_buckets\.10=1000000000: .* at most 1000 times"),
        ({"0": 0}, r"data\.length_buckets=.*has only 0 tokens, less than a row of 32"),
        ({"0": 0, "1000000": 5}, r"has only 0 tokens"),
    ],
)
def test_what_makes_no_pass_is_refused(corpus: Prepared, buckets: dict[str, int], said: str) -> None:
    folder, info = corpus
    with pytest.raises(ConfigError, match=said):
        check_data(DataConfig(path=str(folder), length_buckets=buckets), info.vocab_size, S)
