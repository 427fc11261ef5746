"""Generation from caches equals generation that computes everything anew, token by token; sampling; resharding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moba_train.config.schema import AttentionConfig, ConfigError, ModelConfig, RunConfig, TrainConfig
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import assert_close

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    init_std=0.3,  # far from uniform: a wrong block would change tokens
)
# Attention, and key heads of the 4 query heads.
GATE = {"force_previous_block": True, "share_picks_in_group": True, "key_conv": 3}
CASES = {
    "moba": ({"pattern": "moba"}, 2),
    "hybrid": ({"pattern": "moba*2,full"}, 1),
    "full": ({"pattern": "full"}, 4),
    "first forced": ({"pattern": "moba", "force_first_block": True}, 2),
    "gate options": ({"pattern": "moba,full", **GATE}, 2),
}
PROMPT, NEW, CHUNKS = [(7 * i * i + 3) % 64 for i in range(61)], 16, (7, 33, 61)


def _model(attention, key_heads):
    from moba_train import device as devices
    from moba_train.eval.model import Model
    from moba_train.model.build import build_gpt, transformer_config
    from moba_train.model.layer_plan import layer_plan
    from moba_train.model.rope import inverse_frequencies
    from moba_train.parallel import groups as mesh
    from moba_train.parallel.seed import seed_everything

    config = RunConfig(
        precision="fp32",
        model=dataclasses.replace(MODEL, num_key_value_heads=key_heads),
        attention=AttentionConfig(block_size=8, top_k=3, **attention),
        train=TrainConfig(sequence_length=64),
    )
    devices.prepare()
    device = devices.local_device()
    groups = mesh.initialize(config.parallel, devices.collective_backend(), device)
    seed_everything(1, 0)
    gpt = build_gpt(config, transformer_config(config, device), groups, device).eval()
    for name, weight in gpt.named_parameters():
        if "key_conv" in name:  # not the identity it starts as
            torch.nn.init.normal_(weight, std=0.5)
    plan = layer_plan(config.attention, config.model.num_layers)
    return Model(config, groups, device, gpt, plan, inverse_frequencies(config.model).to(device))


def _recomputed(model, prompt, count):
    """Greedy tokens and the logits they come from, without any cache."""
    from moba_train.attention import SequenceInfo
    from moba_train.model.core_attention import RowParams
    from moba_train.model.rope import rotary_table

    tokens, steps = list(prompt), []
    for _ in range(count):
        positions = torch.arange(len(tokens))
        row = RowParams(
            qkv_format="thd",
            sequence=SequenceInfo([0, len(tokens)]),
            rotary=rotary_table(positions, model.frequencies),
        )
        with torch.no_grad():  # megatron-core's own path to logits, not ours
            logits = model.gpt(torch.tensor([tokens]), positions[None], None, packed_seq_params=row)
        steps.append(logits[0, -1])
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :], torch.stack(steps)


def _generations(rank, world_size):
    from megatron.core import parallel_state

    from moba_train.eval.generation import Sampler, generate, new_caches, next_logits

    found = {}
    for name, (attention, key_heads) in CASES.items():
        model = _model(attention, key_heads)

        def text(sampler=None, model=model, **options):
            return list(generate(model, PROMPT, **{"max_tokens": NEW, "sampler": sampler or Sampler(), **options}))

        tokens, steps = _recomputed(model, PROMPT, NEW)
        caches = new_caches(model)
        cached = [next_logits(model, PROMPT, caches)] + [next_logits(model, [t], caches) for t in tokens[:-1]]
        found[name] = {
            "expected": (tokens, steps),
            "by_chunk": {chunk: text(prefill_chunk=chunk) for chunk in CHUNKS},
            "logits": torch.stack(cached),
            "full decode": text(decode="full"),
        }
        if name == "hybrid":
            found["sampled"] = [text(Sampler(1.0, seed=seed)) for seed in (1, 1, 2)]
            found["stopped"] = text(stop={tokens[5]})
            found["few"] = text(Sampler(1.0), vocab_size=5)
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def generations():
    return run_distributed(_generations, 1)[0]


@pytest.mark.parametrize("name", CASES)
def test_cached_generation_equals_recomputing_everything(generations, name):
    tokens, logits = generations[name]["expected"]
    assert len(set(tokens)) > 3, "a constant text would prove little"
    assert generations[name]["by_chunk"] == dict.fromkeys(CHUNKS, tokens)
    assert_close(generations[name]["logits"], logits, torch.float32)


def test_full_decode_is_another_text_but_where_all_layers_are_full(generations):
    assert generations["moba"]["full decode"] != generations["moba"]["expected"][0]
    assert generations["full"]["full decode"] == generations["full"]["expected"][0]


def test_a_seed_gives_one_text_and_another_seed_another(generations):
    first, again, other = generations["sampled"]
    assert first == again != other


def test_it_ends_before_a_stop_token_and_keeps_to_the_vocabulary(generations):
    tokens, _ = generations["hybrid"]["expected"]
    assert generations["stopped"] == tokens[: tokens.index(tokens[5])]
    assert max(generations["few"]) < 5


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.9, 20, 0.5)])
def test_sampling_draws_from_transformers_distribution(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from moba_train.eval.generation import Sampler

    logits = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    found = Sampler(temperature, top_k, top_p).probabilities(logits)
    assert_close(found, scores[0].softmax(-1), torch.float64)


@pytest.mark.parametrize("key, value", [("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)])
def test_sampling_that_makes_no_sense_is_refused(key, value):
    from moba_train.eval.generation import Sampler

    with pytest.raises(ConfigError, match=str(value)):
        Sampler(**{key: value})
