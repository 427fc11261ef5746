"""Hugging Face -> core -> Hugging Face is the identity, bit by bit; memory stays at a shard and a layer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moba_train.config.schema import ConfigError
from moba_train.train import checkpoint_folder
from moba_train.train.convert import core_to_hf, hf_to_core
from tests.helpers.hf import FAMILIES, write_folder
from tests.helpers.spawn import run_distributed


def tensors_of(folder):
    """File -> its tensors."""
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[file][name].dtype == tensor.dtype, name
            assert torch.equal(found[file][name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A Qwen2 in bf16 and several shards, with files to carry."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    write_folder(folder, "qwen2", torch.bfloat16, shard="9KB", tie_word_embeddings=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("yours")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_of_every_family(family, dtype, tmp_path):
    kind, fields = FAMILIES[family]
    folder = write_folder(tmp_path / "hf", kind, dtype, **fields)
    done = hf_to_core(folder, tmp_path / "core")
    core_to_hf(tmp_path / "core", tmp_path / "back")
    assert_same_weights(tensors_of(tmp_path / "back"), tensors_of(folder))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert done.bytes == sum(t.nbytes for file in tensors_of(folder).values() for t in file.values())
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()


def test_shards_index_and_other_files_come_back(sharded, tmp_path):
    hf_to_core(sharded, tmp_path / "core")
    done = core_to_hf(tmp_path / "core", tmp_path / "back")
    assert len(tensors_of(sharded)) > 3
    assert_same_weights(tensors_of(tmp_path / "back"), tensors_of(sharded))
    assert set(done.files) == {file.name for file in sharded.iterdir()}
    index = "model.safetensors.index.json"
    theirs, ours = (json.loads((folder / index).read_text()) for folder in (sharded, tmp_path / "back"))
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"] == theirs["metadata"]


def test_a_second_copy_of_tied_embeddings_comes_back(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "hf")
    merged = {name: tensor for file in tensors_of(folder).values() for name, tensor in file.items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    merged["lm_head.weight"] = merged["model.embed_tokens.weight"].clone()
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    hf_to_core(folder, tmp_path / "core")
    core_to_hf(tmp_path / "core", tmp_path / "back")
    assert_same_weights(tensors_of(tmp_path / "back"), tensors_of(folder))


def test_the_moba_section_is_carried_as_the_plan(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "hf")
    layers = [{"kind": "moba", "block_size": 8, "top_k": 2}, {"kind": "full", "block_size": 8, "top_k": 2}]
    config = json.loads((folder / "config.json").read_text()) | {"moba": {"layers": layers}}
    (folder / "config.json").write_text(json.dumps(config))
    hf_to_core(folder, tmp_path / "core")
    step = tmp_path / "core" / "checkpoints" / "step_00000000"
    assert checkpoint_folder.read_metadata(step).plan == layers
    core_to_hf(tmp_path / "core", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    (folder / "config.json").write_text(json.dumps(config | {"moba": {"layers": layers[:1]}}))
    with pytest.raises(ConfigError, match="list of 2"):
        hf_to_core(folder, tmp_path / "other")


def test_what_lies_in_the_way_or_is_damaged_is_refused_and_nothing_is_left(sharded, tmp_path):
    hf_to_core(sharded, tmp_path / "core")
    with pytest.raises(ConfigError, match="is there already"):
        hf_to_core(sharded, tmp_path / "core")
    with pytest.raises(ConfigError, match="no checkpoint there"):
        core_to_hf(tmp_path, tmp_path / "back")
    victim = tmp_path / "core" / "checkpoints" / "step_00000000" / "__0_0.distcp"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ConfigError, match=r"__0_0\.distcp is not the file that was saved"):
        core_to_hf(tmp_path / "core", tmp_path / "back")
    mixed = shutil.copytree(sharded, tmp_path / "mixed")
    for file in sorted(mixed.glob("*.safetensors")):
        tensors = load_file(file)
        name = "model.layers.0.self_attn.k_proj.weight"
        save_file({key: t.float() if key == name else t for key, t in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="several dtypes"):
        hf_to_core(mixed, tmp_path / "never")
    assert {path.name for path in tmp_path.iterdir()} == {"core", "mixed"}


# Linux forgets a process's peak on request; before it, the imports' own peak would hide the conversion's.
def _peak(reset=False):
    """MiB of resident memory at their highest since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _measure(rank, world_size, small, large, out):
    for name, folder in (("small", small), ("large", large)):
        before = _peak(reset=True)
        hf_to_core(folder, out / f"{name}-core")
        into = _peak() - before
        before = _peak(reset=True)
        core_to_hf(out / f"{name}-core", out / f"{name}-back")
    return into, _peak() - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux alone")
def test_peak_memory_is_about_a_shard_and_a_layer(sharded, tmp_path):
    """MiB above what was in use before, of a model of 16 shards and layers of 12 MiB: 53 were measured."""
    layers, width, ffn = 16, 512, 3584
    fields = {
        **{"model_type": "llama", "vocab_size": 64, "hidden_size": width, "intermediate_size": ffn},
        **{"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8},
        **{"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    }
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(fields))
    weight_map = {}
    for at in range(layers):
        name = f"model.layers.{at}."
        shard = {f"{name}self_attn.{x}_proj.weight": torch.zeros(width, width, dtype=torch.bfloat16) for x in "qkvo"}
        shard |= {f"{name}mlp.{x}_proj.weight": torch.zeros(ffn, width, dtype=torch.bfloat16) for x in ("gate", "up")}
        shard[f"{name}mlp.down_proj.weight"] = torch.zeros(width, ffn, dtype=torch.bfloat16)
        shard |= {f"{name}{x}_layernorm.weight": torch.ones(width) for x in ("input", "post_attention")}
        if at == 0:
            shard |= {"model.embed_tokens.weight": torch.zeros(64, width), "model.norm.weight": torch.ones(width)}
        file = f"model-{at + 1:05d}-of-{layers:05d}.safetensors"
        save_file(shard, large / file)
        weight_map |= dict.fromkeys(shard, file)
    (large / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    total = sum(file.stat().st_size for file in large.glob("*.safetensors")) / 2**20
    assert total > 190
    (peaks,) = run_distributed(_measure, 1, sharded, large, tmp_path)  # a process of its own
    assert 12 < max(peaks) < 6 * 12, f"{peaks} of {total} MiB"
    assert_same_weights(tensors_of(tmp_path / "large-back"), tensors_of(large))
