"""attn_implementation="moba" in transformers: prefill, decode, padding, generate, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moba_train import hf
from moba_train.attention import ops
from tests.helpers.tolerance import assert_close

MOBA, FULL = {"kind": "moba", "block_size": 8, "top_k": 3}, {"kind": "full", "block_size": 8, "top_k": 3}
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


@pytest.fixture(autouse=True)
def registered():
    hf.register()
    yield
    hf.register()


def build(layers, family="llama", attention="moba"):
    torch.manual_seed(5)
    config, cls = FAMILIES[family]
    return cls._from_config(config(**SHAPE, moba={"layers": layers}), attn_implementation=attention).eval()


@pytest.fixture
def picks(monkeypatch):
    """Every picks tensor that is made, in order."""
    made, select = [], ops.select_from_means

    def recording(*args, **kwargs):
        made.append(select(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(ops, "select_from_means", recording)
    return made


def tokens(rows, columns, seed=0):
    return torch.randint(3, SHAPE["vocab_size"], (rows, columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def step_by_step(model, ids, first, **options):
    """Logits of a prefill of `first` columns, then one column at a time."""
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, :first], past_key_values=cache, **options).logits]
    parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(first, ids.shape[1])]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_as_plain_full_attention_and_as_moba(family, tmp_path):
    build([MOBA, MOBA, FULL], family).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    moba = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba").eval()
    assert plain.config._attn_implementation != "moba"
    ids = tokens(2, 60)
    with torch.no_grad():
        full_logits, moba_logits = plain(ids).logits, moba(ids).logits
    assert_close(moba_logits[:, :24], full_logits[:, :24], torch.float32)  # three blocks: nothing to leave out yet
    assert (moba_logits - full_logits).abs().max() > 1e-2
    moba.config.moba = {"layers": [{**MOBA, "top_k": 8}] * 3}  # sparsity zero
    with torch.no_grad():
        assert_close(moba(ids).logits, full_logits, torch.float32)


@pytest.mark.parametrize("layers", [[MOBA] * 3, [MOBA, FULL, MOBA]], ids=["moba", "hybrid"])
def test_decode_picks_and_logits_equal_prefills_at_every_position(layers, picks):
    model, ids, first = build(layers), tokens(2, 45), 29
    with torch.no_grad():
        expected = model(ids).logits
    whole, num_moba = list(picks), len(picks)
    assert num_moba == layers.count(MOBA)
    picks.clear()
    assert_close(step_by_step(model, ids, first), expected, torch.float32)

    whole_BTHK = [p.view(2, 45, *p.shape[1:]) for p in whole]
    stepwise = [picks[i::num_moba] for i in range(num_moba)]
    for expected_BTHK, (prefill, *decoded) in zip(whole_BTHK, stepwise, strict=True):
        assert len(decoded) == 45 - first
        # Ids number the blocks of the packed batch: row 1 begins where row 0 ends.
        offset = expected_BTHK[1, 0, 0, 0].item()
        expected_BTHK = expected_BTHK.clone()
        expected_BTHK[1] -= torch.where(expected_BTHK[1] < 0, 0, offset)
        for length, made in [(first, prefill), *zip(range(first + 1, 46), decoded, strict=True)]:
            made_BTHK = made.view(2, -1, *made.shape[1:]).clone()
            made_BTHK[1] -= torch.where(made_BTHK[1] < 0, 0, -(-length // 8))
            assert torch.equal(made_BTHK, expected_BTHK[:, length - made_BTHK.shape[1] : length]), length


def test_full_decode_attends_to_everything():
    model, ids, first = build([MOBA] * 3), tokens(1, 44), 36
    with torch.no_grad():
        expected = step_by_step(model, ids, first)
        hf.register(decode="full")
        found = step_by_step(model, ids, first)
        assert torch.equal(found[:, :first], expected[:, :first])  # the prefill is MoBA's still
        assert (found[:, first:] - expected[:, first:]).abs().max() > 1e-2
        # From a prefill of one token on, all is decode: full attention's logits.
        full = build([MOBA] * 3, attention="sdpa")(ids).logits
        assert_close(step_by_step(model, ids, 1), full, torch.float32)
    with pytest.raises(ValueError, match="decode='sparse'"):
        hf.register(decode="sparse")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_computes_what_it_computes_alone(side):
    model, long, short = build([MOBA, FULL, MOBA]), tokens(1, 61), tokens(1, 38, seed=1)
    padding = torch.zeros(1, 23, dtype=torch.int64)
    row = [padding, short] if side == "left" else [short, padding]
    real = slice(23, None) if side == "left" else slice(None, 38)
    ids = torch.cat([long, torch.cat(row, 1)])
    mask = torch.ones_like(ids)
    mask[1, : 23 if side == "left" else None] = 0
    mask[1, real] = 1
    with torch.no_grad():
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=position_ids).logits
        assert_close(logits[0], model(long).logits[0], torch.float32)
        assert_close(logits[1, real], model(short).logits[0], torch.float32)


@pytest.mark.parametrize("decode", ["moba", "full"])
def test_generate_on_a_left_padded_batch_equals_each_row_alone(decode):
    hf.register(decode=decode)
    model, prompts = build([MOBA, MOBA, FULL]), [tokens(1, 45), tokens(1, 30, seed=1)]
    ids = torch.cat([prompts[0], torch.cat([torch.zeros(1, 15, dtype=torch.int64), prompts[1]], 1)])
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [model.generate(p, attention_mask=torch.ones_like(p), **options)[0, p.shape[1] :] for p in prompts]
    together = model.generate(ids, attention_mask=(ids != 0).long(), **options)[:, 45:]
    assert torch.equal(together, torch.stack(alone))
    if decode == "moba":  # without a cache every token is recomputed
        recomputed = model.generate(prompts[0], attention_mask=torch.ones(1, 45), use_cache=False, **options)
        assert torch.equal(recomputed[0, 45:], alone[0])


def test_it_trains():
    model, ids = build([MOBA, FULL, MOBA]), tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "call, said",
    [
        ({"position_ids": torch.cat([torch.arange(20), torch.arange(20)])[None]}, "packed rows"),
        ({"attention_mask": torch.ones(1, 1, 40, 40)}, "ready-made"),
        ({"attention_mask": torch.ones(1, 30)}, "attention_mask|cache"),
    ],
)
def test_what_is_not_honoured_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        build([MOBA] * 3)(tokens(1, 40), use_cache=False, **call)


def test_a_static_cache_is_refused():
    model = build([MOBA] * 3)
    with pytest.raises(ValueError, match="DynamicCache"):
        model.generate(tokens(1, 20), attention_mask=torch.ones(1, 20), max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize(
    "plan, said",
    [(None, "core-to-hf"), ({"layers": [MOBA]}, "3 entries"), ({"layers": [FULL, FULL, {"kind": "mobo"}]}, "layer 2")],
)
def test_a_config_without_a_sound_plan_is_refused(plan, said):
    model = build([MOBA] * 3)
    model.config.moba = plan
    with pytest.raises(ValueError, match=said):
        model(tokens(1, 20))
