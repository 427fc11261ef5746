"""The rules of the tree that import-linter cannot see: file length, empty __init__ files, and dotted outside imports.

Which package may import which is in pyproject.toml (`lint-imports`).
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moba_train"
FOLDERS = ("moba_train", "launch", "tests", "benchmarks", "experiments")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 400

# What these packages may import from outside the standard library, by the first part of the name.
OUTSIDE = {
    "attention": {"torch", "triton"},
    "context_parallel": {"torch"},
    "config": set(),
}


def imports(path: Path) -> set[str]:
    """Every module of an absolute import: `from a.b import c` counts as a.b and a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def attributes(path: Path) -> set[str]:
    """Every dotted name that the code reads, such as torch.distributed in `torch.distributed.get_rank()`."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_there_is_something_to_check() -> None:
    assert len([path for path in SOURCES if path.is_relative_to(PACKAGE)]) > 30


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_init_files_are_empty_but_attentions() -> None:
    full = [path for path in SOURCES if path.name == "__init__.py" and path.read_text().strip()]
    assert relative([path for path in full if path.is_relative_to(PACKAGE)]) == ["moba_train/attention/__init__.py"]


def test_every_package_has_an_init_file() -> None:
    folders = {path.parent for path in SOURCES if path.is_relative_to(PACKAGE)}
    assert relative(sorted(folder for folder in folders if not (folder / "__init__.py").exists())) == []


def test_hydra_is_imported_in_one_file() -> None:
    users = [path for path in SOURCES if {name.split(".")[0] for name in imports(path)} & {"hydra", "omegaconf"}]
    assert relative(users) == ["moba_train/config/compose.py"]


def test_attention_knows_no_ranks() -> None:
    files = sorted((PACKAGE / "attention").rglob("*.py"))
    users = [path for path in files if "torch.distributed" in imports(path) | attributes(path)]
    assert relative(users) == []


@pytest.mark.parametrize("package", OUTSIDE)
def test_outside_imports(package: str) -> None:
    allowed = OUTSIDE[package] | {"moba_train"} | set(sys.stdlib_module_names)
    files = [path for path in sorted((PACKAGE / package).rglob("*.py")) if path.name != "compose.py"]
    foreign = {str(path.relative_to(ROOT)): {name.split(".")[0] for name in imports(path)} - allowed for path in files}
    assert {path: names for path, names in foreign.items() if names} == {}


def test_only_groups_reads_megatrons_parallel_state() -> None:
    users = [path for path in SOURCES if any("parallel_state" in name for name in imports(path) | attributes(path))]
    assert relative([path for path in users if path.is_relative_to(PACKAGE)]) == ["moba_train/parallel/groups.py"]
