"""launch/convert.py as a person uses it: both ways, and a mistake in one line."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers.hf import write_folder

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "convert.py"


@pytest.fixture
def convert(monkeypatch, capsys):
    """Run the script; (exit code, what it said)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code, capsys.readouterr().err

    return run


def test_there_and_back(convert, tmp_path):
    folder = write_folder(tmp_path / "hf", "qwen3")
    code, said = convert("hf-to-core", folder, tmp_path / "core")
    assert code == 0
    assert "tensors" in said
    assert "default, base 10000" in said
    code, said = convert("core-to-hf", tmp_path / "core", tmp_path / "back")
    assert code == 0
    assert "config.json" in said
    original, back = (path / "model.safetensors" for path in (folder, tmp_path / "back"))
    assert original.read_bytes() == back.read_bytes()


def test_a_mistake_is_one_line(convert, tmp_path):
    code, said = convert("hf-to-core", tmp_path / "nowhere", tmp_path / "core")
    assert code == 2
    assert "no such folder" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "core").exists()
