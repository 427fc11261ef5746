"""What keeps a Hugging Face folder from being read is named: the field of config.json, the shard, the tensor."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moba_train.config.compose import compose
from moba_train.config.huggingface import parse_config
from moba_train.config.schema import ConfigError
from moba_train.model.hf_folder import load_hf_folder
from tests.helpers.hf import SHAPE, write_folder

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A Llama in several shards with an index."""
    return write_folder(tmp_path_factory.mktemp("hf") / "model", "llama", shard="20KB")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def shard_of(folder, name):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit(folder, name, change):
    """Rewrite the shard of `name` with `change` applied to its tensors."""
    file = shard_of(folder, name)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file.name


def refusal(folder):
    with pytest.raises(ConfigError) as caught:
        load_hf_folder(folder, "SRC")
    return str(caught.value)


def test_a_whole_one_is_read(folder):
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, tensors = load_hf_folder(folder)
    assert (model.num_layers, model.head_dim, model.tie_embeddings) == (2, 8, False)
    assert tensors.read("model.norm.weight").shape == (32,)


def test_a_truncated_shard_is_named(folder):
    file = shard_of(folder, "model.norm.weight")
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file.name} ({file.stat().st_size} bytes) is truncated" in refusal(folder)


def test_a_missing_shard_is_named(folder):
    file = shard_of(folder, "model.norm.weight")
    file.unlink()
    assert f"the shard {file.name} is missing" in refusal(folder)


def test_a_tensor_missing_from_its_shard_is_named(folder):
    file = edit(folder, "model.norm.weight", lambda tensors: tensors.pop("model.norm.weight"))
    assert f"{file} lacks the tensor model.norm.weight" in refusal(folder)


def test_a_tensor_missing_altogether_is_named(folder):
    edit(folder, "model.norm.weight", lambda tensors: tensors.pop("model.norm.weight"))
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    del values["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(values))
    assert "the tensor model.norm.weight is missing" in refusal(folder)


def test_a_wrong_shape_is_named(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    file = edit(folder, name, lambda tensors: tensors.update({name: torch.zeros(47, 32)}))
    assert f"{name} in {file} is [47, 32], config.json asks for [48, 32]" in refusal(folder)


def test_a_tensor_too_many_is_named(folder):
    edit(folder, "model.norm.weight", lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    assert "holds the tensor model.extra.weight, but model.safetensors.index.json lacks it" in refusal(folder)
    (folder / "model.safetensors.index.json").unlink()
    merged = {}
    for file in sorted(folder.glob("*.safetensors")):
        merged |= load_file(file)
        file.unlink()
    save_file(merged, folder / "model.safetensors")
    assert "model.extra.weight has no place" in refusal(folder)


def test_rotary_tables_of_old_folders_are_left_out(folder):
    merged = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    for file in sorted(folder.glob("*.safetensors*")):
        merged |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    save_file(merged, folder / "model.safetensors")
    assert load_hf_folder(folder)[1].left_out == 1


def test_a_head_that_differs_from_tied_embeddings_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert "lm_head.weight differs" in refusal(folder)
    embeddings = load_file(shard_of(folder, "model.embed_tokens.weight"))["model.embed_tokens.weight"]
    edit(folder, "lm_head.weight", lambda tensors: tensors.update({"lm_head.weight": embeddings}))
    load_hf_folder(folder)


def test_pickled_weights_are_never_opened(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "pytorch_model.bin" in (text := refusal(folder))
    assert "nothing is ever unpickled" in text


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": {"a": "../b"}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}']
)
def test_a_damaged_index_or_config_is_named(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(folder)
    (folder / "config.json").write_text(content if "weight_map" not in content else "{")
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    "fields, key, said",
    [
        ({"model_type": "gpt2"}, "model_type", "llama (LlamaForCausalLM), mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures", "only LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias", "False"),
        ({"mlp_bias": True}, "mlp_bias", "False"),
        ({"hidden_act": "gelu"}, "hidden_act", "silu"),
        ({"attention_dropout": 0.1}, "attention_dropout", "0.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "1.0"),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map", "code of its own"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "quantised"),
        ({"hidden_size": None}, "hidden_size", "missing"),
        ({"num_attention_heads": 5}, "num_attention_heads", "head_dim"),
        ({"num_hidden_layers": "two"}, "num_layers", "int"),
        ({"rope_scaling": {"type": "ntk-aware"}}, "rope_scaling", "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "needs it"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}},
            "rope_scaling.mrope_section",
            "linear",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 1}},
            "rope_scaling",
            "keep",
        ),
        ({"model_type": ["llama"]}, "model_type", "not known"),
        ({"layer_types": 5}, "layer_types", "list"),
        ({"rope_parameters": "yarn"}, "rope_parameters", "group of fields"),
        ({"rope_theta": -5}, "rope_theta", "positive"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor", "1.0"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": 64}, "sliding_window", "null"),
        ({"model_type": "mistral", "architectures": None, "max_position_embeddings": 32768}, "sliding_window", "4096"),
        (
            {"model_type": "qwen2", "architectures": None, "use_sliding_window": True, "sliding_window": 64}
            | {"max_window_layers": 1},
            "sliding_window",
            "64",
        ),
        (
            {"model_type": "qwen3", "architectures": None, "layer_types": ["sliding_attention"] * 2},
            "layer_types",
            "slid",
        ),
        ({"model_type": "qwen3", "architectures": None, "attention_bias": True}, "attention_bias", "False"),
    ],
)
def test_what_is_not_built_here_is_refused_by_field(fields, key, said):
    with pytest.raises(ConfigError) as caught:
        parse_config({**LLAMA, **fields}, "m", "SRC")
    assert caught.value.key == f"SRC: {key}"
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mistral", "sliding_window": 128},  # as wide as the longest input
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen2", "sliding_window": 64},  # use_sliding_window is off
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        {
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 64,
            "layer_types": ["full_attention"] * 2,
        },
    ],
)
def test_windows_that_change_nothing_are_accepted(fields):
    parse_config({**LLAMA, "architectures": None, **fields}, "m", "SRC")


# config.json of the published models, the fields that matter.
PUBLISHED = {
    "llama3.1-8b": {
        **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-05},
        **{"max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False},
        "rope_scaling": {
            **{"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
            "original_max_position_embeddings": 8192,
        },
    },
    "llama3.2-1b": {
        **{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-05},
        **{"max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": True, "head_dim": 64},
        "rope_scaling": {
            **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-8b": {
        **{"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "rms_norm_eps": 1e-06},
        **{"max_position_embeddings": 40960, "rope_theta": 1000000, "tie_word_embeddings": False, "head_dim": 128},
        **{"rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 36},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_models_are_the_published_ones(name):
    assert parse_config(PUBLISHED[name], name, "SRC") == compose([f"model={name}"]).model
