"""Stages of a run: what holds in each, and what is refused."""

import dataclasses

import pytest

from moba_train.config.compose import compose
from moba_train.config.schema import ConfigError, RopeScaling
from moba_train.config.stages import stages_of

BASE = ["recipe=tiny", "train.sequence_length=256", "train.global_batch_size=8", "train.steps=30", "data.path=a"]
SHORT = "+stages.short={steps: 10, sequence_length: 128}"
LONG = "+stages.long={steps: 20, sequence_length: 512%s}"


def stages(*overrides, more=""):
    return stages_of(compose([*BASE, SHORT, LONG % (more and f", {more}"), *overrides]))


def test_without_stages_a_run_is_one():
    config = compose(BASE)
    (stage,) = stages_of(config)
    assert (stage.config, stage.name, stage.start, stage.end) == (config, "", 0, 30)


def test_stages_follow_one_another_and_keep_the_tokens_of_a_step():
    short, long = stages()
    assert [(s.name, s.start, s.end) for s in (short, long)] == [("short", 0, 10), ("long", 10, 30)]
    trains = [(s.config.train.sequence_length, s.config.train.global_batch_size) for s in (short, long)]
    assert trains == [(128, 16), (512, 4)]
    assert {s.config.train.steps for s in (short, long)} == {30}  # one learning-rate schedule
    assert short.config.data.seed != long.config.data.seed


def test_values_of_a_stage_lie_on_the_runs_and_rope_scaling_is_replaced_whole():
    ours = ["model.rope_scaling.rope_type=linear", "model.rope_scaling.factor=2"]
    more = (
        "model: {rope_scaling: {rope_type: yarn, factor: 4, original_max_position_embeddings: 128}}, "
        "attention: {pattern: full}, parallel: {context: 2, recompute: full}, data: {length_buckets: {512: 4}}"
    )
    short, long = (stage.config for stage in stages(*ours, more=more))
    assert short.model.rope_scaling == RopeScaling("linear", 2.0)
    assert long.model.rope_scaling == RopeScaling("yarn", 4.0, 128)
    assert (short.attention.pattern, long.attention.pattern) == ("moba", "full")
    assert long.attention.block_size == short.attention.block_size
    assert (long.parallel.context, long.parallel.recompute, long.data.length_buckets) == (2, "full", {"512": 4})
    assert (long.data.path, short.data.length_buckets) == ("a", None)
    assert dataclasses.replace(long.model, rope_scaling=short.model.rope_scaling) == short.model


def test_a_blend_of_a_stage_stands_for_the_path_of_the_run():
    _, long = stages(more="data: {blend: {b: 1, c: 2}}")
    assert (long.config.data.path, long.config.data.blend) == (None, {"b": 1.0, "c": 2.0})


def test_stages_can_be_changed_and_left_out_by_name():
    (long,) = stages("~stages.short", "stages.long.steps=30")
    assert (long.start, long.end) == (0, 30)


@pytest.mark.parametrize(
    "overrides, more, said",
    [
        (["train.steps=31"], "", "train.steps=31: the stages have 30 steps"),
        (["stages.long.sequence_length=64"], "", r"stages\.long\.sequence_length=64: must be at least 128"),
        (["stages.long.sequence_length=300"], "", "must divide the tokens of a step.* = 2048.* 4 would"),
        (["stages.short.steps=0"], "", r"stages\.short\.steps=0"),
        (["+stages.long.global_batch_size=3"], "", r"stages\.long\.global_batch_size=3: no such key"),
        ([], "optim: {learning_rate: 1}", r"stages\.long\.optim=.*no such key"),
        ([], "model: {hidden_size: 64}", r"stages\.long\.model\.hidden_size=64: cannot differ between stages"),
        ([], "model: {rope_scaling: {kind: yarn}}", r"stages\.long\.model\.rope_scaling\.kind='yarn': no such key"),
        ([], "attention: {key_conv: 3}", r"attention\.key_conv=3: cannot differ"),
        (
            [],
            "attention: {blok_size: 3}",
            r"stages\.long\.attention\.blok_size=3: no such key; did you mean .*block_size",
        ),
        ([], "attention: {dense_last_layers: auto}", r"stages\.long\.attention\.dense_last_layers='auto': .* a number"),
        ([], "parallel: {distributed_optimizer: false}", r"cannot differ between stages"),
        ([], "parallel: {context: two}", r"stages\.long\.parallel\.context='two': expects int"),
        (["attention.schedule=[{step: 3, top_k: 2}]"], "", r"attention\.schedule=1: every stage has attention"),
        (["attention.dense_last_layers=auto"], "", r"attention\.dense_last_layers='auto'"),
        (["sft.path=chats", "data.path=null"], "", r"sft\.path='chats'"),
        (["model.vocab_size=4097"], "parallel: {tensor: 2}", r"stages\.long\.parallel\.tensor=2: pads the vocabulary"),
    ],
)
def test_nonsense_is_refused(overrides, more, said):
    with pytest.raises(ConfigError, match=said):
        stages(*overrides, more=more)


def test_the_recipe_is_the_reports_schedule_after_llamas_own_128k():
    every = stages_of(compose(["recipe=extend_8k_to_1m"]))
    assert [stage.config.train.sequence_length // 1024 for stage in every] == [32, 128, 256, 512, 1024, 1024]
    assert {s.config.train.sequence_length * s.config.train.global_batch_size for s in every} == {8 * 2**20}
    assert [stage.config.model.rope_scaling.factor for stage in every] == [8.0, 8.0, 64.0, 64.0, 64.0, 64.0]
    assert {stage.config.model.rope_scaling.rope_type for stage in every} == {"llama3"}
    *full, moba = (stage.config.attention for stage in every)
    assert {attention.pattern for attention in full} == {"full"}
    assert (moba.pattern, moba.block_size, moba.top_k, moba.dense_last_layers) == ("moba", 4096, 12, 3)
    last = every[-1]
    assert (last.end - last.start) * 8 * 2**20 == pytest.approx(100e9, rel=0.01)
