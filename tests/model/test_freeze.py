"""Freezing by pattern: what is frozen stays to the bit, the rest trains as it would; every layout, and on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moba_train.config.schema import ConfigError
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import LOSS_RTOL
from tests.helpers.training import corpus, small_config

RESUMED = ("alone", "data", "pipeline")
PATTERNS = ["embedding.*", "decoder.layers.[03].*", "*.input_layernorm.weight"]
FREEZE = "train.freeze=[" + ",".join(f'"{pattern}"' for pattern in PATTERNS) + "]"
ALONE = {"alone": [], "recompute": ["parallel.recompute=full"]}
PAIRS = {
    "data": [],
    "pipeline": ["parallel.pipeline=2"],
    "overlap": ["parallel.overlap_grad_reduce=true"],
}


def _train(rank: int, world_size: int, data: Path, root: Path, layouts: dict[str, list[str]]) -> dict[str, Any]:
    """Per layout: the losses of three steps, the same with a stop after two, and the names that changed."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from moba_train.model.freeze import parameter_names
    from moba_train.train import checkpoint
    from moba_train.train.setup import preflight, setup
    from moba_train.train.step import train_step

    def steps(config: Any, count: int, save: bool = False) -> tuple[list[float], dict[str, bool]]:
        preflight(config)
        try:
            run = setup(config)
            named = dict(pair for chunk in run.chunks for pair in parameter_names(unwrap_model(chunk)))
            before = {name: parameter.detach().clone() for name, parameter in named.items()}
            curve = [train_step(run, stop_requested=False).loss for _ in range(count)]
            if save:
                checkpoint.save(run)
            return curve, {name: not torch.equal(named[name], value) for name, value in before.items()}
        finally:
            parallel_state.destroy_model_parallel()

    if world_size == 1:
        steps(small_config(data, root / "initial"), 0, save=True)
    start = [f"checkpoint.load={root / 'initial'}", "checkpoint.load_weights_only=true"]
    found: dict[str, Any] = {}
    for layout, overrides in layouts.items():
        options = [*start, FREEZE, *overrides]
        straight, changed = steps(small_config(data, root / f"{world_size}-{layout}", *options), 3)
        found[layout] = (straight, changed)
        if layout not in RESUMED:
            continue
        folder = root / f"{world_size}-{layout}-stopped"
        halves = steps(small_config(data, folder, *options), 2, save=True)[0]
        halves += steps(small_config(data, folder, *options), 1)[0]
        found[layout] = (straight, changed, halves)
        if "error" not in found:
            found["error"] = {}
            for name, freeze in {"other": "[]", "nothing": '["decoder.layers.4.*"]', "all": '["*"]'}.items():
                place = folder if name == "other" else root / name
                try:
                    steps(small_config(data, place, *start, f"train.freeze={freeze}"), 0)
                except ConfigError as error:
                    found["error"][name] = str(error)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("freeze")
    data = corpus(root / "data")
    return {
        "alone": run_distributed(_train, 1, data, root, ALONE),
        "pair": run_distributed(_train, 2, data, root, PAIRS),
    }


@pytest.mark.parametrize("layout", [*ALONE, *PAIRS])
def test_what_matches_stays_and_the_rest_trains(found: dict, layout: str) -> None:
    ranks = found["alone" if layout in ALONE else "pair"]
    changed = {name: value for rank in ranks for name, value in rank[layout][1].items()}
    assert len(changed) == 2 + 4 * 6  # embedding, last norm; of each layer two norms and four matrices
    for name, value in changed.items():
        frozen = name.startswith(("embedding.", "decoder.layers.0.", "decoder.layers.3.")) or "input_layernorm" in name
        assert value != frozen, name


@pytest.mark.parametrize("layout", [*list(ALONE)[1:], *PAIRS])
def test_every_layout_learns_the_same(found: dict, layout: str) -> None:
    expected = found["alone"][0]["alone"][0]
    for rank in found["alone" if layout in ALONE else "pair"]:
        assert rank[layout][0] == pytest.approx(expected, rel=LOSS_RTOL)


@pytest.mark.parametrize("layout", RESUMED)
def test_a_stopped_run_resumes_bit_by_bit(found: dict, layout: str) -> None:
    straight, _, halves = found["alone" if layout in ALONE else "pair"][0][layout]
    assert halves == straight


def test_refusals_are_the_same_on_every_rank(found: dict) -> None:
    for rank in (*found["alone"], *found["pair"]):
        assert set(rank["error"]) == {"other", "nothing", "all"}
        assert "train.freeze" in rank["error"]["other"]
        assert "'decoder.layers.4.*' matches no parameter; they have names such as" in rank["error"]["nothing"]
        assert "nothing would train" in rank["error"]["all"]
