"""Learning-rate schedules by their values, and what weight decay leaves alone."""

import itertools
import math
from types import SimpleNamespace

import pytest

from moba_train.config.compose import compose
from moba_train.train.optimizer import build_scheduler

PEAK, LEAST = 1e-2, 1e-3


def rates(*overrides: str, steps: int = 20) -> list[float]:
    """Learning rate of every step, as the training loop applies it."""
    config = compose(
        [
            "recipe=tiny",
            f"train.steps={steps}",
            f"optim.learning_rate={PEAK}",
            f"optim.min_learning_rate={LEAST}",
            "optim.warmup_steps=4",
            *overrides,
        ]
    )
    group = {"lr": 0.0, "weight_decay": 0.0, "lr_mult": 1.0, "wd_mult": 1.0}
    optimizer = SimpleNamespace(param_groups=[group])
    scheduler = build_scheduler(config, optimizer)
    found = []
    for _ in range(steps):
        scheduler.step(increment=1)
        found.append(group["lr"])
    return found


def test_warm_up_is_linear_and_never_zero():
    assert rates()[:4] == pytest.approx([PEAK * i / 4 for i in (1, 2, 3, 4)])


def test_cosine_ends_at_the_minimum_and_halves_the_way_in_the_middle():
    found = rates()
    assert found[-1] == pytest.approx(LEAST)
    assert found[11] == pytest.approx((PEAK + LEAST) / 2)
    expected = [LEAST + (PEAK - LEAST) * (1 + math.cos(math.pi * i / 16)) / 2 for i in range(17)]
    assert found[3:] == pytest.approx(expected)


def test_cosine_over_decay_steps_stays_at_the_minimum_after():
    found = rates("optim.decay_steps=10")
    assert found[9:] == pytest.approx([LEAST] * 11)


def test_wsd_is_flat_until_the_final_decay():
    found = rates("optim.schedule=wsd", "optim.decay_steps=5")
    assert found[3:15] == pytest.approx([PEAK] * 12)
    assert found[-1] == pytest.approx(LEAST)
    assert all(a > b for a, b in itertools.pairwise(found[14:]))


def test_wsd_decays_over_the_last_tenth_by_default():
    found = rates("optim.schedule=wsd")
    assert found[17] == pytest.approx(PEAK)
    assert found[19] == pytest.approx(LEAST)


def test_constant():
    assert rates("optim.schedule=constant")[3:] == pytest.approx([PEAK] * 17)
