"""Which checkpoints of a run stay, and which are its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moba_train.config.schema import CheckpointConfig, ConfigError, RunConfig, RunDirConfig
from moba_train.train.checkpoint_folder import (
    Metadata,
    is_own,
    latest_checkpoint,
    loads_weights_only,
    outdated,
    read_metadata,
)


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


def test_a_run_begins_anew_only_where_nothing_was_saved(root: Path, tmp_path: Path) -> None:
    marker = root / "latest"
    marker.write_text("step_00000040")
    assert latest_checkpoint(root) == root / "step_00000040"
    assert latest_checkpoint(tmp_path / "none") is None
    for content in (b"", b"\xd2\xff", b"step_00000099"):
        marker.write_bytes(content)
        with pytest.raises(ConfigError, match=r"latest.*load=.*step_00000040"):
            latest_checkpoint(root)
    marker.unlink()
    with pytest.raises(ConfigError, match=r"latest.*missing.*load=.*step_00000040"):
        latest_checkpoint(root)
    only = tmp_path / "killed before it named its first step"
    (only / "step_00000010").mkdir(parents=True)
    assert latest_checkpoint(only) == only / "step_00000010"


@pytest.mark.parametrize("wrong", [{"step": None}, {"config": {}}, {"config": [1]}, {"manifest": {}}])
def test_metadata_of_other_kinds_are_named(root: Path, wrong: dict) -> None:
    values: dict = {field.name: {"a": 1} for field in dataclasses.fields(Metadata)}
    (root / "step_00000010" / "moba_train.json").write_text(json.dumps(values | {"step": 1} | wrong))
    with pytest.raises(ConfigError, match=rf"moba_train\.json: its {next(iter(wrong))} is"):
        read_metadata(root / "step_00000010")


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
