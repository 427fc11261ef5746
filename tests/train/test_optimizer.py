"""Learning-rate schedules by their values, and what weight decay leaves alone."""

import itertools
import math
from types import SimpleNamespace

import pytest

from moba_train.config.compose import compose
from moba_train.train.optimizer import build_scheduler
from tests.helpers.spawn import run_distributed
from tests.helpers.training import corpus, small_config

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


def _inspect(rank, world_size, data, root):
    """Per run: weight decay by parameter name, dtypes, and the first step's gradient norm and Adam's first moment."""
    import torch
    from megatron.core import parallel_state

    from moba_train.train.setup import setup
    from moba_train.train.step import train_step

    found = {}
    for name, overrides in {
        "fp32": [],
        "bf16": ["precision=bf16"],
        "clipped": ["optim.clip_grad=0.01"],
    }.items():
        run = setup(small_config(data, root / name, "parallel.distributed_optimizer=false", *overrides))
        names = {id(p): n for n, p in run.chunks[0].named_parameters()}
        model = {id(getattr(p, "main_param", p)): names[id(p)] for p in run.chunks[0].parameters()}
        groups = run.optimizer.optimizer.param_groups
        decay = {model[id(p)]: group["wd_mult"] for group in groups for p in group["params"]}
        masters = {str(p.dtype) for group in groups for p in group["params"]}
        weights = {str(p.dtype) for p in run.chunks[0].parameters()}
        gradients = {str(p.main_grad.dtype) for p in run.chunks[0].parameters()}
        result = train_step(run, stop_requested=False)
        moments = torch.cat([state["exp_avg"].flatten() for state in run.optimizer.optimizer.state.values()])
        found[name] = decay, masters, weights, gradients, result.grad_norm, float(moments.norm())
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    root = tmp_path_factory.mktemp("optimizer")
    return run_distributed(_inspect, 1, corpus(root / "data"), root)[0]


def test_weight_decay_leaves_norms_alone(inspected):
    decay = inspected["fp32"][0]
    norms = {name for name in decay if "norm" in name}
    assert len(norms) == 2 * 4 + 1
    assert {name for name, share in decay.items() if share == 0} == norms


def test_bf16_weights_have_fp32_masters_and_gradients(inspected):
    _, masters, weights, gradients, *_ = inspected["bf16"]
    assert (masters, weights, gradients) == ({"torch.float32"}, {"torch.bfloat16"}, {"torch.float32"})


def test_gradients_are_clipped_by_their_global_norm(inspected):
    (*_, norm, moment), (*_, clipped_norm, clipped_moment) = inspected["fp32"], inspected["clipped"]
    assert clipped_norm == pytest.approx(norm)  # what is reported is the norm before clipping
    assert norm < 1.0 or moment == pytest.approx(0.1, rel=1e-3)
    assert clipped_moment == pytest.approx(0.1 * 0.01, rel=1e-3)  # (1 - beta1) of the gradient
