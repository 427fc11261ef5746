"""FLOPs, parameters and memory: closed forms against counting one by one."""

import dataclasses

import pytest

from moba_train.config.compose import compose
from moba_train.config.schema import ModelConfig
from moba_train.context_parallel.memory import peak_bytes
from moba_train.model.layer_plan import LayerAttention, LayerKind
from moba_train.train.estimate import memory_gib, parameter_count
from moba_train.train.flops import attention_pairs, gate_pairs, matmul_flops_per_token, training_flops


def counted(layer: LayerAttention, length: int) -> tuple[int, int]:
    """(query-key pairs, query-block scores) by walking over the queries."""
    pairs = scores = 0
    for query in range(length):
        block, offset = divmod(query, layer.block_size)
        if layer.kind is LayerKind.FULL:
            pairs += query + 1
        else:
            pairs += offset + 1 + min(block, layer.top_k - 1) * layer.block_size
            scores += block
    return pairs, scores


@pytest.mark.parametrize("kind", LayerKind)
@pytest.mark.parametrize("block_size, top_k", [(1, 1), (4, 1), (4, 2), (4, 3), (5, 100), (64, 2)])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 23, 64])
def test_pairs_equal_a_count_over_queries(kind, block_size, top_k, length):
    layer = LayerAttention(kind, block_size, top_k)
    assert (attention_pairs(layer, length), gate_pairs(layer, length)) == counted(layer, length)


def test_moba_with_every_block_is_charged_as_full_and_its_gate():
    model = ModelConfig()
    moba, full = LayerAttention(LayerKind.MOBA, 16, 4), LayerAttention(LayerKind.FULL, 16, 4)
    gate = 2 * model.num_attention_heads * model.head_dim * gate_pairs(moba, 64)
    assert training_flops(model, (moba,), [64]) == training_flops(model, (full,), [64]) + gate


def test_a_gate_shared_by_a_group_is_charged_once_a_group():
    model, free = ModelConfig(), LayerAttention(LayerKind.MOBA, 16, 2)
    shared = dataclasses.replace(free, share_picks_in_group=True)
    fewer = model.num_attention_heads - model.num_key_value_heads
    difference = training_flops(model, (free,), [70]) - training_flops(model, (shared,), [70])
    assert difference == 2 * fewer * model.head_dim * gate_pairs(free, 70) > 0


def test_a_key_convolution_is_charged_for_its_taps_and_its_memory():
    model, full = ModelConfig(), LayerAttention(LayerKind.FULL, 16, 2)
    taps = 4 * model.num_key_value_heads * model.head_dim
    difference = training_flops(model, (full,), [70, 5], key_conv=4) - training_flops(model, (full,), [70, 5])
    assert difference == 3 * 2 * taps * model.num_layers * 75
    without, convolved = (memory_gib(compose(["recipe=8k", f"attention.key_conv={width}"]), 1) for width in (0, 4))
    model = compose(["recipe=8k"]).model
    weights = 4 * model.num_key_value_heads * model.head_dim * model.num_layers
    for term, size in {"weights": 2, "gradients": 4, "optimizer": 12}.items():
        assert convolved[term] - without[term] == pytest.approx(weights * size / 2**30)
    kept = 8192 * model.num_key_value_heads * model.head_dim * 2 / 2**30  # of the one layer that is computed again
    assert convolved["activations"] - without["activations"] == pytest.approx(kept)


@pytest.mark.parametrize(
    "name, parameters", [("llama3.2-1b", 1_235_814_400), ("llama3.1-8b", 8_030_261_248), ("qwen3-8b", 8_190_735_360)]
)
def test_parameter_counts_are_the_published_ones(name, parameters):
    assert parameter_count(compose([f"model={name}"]).model) == parameters


def test_matmul_flops_are_two_per_weight_outside_norms_and_input_embedding():
    model = compose(["model=llama3.1-8b"]).model
    norms = (2 * model.num_layers + 1) * model.hidden_size
    weights = parameter_count(model) - norms - model.vocab_size * model.hidden_size
    assert matmul_flops_per_token(model) == 2 * weights


def test_memory_falls_with_every_kind_of_parallelism():
    base = compose(["recipe=128k"])
    total = memory_gib(base, 16)["total"]
    assert memory_gib(base, 64)["total"] < total
    assert memory_gib(compose(["recipe=128k", "parallel.context=8"]), 32)["total"] < total
    assert memory_gib(compose(["recipe=128k", "parallel.tensor=8"]), 32)["total"] < total
    assert memory_gib(compose(["recipe=128k", "parallel.recompute=none"]), 16)["total"] > total


def test_memory_is_that_of_the_padded_row():
    layout = ["recipe=128k", "parallel.recompute=none"]
    odd, padded = (memory_gib(compose([*layout, f"train.sequence_length={n}"]), 16) for n in (131063, 131072))
    assert odd == padded


def test_memory_of_context_parallelism_is_that_of_its_strategy():
    def term(*overrides):
        config = compose(["recipe=128k", "parallel.tensor=1", "parallel.sequence=false", *overrides])
        return memory_gib(config, 16)["context parallelism"]

    shape = {"rows": 131072, "num_ranks": 4, "heads": 32, "key_heads": 8, "head_dim": 128}
    for strategy in ("all_gather", "all_to_all", "ring"):
        expected = max(peak_bytes(strategy, **shape)) / 2**30
        assert term(f"parallel.context_strategy={strategy}") == expected
    assert term("parallel.gather_heads=2") == max(peak_bytes("all_gather", **shape, gather_heads=2)) / 2**30
    alone = max(peak_bytes("all_to_all", **shape, overlap=False)) / 2**30
    assert term("parallel.context_strategy=all_to_all", "parallel.context_overlap=false") == alone
    assert term("parallel.context=1") == 0
    assert 0 < term("parallel.context_inner=2") < term()
    assert term("parallel.context_strategy=ring", "parallel.full_context_strategy=all_gather") == term()


def test_memory_of_recomputed_layers_is_kept_boundaries_and_one_layer():
    def activations(*overrides):
        return memory_gib(compose(["recipe=8k", "train.global_batch_size=64", *overrides]), 8)["activations"]

    model, full = compose(["recipe=8k"]).model, "parallel.recompute=full"
    boundary = 8192 * model.hidden_size * 2 / 2**30
    one_stage, two_stages = activations(full), activations(full, "parallel.pipeline=2")
    assert one_stage - (model.num_layers * boundary) == pytest.approx(
        activations("parallel.recompute=none") / model.num_layers
    )
    # Twice the micro-batches of half the layers on the first stage; the last keeps one, but has the logits.
    assert two_stages == pytest.approx(one_stage - model.num_layers * boundary / 2)


@pytest.mark.parametrize("recipe, gpus", [("8k", 1), ("32k", 8), ("128k", 16), ("1m", 64)])
def test_recipes_fit_an_80_gb_gpu_by_the_estimate(recipe, gpus):
    assert memory_gib(compose([f"recipe={recipe}"]), gpus)["total"] < 72
