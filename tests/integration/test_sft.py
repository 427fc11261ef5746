"""Fine-tuning runs: from a checkpoint, in any layout, resumed bit by bit; what a resume may not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moba_train.config.compose import compose
from moba_train.config.schema import ConfigError, RunConfig
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import LOSS_RTOL
from tests.helpers.training import SMALL, corpus, losses, small_config

PAIRS = {"data": [], "tensor and sequence": ["parallel.tensor=2", "parallel.sequence=true"]}


def _rows(file: Path) -> Path:
    """Questions of one or two turns, of different lengths, some longer than the context."""
    rows = []
    for i in range(40):
        turns = [("user", f"def f{i}(x): return x + {i}\n" * (1 + i % 12)), ("assistant", f"x + {i}")]
        turns += [("user", "and again?"), ("assistant", f"f{i}")] * (i % 2)
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _config(root: Path, run: str, *overrides: str, load: bool = True) -> RunConfig:
    start = [f"checkpoint.load={root / 'pretrained'}", "checkpoint.load_weights_only=true"]
    rows = [f"sft.path={root / 'rows.jsonl'}", f"sft.tokenizer={root / 'data' / 'tokenizer'}", "sft.overlong=truncate"]
    return compose([*SMALL, "data.path=null", *rows, f"run.dir={root / run}", *(start if load else []), *overrides])


def _alone(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    losses(small_config(root / "data", root / "pretrained"), 2, save=True)
    found: dict[str, Any] = {"straight": losses(_config(root, "straight"), 4)}
    found["halves"] = losses(_config(root, "halves"), 2, save=True) + losses(_config(root, "halves"), 2)
    found["scratch"] = losses(_config(root, "scratch", load=False), 1)
    for name in ("sample", "document"):
        found[name] = losses(_config(root, name, f"sft.loss_weighting={name}"), 1)
    found["refused"] = {}
    for name, overrides in {
        "packing": ["sft.packing=none"],
        "last turn": ["sft.last_turn_only=true"],
        "pretraining": ["checkpoint.load_weights_only=false", "run.dir=null"],
    }.items():
        try:
            losses(_config(root, "halves", *overrides), 0)
        except ConfigError as error:
            found["refused"][name] = str(error)
    return found


def _pair(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    # A cache of their own: rank 0 tokenises, the other waits for it.
    cache = f"data.cache_dir={root / 'cache-of-two'}"
    return {name: losses(_config(root, name, cache, *overrides), 4) for name, overrides in PAIRS.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("sft")
    corpus(root / "data")
    _rows(root / "rows.jsonl")
    (alone,) = run_distributed(_alone, 1, root)
    first, second = run_distributed(_pair, 2, root)
    assert first == second
    return alone | first


def test_it_resumes_bit_by_bit(found: dict[str, Any]) -> None:
    assert found["halves"] == found["straight"]


@pytest.mark.parametrize("layout", PAIRS)
def test_every_layout_learns_the_same(found: dict[str, Any], layout: str) -> None:
    expected = [loss for loss, _ in found["straight"]]
    assert [loss for loss, _ in found[layout]] == pytest.approx(expected, rel=LOSS_RTOL)


def test_it_starts_from_the_checkpoint_and_weights_matter(found: dict[str, Any]) -> None:
    first = {found[name][0][0] for name in ("straight", "scratch", "sample")}
    assert len(first) == 3
    assert found["document"][0][0] == pytest.approx(found["sample"][0][0], rel=LOSS_RTOL)  # every row its own source


def test_what_the_order_of_rows_depends_on_may_not_change(found: dict[str, Any]) -> None:
    refused = found["refused"]
    assert refused["packing"].startswith("sft.packing='none'")
    assert refused["last turn"].startswith("sft.last_turn_only=True")
    assert "was trained on plain text" in refused["pretraining"]
