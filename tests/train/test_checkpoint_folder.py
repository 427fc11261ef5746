"""Which checkpoints of a run stay, and which are its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from moba_train.config.schema import CheckpointConfig, RunConfig, RunDirConfig
from moba_train.train.checkpoint_folder import is_own, loads_weights_only, outdated


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


def test_own_checkpoints_are_known_however_their_paths_are_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    link = f"{tmp_path.name}-link"
    Path(link).symlink_to(tmp_path)
    for folder in (str(tmp_path), tmp_path.name, link):
        config = RunConfig(run=RunDirConfig(folder))
        for start in (tmp_path, Path(tmp_path.name), Path(link)):
            assert is_own(config, start / "step_00000010")
        assert not is_own(config, tmp_path.parent / "step_00000010")


@pytest.mark.parametrize("resume, load, weights_only", [(True, ".", False), (False, ".", True), (True, "..", True)])
def test_weights_alone_are_taken_but_where_a_run_goes_on(
    root: Path, resume: bool, load: str, weights_only: bool
) -> None:
    checkpoint = CheckpointConfig(resume=resume, load="somewhere", load_weights_only=True)
    config = RunConfig(run=RunDirConfig(str(root)), checkpoint=checkpoint)
    assert loads_weights_only(config, root / load / "step_00000010") == weights_only
