"""The built GPTModel: parameters, layers by plan and number, switching, and sparsity zero equal to full attention."""

import dataclasses

import pytest
import torch

from moba_train.config.schema import (
    AttentionConfig,
    AttentionPhase,
    LayerOverride,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from moba_train.model.layer_plan import LayerKind, layer_plan
from moba_train.train.estimate import parameter_count
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import assert_close

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
)
CONFIG = RunConfig(
    precision="fp32",
    model=MODEL,
    attention=AttentionConfig(pattern="moba*2,full", block_size=8, top_k=2),
    train=TrainConfig(sequence_length=64),
)
VARIANTS = {
    "tied": MODEL,
    "untied": dataclasses.replace(MODEL, tie_embeddings=False),
    "qk_norm": dataclasses.replace(MODEL, qk_norm=True),
    "qkv_bias": dataclasses.replace(MODEL, qkv_bias=True),
}


# Every layer recognisable by its number: after the switch, layer i picks i + 2 blocks, and the last one is full.
NUMBERED = AttentionConfig(
    schedule=(
        AttentionPhase(step=3, full_layers=(3,), overrides=tuple(LayerOverride((i,), top_k=i + 2) for i in range(3))),
    )
)


def _build(config):
    from moba_train import device as devices
    from moba_train.model.build import build_model
    from moba_train.parallel import groups as mesh
    from moba_train.parallel.seed import seed_everything

    devices.prepare()
    groups = mesh.initialize(config.parallel, "gloo", devices.local_device())
    seed_everything(1, groups.pipeline.rank)
    return build_model(config, groups, devices.local_device())


def _rows(config):
    from moba_train.attention import SequenceInfo
    from moba_train.model.core_attention import RowParams
    from moba_train.model.rope import inverse_frequencies, rotary_table

    positions = torch.cat([torch.arange(40), torch.arange(24)])
    tokens = torch.arange(64)[None] * 7 % 64
    rotary = rotary_table(positions, inverse_frequencies(config.model))
    return tokens, positions, RowParams(qkv_format="thd", sequence=SequenceInfo([0, 40, 64]), rotary=rotary)


def _recording(op, asked):
    def recording(*inputs, **options):
        asked.append(options["deterministic"])
        return op(*inputs, **options)

    return recording


def _one_process(rank, world_size):
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from moba_train.model.core_attention import CoreAttention, set_layer_plan
    from moba_train.model.freeze import parameter_names
    from moba_train.model.key_conv import KeyConv

    found = {"parameters": {}, "names": {}}
    for name, model in VARIANTS.items():
        config = dataclasses.replace(CONFIG, model=model)
        (chunk,) = _build(config)
        found["parameters"][name] = sum(p.numel() for p in chunk.parameters())
        found["names"][name] = [parameter for parameter, _ in parameter_names(unwrap_model(chunk))]
        parallel_state.destroy_model_parallel()

    (chunk,) = _build(CONFIG)
    layers = [module for module in chunk.modules() if isinstance(module, CoreAttention)]
    found["numbers"] = [(module.layer_number, module.layer.kind) for module in layers]
    tokens, positions, row = _rows(CONFIG)

    def logits(**attention):
        set_layer_plan([chunk], layer_plan(AttentionConfig(**attention), MODEL.num_layers))
        with torch.no_grad():
            return chunk(tokens, positions[None], None, packed_seq_params=row)

    parallel_state.destroy_model_parallel()
    (convolved,) = _build(dataclasses.replace(CONFIG, attention=dataclasses.replace(CONFIG.attention, key_conv=3)))
    found["names"]["key_conv"] = [parameter for parameter, _ in parameter_names(unwrap_model(convolved))]
    found["parameters"]["key_conv"] = sum(p.numel() for p in convolved.parameters())
    convolutions = [module for module in convolved.modules() if isinstance(module, KeyConv)]
    found["convolutions"] = len(convolutions)
    chunk.load_state_dict(convolved.state_dict(), strict=False)

    def convolved_logits(seen=tokens, **attention):
        set_layer_plan([convolved], layer_plan(AttentionConfig(**attention), MODEL.num_layers))
        with torch.no_grad():
            return convolved(seen, positions[None], None, packed_seq_params=row)

    found["identity"] = (convolved_logits(pattern="moba", block_size=8, top_k=2), logits(block_size=8, top_k=2))
    generator = torch.Generator().manual_seed(0)
    for module in convolutions:
        module.weight.data.normal_(std=50, generator=generator)  # keys are small under initial weights
    found["convolved"] = convolved_logits(pattern="full")
    found["convolved, sparsity zero"] = convolved_logits(pattern="moba", block_size=8, top_k=5)
    changed = tokens.clone()
    changed[0, :40] = 3
    found["convolved, other neighbour"] = convolved_logits(changed, pattern="full")
    options = {"pattern": "moba", "block_size": 8, "top_k": 3}
    found["options"] = [
        logits(**options),
        logits(**options, force_previous_block=True),
        logits(**options, share_picks_in_group=True),
    ]

    parallel_state.destroy_model_parallel()
    (strict,) = _build(dataclasses.replace(CONFIG, attention=dataclasses.replace(CONFIG.attention, deterministic=True)))
    asked = []
    for model in (strict, chunk):
        for module in model.modules():
            if isinstance(module, CoreAttention):
                module.ops = {kind: _recording(op, asked) for kind, op in module.ops.items()}
        with torch.no_grad():
            model(tokens, positions[None], None, packed_seq_params=row)
    found["deterministic"] = list(asked)

    found["full"] = logits(pattern="full")
    found["sparse"] = logits(pattern="moba", block_size=8, top_k=2)
    found["sparsity zero"] = logits(pattern="moba", block_size=8, top_k=5)
    found["full again"] = logits(pattern="full")
    with torch.no_grad():  # the second document's logits, when the first holds other tokens
        found["other neighbour"] = chunk(changed, positions[None], None, packed_seq_params=row)
    return found


def _two_stages(rank, world_size, virtual):
    """(layer number, layer) of this stage's attentions, as built and after a switch."""
    from megatron.core import parallel_state

    from moba_train.model.core_attention import CoreAttention, set_layer_plan

    parallel = ParallelConfig(pipeline=2, virtual_pipeline=virtual)
    chunks = _build(dataclasses.replace(CONFIG, parallel=parallel))
    modules = [m for chunk in chunks for m in chunk.modules() if isinstance(m, CoreAttention)]
    built = [(module.layer_number, module.layer) for module in modules]
    set_layer_plan(chunks, layer_plan(NUMBERED, MODEL.num_layers, 3))
    parallel_state.destroy_model_parallel()
    return built, [(module.layer_number, module.layer) for module in modules]


def _both_schedules(rank, world_size):
    return [_two_stages(rank, world_size, virtual) for virtual in (1, 2)]


@pytest.fixture(scope="module")
def built():
    return run_distributed(_one_process, 1)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_as_many_as_estimated(built, variant):
    assert built["parameters"][variant] == parameter_count(VARIANTS[variant])


@pytest.mark.parametrize("variant", [*VARIANTS, "key_conv"])
def test_parameters_have_the_names_that_freezing_expects(built, variant):
    from moba_train.model.freeze import expected_names

    attention = dataclasses.replace(CONFIG.attention, key_conv=3 if variant == "key_conv" else 0)
    config = dataclasses.replace(CONFIG, model=VARIANTS.get(variant, MODEL), attention=attention)
    assert sorted(built["names"][variant]) == sorted(expected_names(config))


def test_key_convolutions_are_counted_and_in_every_layer(built):
    assert built["parameters"]["key_conv"] == parameter_count(MODEL, key_conv=3)
    assert built["convolutions"] == MODEL.num_layers


def test_key_convolutions_start_as_the_identity(built):
    with_zeros, without = built["identity"]
    assert torch.equal(with_zeros, without)
    assert (built["convolved"] - built["full"]).abs().max() > 1e-3


def test_sparsity_zero_is_full_attention_over_convolved_keys_too(built):
    assert_close(built["convolved, sparsity zero"], built["convolved"], torch.float32)


def test_a_convolution_does_not_see_the_neighbouring_document(built):
    assert torch.equal(built["convolved, other neighbour"][:, 40:], built["convolved"][:, 40:])


def test_gate_options_reach_the_op(built):
    plain, forced, shared = built["options"]
    assert not torch.equal(plain, forced)
    assert not torch.equal(plain, shared)


def test_deterministic_reaches_every_op(built):
    assert built["deterministic"] == [True] * 4 + [None] * 4


def test_layers_are_numbered_from_one_and_follow_the_plan(built):
    kinds = [layer.kind for layer in layer_plan(CONFIG.attention, MODEL.num_layers)]
    assert built["numbers"] == list(enumerate(kinds, start=1))
    assert kinds == [LayerKind.MOBA, LayerKind.MOBA, LayerKind.FULL, LayerKind.MOBA]


def test_sparsity_zero_is_full_attention_and_sparsity_is_not(built):
    assert_close(built["sparsity zero"], built["full"], torch.float32)
    assert (built["sparse"] - built["full"]).abs().max() > 1e-3


def test_switching_there_and_back_changes_nothing(built):
    assert torch.equal(built["full again"], built["full"])


def test_a_document_does_not_see_its_neighbour(built):
    assert torch.equal(built["other neighbour"][:, 40:], built["full"][:, 40:])
    assert not torch.equal(built["other neighbour"][:, :40], built["full"][:, :40])


@pytest.fixture(scope="module")
def stages():
    """By virtual stages per rank, then by rank: (as built, after a switch)."""
    return dict(zip((1, 2), zip(*run_distributed(_both_schedules, 2), strict=True), strict=True))


# Layers counted from 1, as megatron-core does: two stages of two, or dealt out in turn when interleaved.
@pytest.mark.parametrize("virtual, numbers", [(1, [(1, 2), (3, 4)]), (2, [(1, 3), (2, 4)])])
def test_pipeline_stages_hold_and_switch_their_slice_of_the_plan(stages, virtual, numbers):
    first, later = layer_plan(CONFIG.attention, MODEL.num_layers), layer_plan(NUMBERED, MODEL.num_layers, 3)
    assert [(layer.kind[0], layer.top_k) for layer in later] == [("m", 2), ("m", 3), ("m", 4), ("f", 4)]
    for rank, expected in enumerate(numbers):
        built, switched = stages[virtual][rank]
        assert built == [(number, first[number - 1]) for number in expected]
        assert switched == [(number, later[number - 1]) for number in expected]
