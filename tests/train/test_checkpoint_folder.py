"""Which checkpoints of a run stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from moba_train.train.checkpoint_folder import outdated


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("step_00000010", "step_00000020", "step_00000030", "step_00000040", "step_00000050.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").touch()
    return tmp_path


@pytest.mark.parametrize(
    "newest, keep_last, kept, gone",
    [
        (40, 1, (), [10, 20, 30]),
        (40, 2, (), [10, 20]),
        (40, 3, (), [10]),
        (40, 4, (), []),
        (40, 5, (), []),
        (40, 6, (), []),
        (40, 100, (), []),
        (20, 1, (), [10]),  # a run that was started over
        (40, 2, (20,), [10]),  # a stage ended there
        (40, 1, (10, 30), [20]),
    ],
)
def test_the_last_ones_stay(root: Path, newest: int, keep_last: int, kept: tuple[int, ...], gone: list[int]) -> None:
    found = outdated(root / f"step_{newest:08d}", keep_last, {f"step_{step:08d}" for step in kept})
    assert [path.name for path in found] == [f"step_{step:08d}" for step in gone]
