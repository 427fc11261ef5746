"""The experiment's reading of its runs: what a switch did, by hand-made curves; the page; the arms' plans."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from experiments.schedule_switch import run as experiment
from experiments.schedule_switch.page import Curve, _reading, around_switch, publish, read_curve
from moba_train.config.compose import compose
from moba_train.config.validate import validate
from moba_train.model.layer_plan import LayerAttention, LayerKind, plan_phases

STEPS, SWITCH = 40, 36


def curve(bump: float = 0.0, first_full: int | None = SWITCH + 1, last_eighth: float = 2.0) -> Curve:
    """Loss 3 and 3.1 in turn; `bump` is added to the second step of full attention."""
    losses = [3.0 + 0.1 * (t % 2) for t in range(1, STEPS + 1)]
    losses[SWITCH + 1] += bump
    plans = [(1, "moba*4(64,3)"), *([(first_full, "full*4")] if first_full else [])]
    return Curve(losses, 2.5, [3.0] * 7 + [last_eighth], plans)


def test_the_switch_is_measured_in_standard_deviations_of_the_steps_before_it():
    switch = around_switch(curve(bump=0.4), curve(first_full=None))
    assert (switch.step, switch.before, switch.after) == (SWITCH, SWITCH - 1, STEPS - SWITCH)
    # 35 changes of 0.1 up and down, beginning and ending with down: 17 up, 18 down.
    mean = -0.1 / 35
    sigma = math.sqrt((17 * (0.1 - mean) ** 2 + 18 * (-0.1 - mean) ** 2) / 34)
    assert switch.sigma == pytest.approx(sigma)
    assert switch.jump == pytest.approx(0.1 / sigma)
    assert switch.rise == pytest.approx((3.4 - 3.05) / sigma)
    assert switch.excess == pytest.approx(0.4 / sigma)
    assert switch.apart == switch.chance == 0.0
    other = dataclasses.replace(curve(first_full=None), losses=[loss + 0.2 for loss in curve().losses])
    assert around_switch(curve(), other).chance == pytest.approx(0.2)


def test_a_resumed_run_tells_its_plan_again_and_that_is_no_switch():
    hybrid = curve()
    plans = [*hybrid.plans[:1], (20, "moba*4(64,3)"), *hybrid.plans[1:]]
    again = dataclasses.replace(hybrid, plans=plans)
    assert around_switch(again, curve(first_full=None)) == around_switch(hybrid, curve(first_full=None))


@pytest.mark.parametrize("bump, last_eighth, met", [(0.0, 2.005, True), (0.9, 2.02, False), (0.9, 1.97, False)])
def test_the_page_says_whether_the_expectations_are_met(tmp_path, bump, last_eighth, met):
    arms = {"full": curve(), "moba": curve(first_full=None, last_eighth=2.06)}
    seeds = [arms | {"hybrid": curve(), "full": curve(last_eighth=2.001)}, arms | {"hybrid": curve(bump)}]
    seeds[0]["hybrid"] = dataclasses.replace(curve(), eighths=[3.0] * 7 + [2 * last_eighth - 1.999])
    told = {"command": "how", "device": "where", "versions": {}, "packages": [], "date": "when"}
    results = {
        "environment": told | {"setting": ["a.key=7"], "quick": False},
        "seeds": [{arm: dataclasses.asdict(one) for arm, one in seed.items()} for seed in seeds],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    publish(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.count("| met |" if met else "| **not met**") == 2
    assert ("| **not met**" if met else "| met |") not in page
    assert f"per token, mean over seeds | {last_eighth - 2:+.4f} | within 0.01 |" in page
    assert page.count("(lower)") == (last_eighth < 1.99)
    assert "MoBA alone ends below full attention" not in page
    assert "cannot be told from chance" not in page
    assert "own losses are 0.0010 apart" in page
    assert "a.key=7" in page
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_what_it_cannot_tell():
    assert _reading(0.05, 0.001) == []
    below, chance = _reading(-0.05, 0.04)
    assert "MoBA alone ends below full attention" in below
    assert "end up 0.040 apart" in chance


def test_a_curve_is_read_from_the_metrics(tmp_path):
    records = [
        {"step": 1, "loss": 3.0, "layer_plan": "moba*4(64,3)"},
        {"step": 2, "loss": 2.0, "layer_plan": "full*4"},
        {"step": 2, "validation_loss": 2.5, "validation_loss_by_position": [2.0] * 8},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_curve(tmp_path) == Curve([3.0, 2.0], 2.5, [2.0] * 8, [(1, "moba*4(64,3)"), (2, "full*4")])


def test_the_arms_are_valid_and_differ_in_the_kind_of_attention_alone(tmp_path, monkeypatch):
    info = SimpleNamespace(valid=SimpleNamespace(tokens=100_001))
    monkeypatch.setattr(experiment, "dataset_info", lambda path: info)
    for setting in (experiment.GPU, experiment.CPU, experiment.QUICK):
        common = experiment._overrides(setting, setting.steps, tmp_path)
        configs = {arm: compose([*common, *overrides]) for arm, overrides in experiment.ARMS.items()}
        plans = {
            arm: [(step, set(plan)) for step, plan in plan_phases(config.attention, config.model.num_layers)]
            for arm, config in configs.items()
        }
        moba = LayerAttention(LayerKind.MOBA, setting.block_size, 3)
        full = dataclasses.replace(moba, kind=LayerKind.FULL)
        assert plans == {
            "full": [(0, {full})],
            "moba": [(0, {moba})],
            "hybrid": [(0, {moba}), (-(-9 * setting.steps // 10), {full})],
        }
        for config in configs.values():
            validate(config, 1)
            assert config.train.validation_batches * setting.batch * setting.sequence_length >= 100_000
