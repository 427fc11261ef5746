"""Attention switched during training: nothing else moves, resume is exact in any phase, records and pictures tell."""

import hashlib
from unittest import mock

import pytest
import torch

from moba_train.model.layer_plan import layer_plan
from moba_train.train import checkpoint_folder
from moba_train.train.flops import training_flops
from moba_train.train.metrics import read_metrics
from tests.helpers.spawn import run_distributed
from tests.helpers.training import corpus, log_messages, losses, small_config

pytestmark = pytest.mark.timeout(900)  # a spawned run has its own, shorter limit

SWITCH, STEPS = 2, 5
PLAIN = "attention.pattern=moba"
FULL = "attention.pattern=full"
SCHEDULE = [PLAIN, f"attention.schedule=[{{step: {SWITCH}, pattern: full}}]"]
LATER = [PLAIN, f"attention.schedule=[{{step: {SWITCH + 2}, pattern: full}}]"]


def _digest(tensors):
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().double().numpy().tobytes())
    return hashed.hexdigest()


def _state(run):
    """Digest of weights, master weights and moments, and of the schedule's position."""
    optimizer = [value for values in run.optimizer.optimizer.state.values() for value in values.values()]
    masters = [p for group in run.optimizer.optimizer.param_groups for p in group["params"]]
    weights = [p for chunk in run.chunks for p in chunk.parameters()]
    assert len(optimizer) == 3 * len(masters)  # step and both moments
    return _digest([*weights, *masters, *optimizer]), run.scheduler.num_steps


def _watched(config):
    """Step by step: its result, batches and the state after it; and two validation losses.

    These are of the weights after SWITCH steps: by the plan validation uses there, and by the one it uses a step later.
    """
    from megatron.core import parallel_state

    from moba_train.train.setup import preflight, setup
    from moba_train.train.step import train_step, validate_model

    preflight(config)
    run = setup(config)
    rows = []
    read = type(run.loader).__next__

    def noted(loader):
        batch = read(loader)
        rows.append(_digest([batch.tokens, batch.cu_seqlens]))
        return batch

    found = []
    with mock.patch.object(type(run.loader), "__next__", noted):
        for _ in range(STEPS):
            rows.clear()
            found.append((train_step(run, stop_requested=False), list(rows), _state(run)))
            if run.step == SWITCH:
                validation = [validate_model(run).loss]
                run.step += 1
                validation.append(validate_model(run).loss)
                run.step -= 1
    parallel_state.destroy_model_parallel()
    return found, validation


def _one_process(rank, world_size, data, root):
    from megatron.core import parallel_state

    from moba_train.train import loop

    torch.set_num_threads(1)
    found = {}
    for name, overrides in (("moba", [PLAIN]), ("switched", SCHEDULE)):
        found[name], found[name, "validation"] = _watched(small_config(data, root / name, *overrides))
    # The same two parts as two runs: MoBA, saved; full, from that checkpoint.
    losses(small_config(data, root / "parts", PLAIN), SWITCH, save=True)
    found["parts"] = losses(small_config(data, root / "parts", FULL), STEPS - SWITCH)

    at_the_switch = small_config(data, root / "at-switch", *SCHEDULE, f"checkpoint.load={root / 'parts'}")
    found[SWITCH] = losses(at_the_switch, STEPS - SWITCH)
    config = small_config(data, root / "within", *SCHEDULE)
    first = losses(config, SWITCH + 1, save=True)
    found[SWITCH + 1] = losses(config, STEPS - SWITCH - 1)
    assert first[SWITCH:] == found[SWITCH][:1]

    with log_messages() as found["said"]:
        found["changed"] = losses(small_config(data, root / "within", *LATER), 2)

    told = []
    reporting = [f"train.steps={STEPS}", "metrics.log_every=4", "data.mode=concatenated"]
    with mock.patch.object(loop, "close"), mock.patch.object(loop.Metrics, "say", lambda _, text: told.append(text)):
        assert loop.pretrain(small_config(data, root / "reported", *SCHEDULE, *reporting)) == 0
    parallel_state.destroy_model_parallel()
    return found | {"told": told}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("schedule")


@pytest.fixture(scope="module")
def data(root):
    return corpus(root / "data")


@pytest.fixture(scope="module")
def found(root, data):
    return run_distributed(_one_process, 1, data, root, timeout=240)[0]


def test_before_the_switch_a_run_equals_the_one_without_and_after_it_does_not(found):
    for (result, rows, state), (expected, expected_rows, expected_state) in zip(
        found["switched"][:SWITCH], found["moba"], strict=False
    ):
        assert (result, rows, state) == (expected, expected_rows, expected_state)
    assert found["switched"][SWITCH][0].loss != found["moba"][SWITCH][0].loss


def test_data_order_and_learning_rate_do_not_notice_the_switch(found):
    for (result, rows, state), (expected, expected_rows, expected_state) in zip(
        found["switched"], found["moba"], strict=True
    ):
        assert rows == expected_rows
        assert result.learning_rate == expected.learning_rate
        assert state[1] == expected_state[1]


def test_a_switched_run_is_its_two_parts_one_after_the_other(found):
    """So weights and optimizer state pass through the switch bit by bit."""
    switched = [(result.loss, result.grad_norm) for result, _, _ in found["switched"]]
    assert switched[SWITCH:] == found["parts"]


@pytest.mark.parametrize("stop", [SWITCH, SWITCH + 1])
def test_resume_at_the_switch_and_within_a_phase_is_exact(found, stop):
    assert found[stop] == [(result.loss, result.grad_norm) for result, _, _ in found["switched"][stop:]]


def test_the_checkpoint_records_schedule_and_plan(found, root):
    before = checkpoint_folder.read_metadata(checkpoint_folder.latest_checkpoint(root / "parts" / "checkpoints"))
    within = checkpoint_folder.read_metadata(checkpoint_folder.latest_checkpoint(root / "within" / "checkpoints"))
    assert {layer["kind"] for layer in before.plan} == {"moba"}
    assert {layer["kind"] for layer in within.plan} == {"full"}
    assert [(p["step"], p["pattern"]) for p in within.config["attention"]["schedule"]] == [(SWITCH, "full")]


def test_a_changed_schedule_on_resume_is_followed_and_said(found):
    (line,) = [line for line in found["said"] if "attention.schedule" in line]
    assert f"until step {SWITCH + 1}" in line
    assert f"'step': {SWITCH + 2}" in line
    assert not [line for line in found["said"] if "attention.full_layers" in line]
    # Step SWITCH + 1 is MoBA again under the later switch, so its loss differs from the unchanged run's.
    assert found["changed"][0][0] != found["switched"][SWITCH + 1][0].loss


def test_validation_uses_the_plan_of_the_step_just_done(found):
    at_the_switch, after_it = found["switched", "validation"]
    assert [at_the_switch, at_the_switch] == found["moba", "validation"]
    assert after_it != at_the_switch


def test_flops_metrics_log_and_picture_follow_the_switch(found, root):
    steps = [record for record in read_metrics(root / "reported") if "loss" in record]
    # Every fourth step is recorded, and besides it the first of each plan and the last.
    assert [(record["step"], record.get("layer_plan")) for record in steps] == [
        (1, "moba*4(16,3)"),
        (SWITCH + 1, "full*4"),
        (4, None),
        (STEPS, None),
    ]
    assert f"  after step {SWITCH}: full*4" in found["told"]
    assert f"step {SWITCH + 1}: layers now full*4" in found["told"]
    assert (root / "reported" / "loss.png").exists()

    config = small_config(root / "data", root / "switched", *SCHEDULE)
    for step, (result, _, _) in enumerate(found["moba"]):
        plan = layer_plan(config.attention, 4, step)
        difference = _difference(config, plan, step)
        assert found["switched"][step][0].flops - result.flops == difference
        assert (difference > 0) == (step >= SWITCH)


def _difference(config, plan, step):
    """FLOPs of `plan` beyond all-MoBA on the documents of a step's rows."""
    from moba_train.data.pretrain import build_datasets

    rows = build_datasets(config.data, sequence_length=128, train_samples=80, valid_samples=4).train
    lengths = [n for i in range(4 * step, 4 * step + 4) for n in rows[i].cu_seqlens.diff().tolist()]
    moba = layer_plan(config.attention, 4, 0)
    return training_flops(config.model, plan, lengths) - training_flops(config.model, moba, lengths)
