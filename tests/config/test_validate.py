"""Nonsense is refused by key, value and remedy, before anything is built."""

import pytest

from moba_train.config.compose import compose, group_options
from moba_train.config.schema import ConfigError, ParallelConfig, RunConfig
from moba_train.config.validate import (
    data_parallel_size,
    min_world_size,
    padded_length,
    padded_vocab_size,
    validate,
)


@pytest.mark.parametrize("recipe", group_options("recipe"))
def test_every_recipe_is_valid_at_its_smallest_size_and_at_four_times_that(recipe):
    config = compose([f"recipe={recipe}"])
    smallest = min_world_size(config)
    validate(config, smallest)
    if config.train.global_batch_size % 4 == 0:
        validate(config, 4 * smallest)


@pytest.mark.parametrize(
    "overrides, world_size, key, remedy",
    [
        (["precision=fp17"], 1, "precision", "bf16"),
        (["precision=fp8"], 1, "precision", "transformer_engine"),
        (["model.transformer_impl=transformer_engine"], 1, "model.transformer_impl", "gpu"),
        (["parallel.tensor=3"], 3, "model.num_attention_heads", "parallel.tensor=3"),
        (["parallel.tensor=4"], 4, "model.num_key_value_heads", "parallel.tensor=4"),
        (["model.num_key_value_heads=3"], 1, "model.num_attention_heads", "num_key_value_heads"),
        (["model.head_dim=33"], 1, "model.head_dim", "even"),
        (["model.max_position_embeddings=0"], 1, "model.max_position_embeddings", "at least 1"),
        (["model.num_layers=1e30"], 1, "model.num_layers", "at most 10,000"),
        (["train.steps=1e12"], 1, "train.steps", "at most"),
        (["wandb.project=a/b"], 1, "wandb.project", "without /"),
        ([], 0, "world_size", "positive multiple"),
        (["train.sequence_length=0", "parallel.context=2"], 2, "train.sequence_length", "at least 1"),
        (
            ["train.sequence_length=1021", "parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"],
            4,
            None,
            "",
        ),
        (["parallel.sequence=true"], 1, "parallel.sequence", "parallel.tensor > 1"),
        (["parallel.tensor=2"], 3, "world_size", "multiple"),
        (["parallel.context=4"], 2, "world_size", "= 4"),
        (["train.global_batch_size=6"], 4, "train.global_batch_size", "8"),
        (["parallel.pipeline=3"], 3, "model.num_layers", "3"),
        (["parallel.virtual_pipeline=2"], 1, "parallel.virtual_pipeline", "pipeline > 1"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch_size=3"],
            2,
            "train.global_batch_size",
            "2",
        ),
        (["attention.top_k=0"], 1, "attention.top_k", "at least 1"),
        (["attention.block_size=0"], 1, "attention.block_size", "at least 1"),
        (["attention.dense_last_layers=5"], 1, "attention.dense_last_layers", "4 layers"),
        (["attention.dense_last_layers=-1"], 1, "attention.dense_last_layers", "0 to 4 layers, or auto"),
        (["attention.dense_last_layers=most"], 1, "attention.dense_last_layers", "auto"),
        (["attention.dense_last_layers=auto"], 1, None, ""),
        (["attention.dense_last_layers=auto", "attention.dense_target=1.5"], 1, "attention.dense_target", "(0, 1]"),
        (
            ["attention.dense_last_layers=auto", "attention.overrides=[{layers: [0], top_k: 2}]"],
            1,
            "attention.dense_last_layers",
            "attention.overrides",
        ),
        (["attention.dense_target=0.5"], 1, "attention.dense_target", "dense_last_layers=auto"),
        (["metrics.gate_every=-1"], 1, "metrics.gate_every", "at least 0"),
        (["metrics.gate_every=0", "metrics.gate_per_head=true"], 1, "metrics.gate_per_head", "gate_every"),
        (["attention.dense_first_layers=-1"], 1, "attention.dense_first_layers", "at least 0"),
        (["attention.key_conv=-1"], 1, "attention.key_conv", "at least 0"),
        (["attention.backend=cuda"], 1, "attention.backend", "triton"),
        (["parallel.gather_heads=3"], 1, "parallel.gather_heads", "1 to 2"),
        (["parallel.context=4", "parallel.context_inner=3"], 4, "parallel.context_inner", "proper divisor"),
        (["parallel.context=2", "parallel.context_inner=2"], 2, "parallel.context_inner", "context_strategy"),
        (
            ["parallel.context=4", "parallel.context_inner=2", "parallel.full_context_strategy=all_to_all"],
            4,
            "parallel.context_inner",
            "ring or all_gather",
        ),
        (
            ["parallel.context=4", "parallel.context_inner=2", "parallel.gather_heads=1"],
            4,
            "parallel.gather_heads",
            "leave it out",
        ),
        (["parallel.context=16", "parallel.context_inner=8"], 16, "parallel.context_inner", "divisor of the query"),
        (["parallel.gather_heads=1", "parallel.context_strategy=ring"], 1, "parallel.gather_heads", "all_gather"),
        (["optim.schedule=constant", "optim.decay_steps=5"], 1, "optim.decay_steps", "leave it out"),
        (["optim.schedule=wsd", "optim.decay_steps=90", "train.steps=98"], 1, "optim.decay_steps", "train.steps=98"),
        (["parallel.context_strategy=teleport"], 1, "parallel.context_strategy", "all_gather"),
        (["parallel.context_layout=spiral"], 1, "parallel.context_layout", "balanced"),
        (
            ["parallel.context=8", "parallel.context_strategy=all_to_all"],
            8,
            "parallel.context",
            "4 query and 2 key heads",
        ),
        (["optim.schedule=linear"], 1, "optim.schedule", "wsd"),
        (["optim.warmup_steps=240"], 1, "optim.warmup_steps", "240"),
        (["optim.min_learning_rate=1"], 1, "optim.min_learning_rate", "learning_rate"),
        (["optim.learning_rate=0"], 1, "optim.learning_rate", "positive"),
        (["train.seed=-1"], 1, "train.seed", "between"),
        (["optim.beta2=2"], 1, "optim.beta2", "[0, 1)"),
        (["model.rope_base=0"], 1, "model.rope_base", "positive"),
        (["train.steps=0"], 1, "train.steps", "at least 1"),
        (["checkpoint.keep_last=0"], 1, "checkpoint.keep_last", "at least 1"),
        (["checkpoint.load_weights_only=true"], 1, "checkpoint.load_weights_only", "checkpoint.load"),
        (["wandb.mode=shout"], 1, "wandb.mode", "offline"),
        (["sft.packing=none"], 1, "sft.packing", "sft.path"),
        (["sft.path=x"], 1, "data.path", "sft.path='x'"),
        (["data.path=null", "sft.path=x", "data.blend={a: 1}"], 1, "data.blend", "drop one"),
        (["data.path=null", "sft.path=x"], 1, "sft.tokenizer", "pretrained folder"),
        (["data.path=null", "sft.path=x", "sft.tokenizer=t", "data.mode=concatenated"], 1, "data.mode", "packed"),
        (["sft.overlong=cut"], 1, "sft.overlong", "truncate"),
        (["sft.packing=tight"], 1, "sft.packing", "first_fit_decreasing"),
        (["sft.loss_weighting=row"], 1, "sft.loss_weighting", "document"),
        (
            ["data.path=null", "sft.path=x", "sft.tokenizer=t", "sft.valid_fraction=1"],
            1,
            "sft.valid_fraction",
            "0 and 1",
        ),
        (
            ["data.path=null", "sft.path=x", "sft.tokenizer=t", "sft.valid_fraction=0.1", "sft.valid_path=y"],
            1,
            "sft.valid_fraction",
            "drop one",
        ),
    ],
)
def test_refusals(overrides, world_size, key, remedy):
    config = compose(["recipe=tiny", *overrides])
    if key is None:
        validate(config, world_size)
        return
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size)
    assert caught.value.key == key
    assert remedy in caught.value.remedy


def test_what_is_left_of_the_world_is_data_parallel():
    config = compose(["recipe=128k"])
    assert min_world_size(config) == 16
    assert data_parallel_size(config, 64) == 4


@pytest.mark.parametrize(
    "layout, lengths",
    [
        ({}, {1: 1, 1021: 1021}),
        ({"context": 2}, {1: 4, 1021: 1024, 1024: 1024, 1025: 1028}),
        ({"context": 3, "context_layout": "contiguous"}, {7: 12}),
        ({"context": 2, "tensor": 8}, {1021: 1024}),  # whole rows on every tensor rank
        ({"tensor": 8, "sequence": True}, {1024: 1024, 1025: 1032}),
        ({"tensor": 3, "context": 2, "sequence": True}, {12: 12, 13: 24, 16: 24}),
        ({"tensor": 4, "context": 2, "sequence": True}, {9: 16, 16: 16}),
        ({"precision": "fp8"}, {1021: 1024, 1025: 1040}),
        ({"precision": "fp8", "context": 3, "tensor": 2, "sequence": True}, {1: 96, 97: 192}),
    ],
    ids=str,
)
def test_rows_are_padded_to_divide(layout, lengths):
    layout = dict(layout)
    precision = layout.pop("precision", "bf16")
    for length, padded in lengths.items():
        assert padded_length(length, RunConfig(precision=precision, parallel=ParallelConfig(**layout))) == padded


@pytest.mark.parametrize(
    "key, overrides",
    [
        ("model.hidden_size", ["model.hidden_size=136"]),
        ("model.ffn_hidden_size", ["model.ffn_hidden_size=376", "parallel.tensor=2"]),
        (
            "model.num_attention_heads",
            ["model.num_attention_heads=3", "model.num_key_value_heads=3", "model.head_dim=8"],
        ),
        (
            "model.num_key_value_heads",
            ["model.num_attention_heads=4", "model.num_key_value_heads=1", "model.head_dim=4"],
        ),
    ],
)
def test_fp8_refuses_widths_that_it_cannot_multiply(as_if_transformer_engine, key, overrides):
    fp8 = ["recipe=tiny", "model.transformer_impl=transformer_engine", "precision=fp8"]
    validate(compose(fp8), 1)
    with pytest.raises(ConfigError) as caught:
        validate(compose([*fp8, *overrides]), 2)
    assert caught.value.key == key
    assert "16" in caught.value.remedy


def test_the_vocabulary_is_padded_to_divide():
    assert [padded_vocab_size(49152, size) for size in (1, 2, 8)] == [49152] * 3
    assert [padded_vocab_size(128257, size) for size in (1, 2, 8)] == [128257, 128258, 128264]
    validate(compose(["recipe=tiny", "model.vocab_size=4097", "parallel.tensor=2"]), 2)
