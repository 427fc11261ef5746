"""A run in stages of different length, layout and layer plan: one folder, exact resume anywhere, all state carried.

The same on two GPUs over NCCL, with deterministic gradients.
"""

import hashlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moba_train.config.compose import compose
from moba_train.config.schema import ConfigError
from moba_train.train import checkpoint_folder
from moba_train.train.metrics import read_metrics
from tests.helpers.spawn import run_distributed
from tests.helpers.training import SMALL, corpus

pytestmark = pytest.mark.timeout(900)  # a spawned run has its own, shorter limit

STEPS = 6
STAGES = [
    "+stages.short={steps: 2, sequence_length: 64, attention: {pattern: full}}",
    "+stages.long={steps: 2, sequence_length: 128, attention: {pattern: full}, parallel: {context: 2}, "
    "model: {rope_scaling: {rope_type: yarn, factor: 2, original_max_position_embeddings: 64}}, "
    "data: {length_buckets: {512: 3}}}",
    "+stages.sparse={steps: 2, sequence_length: 128, parallel: {tensor: 2}, "
    "model: {rope_scaling: {rope_type: yarn, factor: 2, original_max_position_embeddings: 64}}}",
]
BACKENDS = [
    "gloo",
    pytest.param(
        "nccl",
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")],
    ),
]
STOPS = (1, 1, 1, 2, None)  # steps of each launch: within the first stage, at its end, within the second and the third


def _config(data, folder, *overrides):
    ours = [f"data.path={data}", f"run.dir={folder}", f"train.steps={STEPS}", "checkpoint.keep_last=1"]
    return compose([*SMALL, *ours, *STAGES, "attention.deterministic=true", *overrides])


def _digest(run):
    """Of this rank's weights, master weights and moments."""
    states = [value for values in run.optimizer.optimizer.state.values() for value in values.values()]
    masters = [p for group in run.optimizer.optimizer.param_groups for p in group["params"]]
    hashed = hashlib.sha256()
    for tensor in [*(p for chunk in run.chunks for p in chunk.parameters()), *masters, *states]:
        hashed.update(tensor.detach().double().cpu().numpy().tobytes())
    return hashed.hexdigest()


def _moments(run):
    """Sum of all second moments over the ranks, and the number of the optimizer's steps."""
    states = run.optimizer.optimizer.state.values()  # none before the first step
    totals = [None] * dist.get_world_size()
    dist.all_gather_object(totals, sum(float(state["exp_avg_sq"].double().sum()) for state in states))
    # Transformer Engine's Adam counts steps a group; torch's counts them a parameter, and its groups may keep old ones.
    counted = [kept for kept in states if "step" in kept] or run.optimizer.optimizer.param_groups
    return sum(totals), {int(kept["step"]) for kept in counted if "step" in kept}


class _StopAfter:
    """A signal that comes during the given step of a launch."""

    def __init__(self, steps):
        self.steps, self.asked = steps, 0

    @property
    def received(self):
        self.asked += 1
        return "SIGTERM" if self.steps is not None and self.asked >= self.steps else None


def _runs(rank, world_size, data, root):
    from megatron.core import parallel_state

    from moba_train.train import loop

    torch.set_num_threads(1)
    begun, saved, groups = {}, {}, []
    save, leave = loop.checkpoint.save, loop.leave_stage

    def noted_save(run):
        saved[run.folder.name, run.step] = (_digest(run), _moments(run))
        return save(run)

    def noted_begin(run):
        begun[run.folder.name, run.step] = (_digest(run), _moments(run), run.stage.name)

    def noted_leave():
        leave()
        groups.append(len(dist.distributed_c10d._world.pg_map))

    with (
        mock.patch.object(loop, "close"),
        mock.patch.object(loop, "leave_stage", noted_leave),
        mock.patch.object(loop.checkpoint, "save", noted_save),
        mock.patch.object(loop, "resolve_dense_layers", noted_begin),
    ):
        load = f"checkpoint.load={root / 'straight' / 'checkpoints' / 'step_00000004'}"
        for name, stops, *more in (("straight", (None,)), ("stopped", STOPS), ("from_long", (None,), load)):
            for steps in stops:
                with mock.patch.object(loop, "_StopSignal", lambda steps=steps: _StopAfter(steps)):
                    assert loop.pretrain(_config(data, root / name, *more)) == 0
                parallel_state.destroy_model_parallel()
    return begun, saved, groups


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def root(tmp_path_factory, backend):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def data(root):
    return corpus(root / "data")


@pytest.fixture(scope="module")
def found(root, data, backend):
    return run_distributed(_runs, 2, data, root, timeout=240, backend=backend)


def _steps(folder):
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    return [[record[key] for key in kept] for record in read_metrics(folder) if "loss" in record]


def test_a_run_stopped_anywhere_equals_the_straight_one(found, root):
    straight = _steps(root / "straight")
    assert [step for step, *_ in straight] == list(range(1, STEPS + 1))
    assert _steps(root / "stopped") == straight
    for begun, saved, _ in found:
        assert saved["stopped", STEPS] == saved["straight", STEPS]
        for (name, step), (digest, _, _) in begun.items():
            if name == "stopped" and step not in (0, 2, 4):  # within a stage; between stages layouts differ
                assert digest == saved[name, step][0]


def test_what_stages_ended_with_is_kept_and_can_be_gone_on_from(found, root):
    saved = checkpoint_folder.complete_checkpoints(root / "straight" / "checkpoints")
    assert [path.name for path in saved] == [f"step_{step:08d}" for step in (2, 4, 6)]  # keep_last=1
    assert _steps(root / "from_long") == _steps(root / "straight")[4:]


def test_every_stage_begins_with_weights_and_optimizer_of_the_one_before(found):
    begun, saved, _ = found[0]
    assert [stage for (name, _), (_, _, stage) in begun.items() if name == "straight"] == ["short", "long", "sparse"]
    # Two data ranks and two context ranks share the optimizer alike, so that nothing of it moves.
    assert begun["straight", 2][:2] == saved["straight", 2]
    moments, steps = begun["straight", 4][1]
    assert steps == {4}
    assert moments >= saved["straight", 4][1][0] * (1 - 1e-6)  # tensor ranks hold some of it twice


def test_records_say_stage_plan_and_tokens(found, root):
    records = read_metrics(root / "straight")
    told = [(r["step"], r["stage"], r["layer_plan"]) for r in records if "stage" in r]
    assert told == [
        (1, "short", "full*4"),
        (3, "long", "full*4"),
        (5, "sparse", "moba*1(16,3), full*1, moba*1(16,3), full*1"),
    ]
    assert [r["tokens"] for r in records if "loss" in r] == [512 * step for step in range(1, STEPS + 1)]
    assert [(r["step"], r["validation_length"]) for r in records if "validation_loss" in r] == [
        (2, 64),
        (4, 128),
        (6, 128),
    ]
    metadata = checkpoint_folder.read_metadata(checkpoint_folder.latest_checkpoint(root / "straight" / "checkpoints"))
    assert metadata.config["train"]["sequence_length"] == 128
    assert metadata.config["parallel"]["tensor"] == 2
    assert metadata.data == {"consumed_samples": 2 * 4}


def test_groups_of_finished_stages_are_given_up(found):
    for _, _, groups in found:
        assert groups[:2] == [1, 1]  # the world alone, after the first two stages of the straight run


def test_stages_that_would_not_continue_the_run_are_refused(found, root, data, monkeypatch):
    from moba_train.train.setup import preflight

    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = root / "stopped"
    moved = [f"train.steps={STEPS + 1}", "stages.long.steps=3"]
    with pytest.raises(ConfigError, match=r"its stages began at other steps.*in stage sparse"):
        preflight(_config(data, folder, *moved))
    shorter = ["train.steps=8", "stages.long.steps=6", "~stages.sparse"]
    assert preflight(_config(data, folder, "train.steps=9", "stages.sparse.steps=5")) == 2
    with pytest.raises(ConfigError, match=r"rows of this one are taken"):
        preflight(_config(data, folder, *shorter))
