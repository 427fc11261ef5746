"""The experiment's reading of its runs: what a switch did, by hand-made curves; the page; which arms run again."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from experiments.schedule_switch import run as experiment
from experiments.schedule_switch.run import Curve, around_switch, draw, read_curve, write_page
from moba_train.config.compose import compose
from moba_train.config.validate import validate
from moba_train.model.layer_plan import LayerAttention, LayerKind, plan_phases

STEPS, SWITCH = 40, 36


def curve(bump: float = 0.0, first_full: int | None = SWITCH + 1, last_eighth: float = 2.0) -> Curve:
    """Loss 3 and 3.1 in turn; `bump` is added to the second step of full attention."""
    losses = {t: 3.0 + 0.1 * (t % 2) for t in range(1, STEPS + 1)}
    losses[SWITCH + 2] += bump
    plans = [(1, "moba*4(64,3)"), *([(first_full, "full*4")] if first_full else [])]
    return Curve(losses, 2.5, [3.0] * 7 + [last_eighth], plans, 1000.0)


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
    assert switch.apart == 0.0


def test_a_resumed_run_tells_its_plan_again_and_that_is_no_switch():
    hybrid = curve()
    plans = [*hybrid.plans[:1], (20, "moba*4(64,3)"), *hybrid.plans[1:]]
    again = Curve(hybrid.losses, hybrid.validation, hybrid.eighths, plans, 1000.0)
    assert around_switch(again, curve(first_full=None)) == around_switch(hybrid, curve(first_full=None))


@pytest.mark.parametrize("bump, last_eighth, verdicts", [(0.0, 2.005, ["met", "met"]), (0.9, 2.02, ["not met"] * 2)])
def test_the_page_says_whether_the_criteria_are_met(tmp_path, bump, last_eighth, verdicts):
    curves = {"full": curve(), "moba": curve(first_full=None), "hybrid": curve(bump, last_eighth=last_eighth)}
    switch = around_switch(curves["hybrid"], curves["moba"])
    page = write_page(curves, switch, "provenance")
    criteria = [line for line in page.splitlines() if line.endswith("met |")]
    assert [line.split("|")[-2].strip() for line in criteria] == verdicts
    assert f"| {last_eighth - 2.0:+.4f} | 0.01 |" in criteria[0]
    draw(curves, switch, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_is_read_from_the_metrics(tmp_path):
    records = [
        {"step": 1, "loss": 3.0, "tokens_per_second": 10.0, "layer_plan": "moba*4(64,3)"},
        {"step": 2, "loss": 2.0, "tokens_per_second": 30.0, "layer_plan": "full*4"},
        {"step": 2, "validation_loss": 2.5, "validation_loss_by_position": [2.0] * 8},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_curve(tmp_path) == Curve(
        {1: 3.0, 2: 2.0}, 2.5, [2.0] * 8, [(1, "moba*4(64,3)"), (2, "full*4")], tokens_per_second=20.0
    )


def test_an_arm_runs_until_it_is_finished_and_never_with_other_settings(tmp_path, monkeypatch):
    commands = []
    arm = tmp_path / "moba"
    reached = iter([5, 9])

    def train(command, **_):
        commands.append(command)
        (arm / "metrics.jsonl").write_text(f'{{"step": {next(reached)}, "validation_loss": 1.0}}\n')

    monkeypatch.setattr(experiment.subprocess, "run", train)
    with pytest.raises(SystemExit, match="goes on"):
        experiment._run_arm(arm, ["train.steps=9"], 9, 1)
    for _ in range(2):
        experiment._run_arm(arm, ["train.steps=9"], 9, 1)
    assert [command[-2:] for command in commands] == [["train.steps=9", f"run.dir={arm}"]] * 2
    with pytest.raises(SystemExit, match=r"train\.steps=8"):
        experiment._run_arm(arm, ["train.steps=8"], 8, 1)


def test_the_arms_are_valid_and_differ_in_the_kind_of_attention_alone(tmp_path, monkeypatch):
    info = SimpleNamespace(valid=SimpleNamespace(tokens=100_001))
    monkeypatch.setattr(experiment, "dataset_info", lambda path: info)
    for setting in (experiment.GPU, experiment.CPU, experiment.QUICK):
        common = experiment._overrides(setting, 100, tmp_path)
        configs = {arm: compose([*common, *overrides]) for arm, overrides in experiment.ARMS.items()}
        plans = {
            arm: [(step, set(plan)) for step, plan in plan_phases(config.attention, config.model.num_layers)]
            for arm, config in configs.items()
        }
        moba = LayerAttention(LayerKind.MOBA, setting.sequence_length // 16, 3)
        full = dataclasses.replace(moba, kind=LayerKind.FULL)
        assert plans == {
            "full": [(0, {full})],
            "moba": [(0, {moba})],
            "hybrid": [(0, {moba}), (90, {full})],
        }
        for config in configs.values():
            validate(config, 1)
            assert config.train.validation_batches * setting.batch * setting.sequence_length >= 100_000
