"""Everything that pyproject.toml asks for has exactly one pin for each Python, in constraints.txt."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def pins(python: str) -> dict[str, str]:
    """Name -> version for one Python. Fails on a line that is no exact pin and on a second pin of the same name."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker and not pin.marker.evaluate({"python_version": python}):
            continue
        [specifier] = pin.specifier
        name = canonicalize_name(pin.name)
        assert specifier.operator == "==", line
        assert name not in found, line
        found[name] = specifier.version
    return found


@pytest.mark.parametrize("python, megatron", [("3.11", "0.16.1"), ("3.12", "0.19.2"), ("3.13", "0.19.2")])
def test_every_requirement_is_pinned_to_a_version_it_allows(python: str, megatron: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    pinned = pins(python)
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no pin"
        assert version in requirement.specifier
    assert pinned["megatron-core"] == megatron
    assert pinned["torch"] == "2.13.0"


def test_an_image_gets_everything_that_its_tests_import() -> None:
    ignore = ROOT / ".dockerignore"
    if not ignore.exists():
        pytest.skip("in an image")
    kept = {line.removeprefix("!") for line in ignore.read_text().splitlines() if line.startswith("!")}
    sources = [path for name in kept for path in (ROOT / name).rglob("*.py")]
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name or "").partition(".")[0]
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0)
    }
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert "experiments" in imported
    assert imported & folders <= kept
