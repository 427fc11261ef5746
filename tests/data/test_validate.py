"""What cannot be trained on is named with its key, its sizes and what to do, before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moba_train.config.schema import ConfigError, DataConfig
from moba_train.data.validate import check_data, content_hash, weighted_folders
from tests.data.conftest import Prepared, sentences


@pytest.fixture
def copy(corpus: Prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus[0], tmp_path / "data"))


def refused(data: DataConfig, vocab_size: int = 300, **more: int) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_data(data, vocab_size, **more)
    return caught.value


def test_good_data_passes(corpus: Prepared) -> None:
    check_data(DataConfig(path=str(corpus[0])), 300, 64)
    check_data(DataConfig(blend={str(corpus[0]): 2.0}), 50000)


def test_the_content_is_the_text_and_its_weight_and_not_the_place(corpus: Prepared, copy: Path) -> None:
    def blend(first: Path, second: Path, weight: float = 1.0) -> str:
        return content_hash(DataConfig(blend={str(first): weight, str(second): 2.0}))

    other = copy.parent / "other"
    shutil.copytree(copy, other)
    info = json.loads((other / "dataset.json").read_text())
    info["train"]["sha256"] = "0" * 64
    (other / "dataset.json").write_text(json.dumps(info))
    here, moved, changed = (content_hash(DataConfig(path=str(path))) for path in (corpus[0], copy, other))
    assert here == moved != changed
    assert blend(corpus[0], other) == blend(copy, other)
    assert len({blend(copy, other), blend(other, copy), blend(copy, other, 2.0), here, changed}) == 5


def test_missing_data_names_the_command(tmp_path: Path) -> None:
    command = f"python launch/prepare_data.py --output {tmp_path / 'absent'}"
    assert command in str(refused(DataConfig(path=str(tmp_path / "absent"))))
    error = refused(DataConfig(path=str(tmp_path)))
    assert "it has no dataset.json" in str(error)
    (tmp_path / "dataset.json").write_text("{")
    error = refused(DataConfig(path=str(tmp_path)))
    assert (error.key, "dataset.json is damaged" in str(error)) == ("data.path", True)
    (tmp_path / "dataset.json").write_text('{"format_version": 99}')
    assert "its format is 99" in str(refused(DataConfig(path=str(tmp_path))))


@pytest.mark.parametrize("change", [{"vocab_size": "4096"}, {"eod_id": 10**6}, {"bytes_per_token": 0}])
def test_numbers_that_no_text_has_are_damage(copy: Path, change: dict) -> None:
    info = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(info | change))
    assert "dataset.json is damaged" in str(refused(DataConfig(path=str(copy))))


def test_one_of_path_and_blend(corpus: Prepared) -> None:
    assert refused(DataConfig()).key == "data.path"
    assert refused(DataConfig(blend={})).key == "data.path"
    assert refused(DataConfig(path="a", blend={"b": 1.0})).key == "data.blend"


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive(weight: float) -> None:
    assert refused(DataConfig(blend={"a": 1.0, "b": weight})).key == "data.blend.b"


def test_weights_sum_to_one() -> None:
    assert [w for _, w in weighted_folders(DataConfig(blend={"a": 3.0, "b": 1.0}))] == [0.75, 0.25]


def test_tokenizer_larger_than_the_model(corpus: Prepared) -> None:
    error = refused(DataConfig(path=str(corpus[0])), vocab_size=299)
    assert (error.key, error.value) == ("model.vocab_size", 299)
    assert "has 300 tokens" in str(error)


def test_blend_of_two_tokenizers(corpus: Prepared, make: Callable[..., Prepared]) -> None:
    other, _ = make(sentences(30, "other"))
    error = refused(DataConfig(blend={str(corpus[0]): 1.0, str(other): 1.0}))
    assert error.value == str(other)
    assert f"--tokenizer {corpus[0] / 'tokenizer'}" in str(error)


def test_rows_longer_than_the_data(corpus: Prepared) -> None:
    tokens = corpus[1].train.tokens
    check_data(DataConfig(path=str(corpus[0])), 300, tokens - 1)
    assert refused(DataConfig(path=str(corpus[0])), sequence_length=tokens).key == "train.sequence_length"


def test_seed_and_cache(corpus: Prepared, tmp_path: Path) -> None:
    assert refused(DataConfig(path=str(corpus[0]), seed=-1)).key == "data.seed"
    (tmp_path / "file").write_text("")
    error = refused(DataConfig(path=str(corpus[0]), cache_dir=str(tmp_path / "file" / "cache")))
    assert error.key == "data.cache_dir"


@pytest.mark.parametrize("split", ["train", "valid"])
def test_truncated_files_are_named_with_their_sizes(split: str, copy: Path) -> None:
    for name in (f"{split}.bin", f"{split}.idx"):
        content = (copy / name).read_bytes()
        for kept in (len(content) - 1, 20, 0):
            (copy / name).write_bytes(content[:kept])
            error = refused(DataConfig(path=str(copy)))
            assert error.key == "data.path"
            assert f"{name} is truncated: {kept} bytes" in str(error)
            assert f"--output {copy} --overwrite" in str(error)
        (copy / name).write_bytes(content + b"x")
        assert name in str(refused(DataConfig(path=str(copy))))
        (copy / name).unlink()
        assert f"{name} is missing" in str(refused(DataConfig(path=str(copy))))
        (copy / name).write_bytes(content)
    check_data(DataConfig(path=str(copy)), 300)


@pytest.mark.parametrize("place", [0, 10, 17, 18, 26, 34, 60, -40])
def test_a_corrupt_index_is_named(place: int, copy: Path) -> None:
    content = bytearray((copy / "train.idx").read_bytes())
    if place < 0:  # a byte offset of a document
        place = 34 + 4 * json.loads((copy / "dataset.json").read_text())["train"]["documents"] + 8
    content[place] ^= 0x55
    (copy / "train.idx").write_bytes(content)
    assert "train.idx" in str(refused(DataConfig(path=str(copy))))


def test_files_of_another_folder_are_noticed(copy: Path, make: Callable[..., Prepared]) -> None:
    other, _ = make(sentences(30, "other"))
    for suffix in ("bin", "idx"):
        shutil.copy(other / f"train.{suffix}", copy / f"train.{suffix}")
    assert "where dataset.json says" in str(refused(DataConfig(path=str(copy))))
