"""Training from a Hugging Face folder, directly or converted first, in any layout; resumed; and out again."""

import json
import shutil

import pytest
import torch

from moba_train.config.compose import compose
from moba_train.config.schema import ConfigError
from moba_train.train import checkpoint_folder
from moba_train.train.convert import core_to_hf, hf_to_core
from moba_train.train.hf_start import check_hf_start
from tests.helpers.hf import hf_logits, write_folder
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import LOSS_RTOL, assert_close
from tests.helpers.training import SMALL, corpus, log_messages, losses, shape_overrides

pytestmark = pytest.mark.timeout(900)  # a spawned run has its own, shorter limit

# The model comes from the folder; with YaRN on top, as a run that stretches the context has it.
RECIPE = [override for override in SMALL if not override.startswith("model.")]
YARN = [
    "model.rope_scaling.rope_type=yarn",
    "model.rope_scaling.factor=4.0",
    "model.rope_scaling.original_max_position_embeddings=32",
]
DYNAMIC = ["model.rope_scaling.rope_type=dynamic", "model.rope_scaling.factor=4.0"]
TWO_RANKS = {
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
    "context": ["parallel.context=2"],
}
TOKENS = torch.arange(64) * 31 % 380


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def data(root):
    return corpus(root / "data")


@pytest.fixture(scope="module")
def folder(root, data):
    """A Qwen2 with the tokenizer of the data; its vocabulary is larger, and odd: padded by two tensor ranks."""
    path = write_folder(root / "hf", "qwen2", vocab_size=513, max_position_embeddings=32, tie_word_embeddings=True)
    for file in (data / "tokenizer").iterdir():
        shutil.copyfile(file, path / file.name)
    return path


def config_of(data, run, *overrides):
    return compose([*RECIPE, f"data.path={data}", f"run.dir={run}", *overrides])


def _starts(rank, world_size, data, root, folder, layouts):
    """Losses from the folder, and from the converted checkpoint, by layout."""
    found = {}
    for name, overrides in layouts.items():
        direct = config_of(data, root / f"direct-{name}", f"checkpoint.init_from_hf={folder}", *YARN, *overrides)
        load = [f"checkpoint.load={root / 'core'}", "checkpoint.load_weights_only=true"]
        shape = shape_overrides(direct.model)
        converted = config_of(data, root / f"core-{name}", *load, *shape, *YARN, *overrides)
        found[name] = (losses(direct, 2, save=True), losses(converted, 2))
    return found


def _in_one_process(rank, world_size, data, root, folder, tokens):
    """Everything that takes one process: its curves, a run that goes on without the folder, one from scratch, and the
    logits of the runs of all layouts."""
    found = _starts(rank, world_size, data, root, folder, {"one": []})
    shape = shape_overrides(config_of(data, root, f"checkpoint.init_from_hf={folder}").model)
    shutil.copytree(root / "direct-one", root / "goes-on")
    found["goes on"] = losses(config_of(data, root / "goes-on", f"checkpoint.init_from_hf={root / 'gone'}", *YARN), 1)
    found["straight"] = losses(config_of(data, root / "straight", f"checkpoint.init_from_hf={folder}", *YARN), 3)
    losses(compose([*SMALL, f"data.path={data}", f"run.dir={root / 'scratch'}"]), 0, save=True)
    found["said"] = {}
    for name, overrides in {"stretched": [], "same": YARN, "epsilon": [*YARN, "model.norm_epsilon=1e-3"]}.items():
        load = [f"checkpoint.load={root / 'direct-one'}", "checkpoint.load_weights_only=true"]
        found["said"][name] = _said(config_of(data, root / f"said-{name}", *load, *shape, *overrides))
    found["logits"] = {}
    dynamic = config_of(data, root / "direct-dynamic", f"checkpoint.init_from_hf={folder}", *DYNAMIC)
    losses(dynamic, 2, save=True)
    for name, rope in {"one": YARN, "tensor": YARN, "pipeline": YARN, "dynamic": DYNAMIC}.items():
        load = [f"checkpoint.load={root / f'direct-{name}'}", "checkpoint.load_weights_only=true"]
        found["logits"][name] = _core_logits(config_of(data, root / f"logits-{name}", *load, *shape, *rope), tokens)
    return found


def _said(config):
    """What the log has while a run is set up."""
    with log_messages() as messages:
        losses(config, 0)
    return messages


def _core_logits(config, tokens):
    """[T, V] of one document by the run's own model with full attention, from its checkpoint."""
    from megatron.core import parallel_state

    from moba_train.attention import SequenceInfo
    from moba_train.model.core_attention import RowParams, set_layer_plan
    from moba_train.model.layer_plan import layer_plan
    from moba_train.model.rope import rotary_table
    from moba_train.train.setup import setup

    run = setup(config)
    full = compose(["recipe=tiny", "attention=full"]).attention
    set_layer_plan(run.chunks, layer_plan(full, config.model.num_layers))
    positions = torch.arange(len(tokens))
    rotary = rotary_table(positions, run.frequencies)
    params = RowParams(qkv_format="thd", sequence=SequenceInfo([0, len(tokens)]), rotary=rotary)
    with torch.no_grad():
        logits = run.chunks[0](tokens[None], positions[None], None, packed_seq_params=params)[0].clone()
    parallel_state.destroy_model_parallel()
    return logits


@pytest.fixture(scope="module")
def started(root, data, folder):
    """Curves by layout; runs stay in root/direct-<layout>, with a checkpoint of step 2. And what one process adds."""
    hf_to_core(folder, root / "core")
    two = run_distributed(_starts, 2, data, root, folder, TWO_RANKS)[0]
    return two | run_distributed(_in_one_process, 1, data, root, folder, TOKENS)[0]


def test_every_layout_starts_from_the_same_weights_directly_or_converted(started):
    expected = [loss for loss, _ in started["one"][0]]
    for layout in ("one", *TWO_RANKS):
        for curve in started[layout]:
            assert [loss for loss, _ in curve] == pytest.approx(expected, rel=LOSS_RTOL), layout


def test_a_run_goes_on_from_its_own_checkpoint_without_the_folder(started):
    assert started["straight"] == started["one"][0] + started["goes on"]


@pytest.mark.parametrize("layout", ["one", "tensor", "pipeline"])
def test_a_trained_run_is_exported_and_is_the_same_model_in_transformers(layout, started, root):
    run, back = root / f"direct-{layout}", root / f"back-{layout}"
    core_to_hf(run, back)
    config = json.loads((back / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["max_position_embeddings"] == 128  # trained at that
    assert [layer["kind"] for layer in config["moba"]["layers"]] == ["moba", "full"]
    assert (back / "tokenizer.json").is_file()
    assert "yarn" in checkpoint_folder.read_metadata(run / "checkpoints" / "step_00000002").rope
    assert_close(started["logits"][layout], hf_logits(back, TOKENS, [len(TOKENS)]), torch.float32)


def test_a_run_with_dynamic_scaling_is_exported_with_the_base_that_it_trained_with(started, root):
    core_to_hf(root / "direct-dynamic", root / "back-dynamic")
    rope = json.loads((root / "back-dynamic" / "config.json").read_text())["rope_parameters"]
    assert rope["rope_type"] == "default"
    assert rope["rope_theta"] > 10000
    assert_close(started["logits"]["dynamic"], hf_logits(root / "back-dynamic", TOKENS, [len(TOKENS)]), torch.float32)


def test_another_rotary_embedding_or_norm_than_the_checkpoints_is_said(started):
    stretched, same, epsilon = (
        [line for line in started["said"][name] if "the checkpoint" in line]
        for name in ("stretched", "same", "epsilon")
    )
    assert ["rotary embedding was another: yarn, base 10000" in line for line in stretched] == [True]
    assert same == []
    assert ["model.norm_epsilon was 1e-05" in line for line in epsilon] == [True]


def test_a_run_from_scratch_is_exported_with_the_tokenizer_of_its_data(started, root, data, tmp_path):
    done = core_to_hf(root / "scratch", tmp_path / "hf", max_shard_bytes=30_000)
    assert str(data) in done.notes[0]
    assert "model.safetensors.index.json" in done.files
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (values["model_type"], values["eos_token_id"]) == ("llama", 0)
    assert hf_logits(tmp_path / "hf", torch.arange(9), [9]).shape == (9, 512)


def test_chat_rows_have_the_folders_tokenizer_unless_another_is_named(root, data, folder, tmp_path):
    rows = ["data.path=null", "sft.path=chats.jsonl", f"checkpoint.init_from_hf={folder}"]
    assert config_of(data, tmp_path, *rows).sft.tokenizer == str(folder)
    assert config_of(data, tmp_path, *rows, "model=tiny").sft.tokenizer == str(folder)
    named = f"sft.tokenizer={data / 'tokenizer'}"
    assert config_of(data, tmp_path, *rows, named).sft.tokenizer == str(data / "tokenizer")
    assert config_of(data, tmp_path, f"checkpoint.init_from_hf={folder}").sft.tokenizer is None
    kept = shutil.copytree(folder, tmp_path / "run" / "hf")
    gone = config_of(data, tmp_path / "run", *rows[:2], f"checkpoint.init_from_hf={tmp_path / 'gone'}")
    assert gone.sft.tokenizer == str(kept)


def test_what_does_not_fit_is_refused_before_the_launch(started, root, data, folder, tmp_path):
    start = f"checkpoint.init_from_hf={folder}"

    def refusal(check, *overrides):
        with pytest.raises(ConfigError) as caught:
            check(config_of(data, tmp_path / "run", *overrides))
        return caught.value

    assert refusal(check_hf_start, start, "model.ffn_hidden_size=64").key == "model.ffn_hidden_size"
    assert refusal(check_hf_start, start, "model=tiny").key.startswith("model.")
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    assert "prepare_data.py --tokenizer" in str(refusal(check_hf_start, f"checkpoint.init_from_hf={other}"))
    shape = shape_overrides(config_of(data, root, start).model)
    converted = f"checkpoint.load={root / 'core'}"
    assert refusal(checkpoint_folder.check, converted, *shape).key == "checkpoint.load_weights_only"
    checkpoint_folder.check(config_of(data, tmp_path / "run", converted, "checkpoint.load_weights_only=true", *shape))
    trained = f"checkpoint.load={root / 'direct-one'}"
    assert refusal(checkpoint_folder.check, trained, "parallel.tensor=2", *shape, *YARN).key == "parallel.tensor"
