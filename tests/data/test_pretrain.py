"""Rows of real prepared folders: what is in them, in which order, and that the order is the same in every setting."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moba_train.config.schema import ConfigError, DataConfig
from moba_train.data.batch import Batch
from moba_train.data.loader import Loader
from moba_train.data.pretrain import PretrainData, build_datasets
from tests.data.conftest import Prepared, sentences
from tests.helpers.spawn import run_distributed

S = 32


def build(folder: Path | None = None, *, train: int = 20, valid: int = 8, **options) -> PretrainData:
    data = DataConfig(path=str(folder) if folder else None, **options)
    return build_datasets(data, sequence_length=S, train_samples=train, valid_samples=valid)


def rows(dataset, count: int | None = None) -> list[list[int]]:
    return [text_of(dataset[i]) for i in range(count or len(dataset))]


def text_of(batch: Batch) -> list[int]:
    return [*batch.tokens.tolist(), int(batch.labels[-1])]


def documents(folder: Path, split: str) -> list[list[int]]:
    data = IndexedDataset(str(folder / split))
    return [data[i].tolist() for i in range(len(data))]


def contains(whole: list[int], part: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def test_between_bounds_lies_a_piece_of_one_document(corpus: Prepared) -> None:
    folder, info = corpus
    known = documents(folder, "train")
    epoch = (info.train.tokens - 1) // S
    data = build(folder, train=epoch).train
    for i in range(0, epoch, 7):
        batch = data[i]
        bounds = batch.cu_seqlens.tolist()
        for start, stop in pairwise(bounds):
            piece = batch.tokens[start:stop].tolist()
            assert any(contains(document, piece) for document in known)
            assert batch.positions[start:stop].tolist() == list(range(stop - start))
        masked = (batch.loss_mask == 0).nonzero().flatten().tolist()
        assert masked == (batch.tokens == info.eod_id).nonzero().flatten().tolist()


def test_an_epoch_has_every_token_once(corpus: Prepared) -> None:
    folder, info = corpus
    epoch = (info.train.tokens - 1) // S
    data = build(folder, train=2 * epoch).train
    whole = np.bincount(np.concatenate(documents(folder, "train")), minlength=info.vocab_size)
    for first in (0, epoch):
        seen = torch.cat([data[first + i].tokens for i in range(epoch)])
        missing = whole - np.bincount(seen.numpy(), minlength=info.vocab_size)
        assert (missing >= 0).all()
        assert missing.sum() == info.train.tokens - epoch * S <= S
    assert rows(data, epoch) != [text_of(data[epoch + i]) for i in range(epoch)]


def test_concatenated_rows_hold_the_same_text_as_one_document(corpus: Prepared) -> None:
    packed, plain = build(corpus[0]).train, build(corpus[0], mode="concatenated").train
    assert rows(packed) == rows(plain)
    batch = plain[3]
    assert batch.cu_seqlens.tolist() == [0, S]
    assert batch.positions.tolist() == list(range(S))
    assert batch.loss_mask.tolist() == [1.0] * S


def test_order_depends_on_the_seed_and_not_on_the_length_of_the_run(corpus: Prepared) -> None:
    folder, info = corpus
    epoch = (info.train.tokens - 1) // S
    short, long = build(folder, train=epoch + 3).train, build(folder, train=4 * epoch).train
    assert rows(short) == rows(long, epoch + 3)
    assert rows(short) == rows(build(folder, train=epoch + 3).train)
    assert rows(short) != rows(build(folder, train=epoch + 3, seed=1).train)
    with pytest.raises(IndexError, match=f"sample {epoch + 3} of {epoch + 3}"):
        short[epoch + 3]


def test_validation_covers_a_small_split_once_then_masked_rows(corpus: Prepared) -> None:
    folder, info = corpus
    flat = list(chain(*documents(folder, "valid")))
    data = build(folder, valid=1000).valid
    assert len(data) == 1000
    assert data.num_rows == -(-(len(flat) - 1) // S)
    covered = list(chain(*(data[i].tokens.tolist() for i in range(data.num_rows))))
    assert covered[: len(flat)] == flat[: len(covered)]
    counted = sum(float(data[i].loss_mask.sum()) for i in range(data.num_rows))
    assert counted == sum(1 for token in flat[:-1] if token != info.eod_id)
    empty = data[data.num_rows]
    assert (empty.loss_mask.sum(), empty.cu_seqlens.tolist()) == (0, [0, S])
    assert int(empty.tokens.max()) < info.vocab_size


def test_validation_of_some_rows_is_fixed_distinct_and_spread(corpus: Prepared) -> None:
    folder, _ = corpus
    flat = list(chain(*documents(folder, "valid")))
    data = build(folder, valid=4).valid
    starts = [next(i for i in range(0, len(flat), S) if flat[i : i + S + 1] == row) for row in rows(data)]
    available = -(-(len(flat) - 1) // S)
    assert starts == [i * available // 4 * S for i in range(4)]
    assert rows(data) == rows(build(folder, valid=4, seed=99).valid)


@pytest.fixture(scope="module")
def blend(make: Callable[..., Prepared], corpus: Prepared) -> dict[str, float]:
    tokenizer = str(corpus[0] / "tokenizer")
    a, _ = make([f"{'a' * (5 + i)}" for i in range(60)], tokenizer=tokenizer)
    b, _ = make([f"{'b' * (5 + i)}" for i in range(60)], tokenizer=tokenizer)
    return {str(a): 3.0, str(b): 1.0}


def test_blend_keeps_its_proportions_at_every_point(blend: dict[str, float]) -> None:
    files = {name: {token for document in documents(Path(name), "train") for token in document[:-1]} for name in blend}
    a, b = files.values()
    assert not a & b
    data = build(train=200, valid=8, blend=blend)
    from_a = [bool(a & set(row)) for row in rows(data.train)]
    for count in range(1, 201):
        assert abs(sum(from_a[:count]) - 0.75 * count) <= 1
    assert sum(any(t == row[0] for t in a) for row in rows(data.valid)) == 6
    assert rows(data.train, 50) == rows(build(train=50, blend=blend).train)


def test_data_prepared_anew_in_the_same_place_is_not_read_through_old_indices(
    make: Callable[..., Prepared], tmp_path: Path
) -> None:
    options = {"cache_dir": str(tmp_path / "cache")}
    place = tmp_path / "data"
    for texts in (sentences(60), sentences(90, "newer")):
        source, info = make(texts)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        flat = {tuple(document) for document in documents(place, "train")}
        epoch = (info.train.tokens - 1) // S
        data = build(place, train=epoch, **options).train
        seen = sum(len(data[i].tokens) for i in range(epoch))
        assert seen == epoch * S
        for row in rows(data, 5):
            middle = " ".join(map(str, row)).split(f" {info.eod_id} ")[1:-1]
            assert all((*map(int, p.split()), info.eod_id) in flat for p in middle)
    assert not (place / "cache").exists()


def test_damage_found_late_is_named_too(corpus: Prepared, tmp_path: Path) -> None:
    place = Path(shutil.copytree(corpus[0], tmp_path / "data", ignore=shutil.ignore_patterns("cache")))
    build(place)
    index = next((place / "cache").glob("*shuffle_index.npy"))
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*delete that folder"):
        build(place)
    shutil.rmtree(place / "cache")
    content = bytearray((place / "train.bin").read_bytes())
    content[1::2] = b"\xff" * (len(content) // 2)
    (place / "train.bin").write_bytes(content)
    with pytest.raises(ConfigError, match=r"train\.bin is corrupt: it holds token \d+ of a vocabulary of 300"):
        build(place).train[0]


def test_too_little_text_for_a_row(corpus: Prepared) -> None:
    data = DataConfig(path=str(corpus[0]))
    with pytest.raises(ConfigError, match=r"train\.sequence_length=100000: .* fewer than one row"):
        build_datasets(data, sequence_length=100000, train_samples=1, valid_samples=1)


def test_a_loader_over_real_rows_resumes_exactly(corpus: Prepared) -> None:
    data = build(corpus[0], train=24).train
    straight = [text_of(batch) for batch in islice(Loader(data, global_batch_size=4, dp_rank=0, dp_size=1), 24)]
    assert straight == rows(data)
    resumed = [Loader(data, global_batch_size=4, dp_rank=r, dp_size=2, start_sample=12) for r in range(2)]
    again = [text_of(next(loader)) for _ in range(3) for loader in resumed for _ in range(2)]
    assert again == straight[12:]


def _build_in_a_group(rank: int, world_size: int, blend: dict[str, float], cache: str) -> tuple:
    saved = []
    save = np.save
    np.save = lambda file, *args, **kwargs: saved.append(str(file)) or save(file, *args, **kwargs)
    data = build(train=40, blend=blend, cache_dir=cache)
    return len(saved), rows(data.train), rows(data.valid)


def test_in_a_process_group_rank_0_writes_and_all_read_the_same(blend: dict[str, float], tmp_path: Path) -> None:
    (wrote_0, *rows_0), (wrote_1, *rows_1) = run_distributed(_build_in_a_group, 2, blend, str(tmp_path / "cache"))
    assert wrote_0 > 0
    assert wrote_1 == 0
    data = build(train=40, blend=blend)
    assert rows_0 == rows_1 == [rows(data.train), rows(data.valid)]
