"""Stopped at any step, a run resumes bit by bit; saved in one layout, it loads in another; damage is named."""

import json
import multiprocessing
import shutil

import pytest

from moba_train.config.schema import ConfigError
from moba_train.data.validate import content_hash
from moba_train.train import checkpoint_folder
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import GRAD_NORM_RTOL, LOSS_RTOL
from tests.helpers.training import corpus, losses, small_config

TWO_RANKS = {
    "data": ["parallel.overlap_grad_reduce=true"],
    "tensor": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "context, bf16, attention switched": [
        "parallel.context=2",
        "precision=bf16",
        "attention.schedule=[{step: 2, pattern: full}]",
    ],
}
STOP, STEPS = 3, 6

pytestmark = pytest.mark.timeout(900)  # a spawned run has its own, shorter limit


def _straight_and_stopped(rank, world_size, data, root, layouts):
    """Per layout: the curve in one go, and that of a run stopped at STOP."""
    return {
        name: (
            losses(small_config(data, root / f"{name}-straight", *overrides), STEPS),
            losses(small_config(data, root / name, *overrides), STOP, save=True),
        )
        for name, overrides in layouts.items()
    }


def _resumed(rank, world_size, data, root, layouts):
    return {
        name: losses(small_config(data, root / name, *overrides), STEPS - STOP) for name, overrides in layouts.items()
    }


def _curves(world_size, data, root, layouts):
    """Per layout (straight, stopped then resumed in new processes)."""
    before = run_distributed(_straight_and_stopped, world_size, data, root, layouts, timeout=240)[0]
    after = run_distributed(_resumed, world_size, data, root, layouts, timeout=240)[0]
    return {name: (straight, stopped + after[name]) for name, (straight, stopped) in before.items()}


def _resume_elsewhere(rank, world_size, data, root, starts):
    """Per name: the curve that goes on from a run's checkpoint under these overrides."""
    return {
        name: losses(
            small_config(data, root / f"elsewhere-{name}", f"checkpoint.load={start}", *overrides), STEPS - STOP
        )
        for name, (start, overrides) in starts.items()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def data(root):
    return corpus(root / "data")


CONVOLVED = ["attention.key_conv=3"]


@pytest.fixture(scope="module")
def one_process(root, data):
    """By name, (straight, resumed) curves of one process; its checkpoint of step STOP stays in root/(name)."""
    return _curves(1, data, root, {"one": [], "convolved": CONVOLVED})


@pytest.mark.parametrize("name", ["one", "convolved"])
def test_one_process_resumes_bit_identically(one_process, name):
    straight, resumed = one_process[name]
    assert resumed == straight


@pytest.fixture(scope="module")
def two_ranks(root, data):
    return _curves(2, data, root, TWO_RANKS)


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_resume_bit_identically(two_ranks, layout):
    straight, resumed = two_ranks[layout]
    assert resumed == straight


LAYOUTS = {
    "one, data": [],
    "one, tensor": ["parallel.tensor=2"],
    "one, pipeline": ["parallel.pipeline=2"],
    "one, context": ["parallel.context=2"],
    "convolved, tensor": [*CONVOLVED, "parallel.tensor=2"],
}
WEIGHTS = {
    "one, weights": ["checkpoint.load_weights_only=true"],
    "one, weights, convolution": ["checkpoint.load_weights_only=true", *CONVOLVED],
}


@pytest.fixture(scope="module")
def elsewhere(root, data, one_process):
    """Curves of two ranks that start from one process's checkpoints, by layout."""
    starts = {name: (root / name.partition(",")[0], overrides) for name, overrides in (LAYOUTS | WEIGHTS).items()}
    return run_distributed(_resume_elsewhere, 2, data, root, starts, timeout=240)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_by_one_loaded_by_two(one_process, elsewhere, layout):
    straight, _ = one_process[layout.partition(",")[0]]
    _assert_same(elsewhere[layout], straight[STOP:])


def test_saved_by_two_loaded_by_one(root, data, two_ranks):
    starts = {f"from {layout}": (root / layout, []) for layout in ("tensor", "pipeline")}
    for name, found in run_distributed(_resume_elsewhere, 1, data, root, starts)[0].items():
        _assert_same(found, two_ranks[name.removeprefix("from ")][0][STOP:])


def _assert_same(curve, expected):
    for (loss, norm), (expected_loss, expected_norm) in zip(curve, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=LOSS_RTOL)
        assert norm == pytest.approx(expected_norm, rel=GRAD_NORM_RTOL)


class TestDamage:
    """What `check` refuses before a process group exists, and the checksum finds after."""

    @pytest.fixture
    def copy(self, root, one_process, tmp_path):
        shutil.copytree(root / "one" / "checkpoints", tmp_path / "checkpoints")
        return tmp_path / "checkpoints" / f"step_{STOP:08d}"

    def config(self, data, copy, *overrides):
        return small_config(data, copy.parent.parent, *overrides)

    def test_an_intact_one_passes_and_remembers(self, data, copy):
        checkpoint_folder.check(self.config(data, copy))
        metadata = checkpoint_folder.read_metadata(copy)
        assert metadata.step == STOP
        assert metadata.data == {"consumed_samples": STOP * 4}
        assert [layer["kind"] for layer in metadata.plan] == ["moba", "full", "moba", "full"]
        assert metadata.config["attention"]["block_size"] == 16

    def test_a_truncated_file_is_named(self, data, copy):
        victim = max(copy.glob("*.distcp"), key=lambda file: file.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:-1])
        with pytest.raises(ConfigError, match=victim.name):
            checkpoint_folder.check(self.config(data, copy))

    def test_a_missing_file_is_named(self, data, copy):
        (copy / "common.pt").unlink()
        with pytest.raises(ConfigError, match=r"common\.pt"):
            checkpoint_folder.check(self.config(data, copy))

    def test_broken_metadata_is_named(self, data, copy):
        (copy / "moba_train.json").write_text("{")
        with pytest.raises(ConfigError, match=r"moba_train\.json"):
            checkpoint_folder.check(self.config(data, copy))

    def test_an_altered_byte_is_found_by_checksum(self, data, copy):
        victim = max(copy.glob("*.distcp"), key=lambda file: file.stat().st_size)
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        with pytest.raises(AssertionError, match=f"{victim.name} is not the file that was saved"):
            run_distributed(_load_damaged, 1, self.config(data, copy))

    def test_another_model_shape_is_refused_by_key(self, data, copy):
        with pytest.raises(ConfigError) as caught:
            checkpoint_folder.check(self.config(data, copy, "model.ffn_hidden_size=128"))
        assert caught.value.key == "model.ffn_hidden_size"

    def test_a_folder_without_checkpoint_is_refused(self, data, tmp_path):
        with pytest.raises(ConfigError, match="no checkpoint there"):
            checkpoint_folder.check(small_config(data, tmp_path, f"checkpoint.load={tmp_path}"))

    def test_a_marker_that_points_nowhere_is_named(self, data, copy):
        (copy.parent / "latest").write_text("step_00000099")
        with pytest.raises(ConfigError, match="step_00000099"):
            checkpoint_folder.check(self.config(data, copy))


def _load_damaged(rank, world_size, config):
    losses(config, 0)


def _save_often(rank, world_size, data, root):
    for _ in range(3):
        losses(small_config(data, root / "kept", "checkpoint.keep_last=2"), 1, save=True)
    losses(small_config(data, root / "over"), 3, save=True)
    losses(small_config(data, root / "over", "checkpoint.resume=false", "checkpoint.keep_last=1"), 1, save=True)
    assert multiprocessing.active_children() == []  # nothing is left running between saves


@pytest.fixture(scope="module")
def saved_often(root, data):
    run_distributed(_save_often, 1, data, root)
    return root


def test_only_the_last_checkpoints_are_kept_and_latest_is_the_newest(saved_often):
    folder = saved_often / "kept" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002", "step_00000003"]
    assert (folder / "latest").read_text() == "step_00000003"
    assert json.loads((folder / "step_00000003" / "moba_train.json").read_text())["tokens"] == 3 * 4 * 128


def test_a_run_started_over_keeps_the_checkpoint_it_just_wrote(saved_often):
    folder = saved_often / "over" / "checkpoints"
    assert (folder / "latest").read_text() == "step_00000001"
    assert {"step_00000001", "step_00000003"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("override", ["train.global_batch_size=8", "parallel.distributed_optimizer=false"])
def test_what_the_optimizer_and_data_position_depend_on_may_not_change(root, data, one_process, override):
    with pytest.raises(ConfigError) as caught:
        checkpoint_folder.check(small_config(data, root / "one", override))
    assert caught.value.key == override.partition("=")[0]
    checkpoint_folder.check(
        small_config(
            data, root / "new", f"checkpoint.load={root / 'one'}", "checkpoint.load_weights_only=true", override
        )
    )


def test_a_run_resumes_on_what_it_began_with_alone(root, data, one_process):
    content = content_hash(small_config(data, root / "one").data)
    assert checkpoint_folder.read_metadata(root / "one" / "checkpoints" / f"step_{STOP:08d}").content == content
    checkpoint_folder.check_content(small_config(data, root / "one"), content)
    with pytest.raises(ConfigError, match=r"data\.path=.* is not what it was at the checkpoint"):
        checkpoint_folder.check_content(small_config(data, root / "one"), "another")
    with pytest.raises(ConfigError, match=r"data\.seed=7: .* in the order of data\.seed=1234"):
        checkpoint_folder.check_content(small_config(data, root / "one", "data.seed=7"), content)
    elsewhere = small_config(data, root / "new", f"checkpoint.load={root / 'one'}", "data.seed=7")
    checkpoint_folder.check_content(elsewhere, "another")


@pytest.mark.parametrize("start, width", [("one", 3), ("convolved", 4), ("convolved", 0)])
def test_key_convolutions_are_neither_dropped_nor_begun_by_accident(root, data, one_process, start, width):
    load = [f"checkpoint.load={root / start}", f"attention.key_conv={width}"]
    with pytest.raises(ConfigError) as caught:
        checkpoint_folder.check(small_config(data, root / "new", *load))
    assert caught.value.key == "attention.key_conv"
    weights_only = small_config(data, root / "new", *load, "checkpoint.load_weights_only=true")
    if start == "one":
        checkpoint_folder.check(weights_only)
    else:
        with pytest.raises(ConfigError, match="trained with 3"):
            checkpoint_folder.check(weights_only)


def test_a_checkpoint_without_key_convolutions_starts_them_as_the_identity(elsewhere):
    without, convolved = elsewhere["one, weights"], elsewhere["one, weights, convolution"]
    assert convolved[0][0] == without[0][0]
    assert convolved[1][0] != without[1][0]
