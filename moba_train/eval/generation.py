"""Token by token: prefill in chunks, then decode from cached keys, values and block sums.

MoBA layers pick blocks for a decoded token as for every other, from block means kept incrementally, or attend to
everything while decoding (`decode="full"`, as the MoBA report does for its evaluations, arXiv 2502.13189, section 3.3).

Letters: T tokens of a step, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import torch

from moba_train.attention import LayerCache, SequenceInfo
from moba_train.config.schema import ConfigError
from moba_train.eval.model import Model, fit_length, hidden_states, logits
from moba_train.model.core_attention import RowParams, set_layer_plan
from moba_train.model.layer_plan import LayerKind
from moba_train.model.rope import rotary_table

__all__ = ["DECODE", "Sampler", "generate", "new_caches", "next_logits"]

DECODE = ("moba", "full")


class Sampler:
    """Chooses a token from logits: the best one at temperature 0, else drawn from what top_k and top_p leave.

    top_k: only that many of the likeliest (0: all). top_p: only the likeliest, until their probability reaches it (1:
    all). Draws happen on the host, so that a seed gives the same text on every device with the same logits.
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 1234) -> None:
        for key, value, good, remedy in (
            ("--temperature", temperature, temperature >= 0, "must be at least 0 (0: always the likeliest token)"),
            ("--top-k", top_k, top_k >= 0, "must be at least 0 (0: no limit)"),
            ("--top-p", top_p, 0 < top_p <= 1, "must lie above 0 and not above 1 (1: no limit)"),
            ("--seed", seed, 0 <= seed < 2**63, "must be at least 0 and fit 63 bits"),
        ):
            if not good:
                raise ConfigError(key, value, remedy)
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits_V: torch.Tensor) -> int:
        """The id of the next token."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        weights = self.probabilities(logits_V.double().cpu())
        return int(torch.multinomial(weights, 1, generator=self._generator))

    def probabilities(self, logits_V: torch.Tensor) -> torch.Tensor:
        """What a token is drawn from, [V]: temperature first, then top_k, then top_p of what is left."""
        scaled = (logits_V - logits_V.max()) / self.temperature  # no temperature makes it overflow
        if self.top_k:
            lowest = scaled.topk(min(self.top_k, len(scaled))).values[-1]
            scaled = scaled.masked_fill(scaled < lowest, -torch.inf)
        weights = scaled.softmax(-1)
        if self.top_p < 1:
            sorted_weights, order = weights.sort(descending=True, stable=True)
            reached = sorted_weights.cumsum(-1) - sorted_weights >= self.top_p  # by those before it
            weights[order[reached]] = 0.0
        return weights / weights.sum()


def new_caches(model: Model, reserve: int = 0) -> list[LayerCache]:
    """An empty cache for every layer, with room for `reserve` tokens."""
    return [
        LayerCache(layer.block_size if layer.kind is LayerKind.MOBA else None, reserve=reserve) for layer in model.plan
    ]


def next_logits(model: Model, tokens: Sequence[int], caches: Sequence[LayerCache]) -> torch.Tensor:
    """Append the document's next T tokens to the caches; logits of the token that follows the last, fp32 [V]."""
    start = caches[0].length
    positions_T = torch.arange(start, start + len(tokens))
    sequence = SequenceInfo([0, start + len(tokens)], q_positions=positions_T if start else None)
    positions_T = positions_T.to(model.device)
    rotary = rotary_table(positions_T, model.frequencies)
    params = RowParams(qkv_format="thd", sequence=sequence, rotary=rotary, caches=caches)
    tokens_T = torch.tensor(tokens, dtype=torch.int64, device=model.device)
    return logits(model, hidden_states(model, tokens_T, positions_T, params)[-1:])[0]


def generate(
    model: Model,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampler: Sampler,
    stop: Collection[int] = (),
    vocab_size: int | None = None,
    prefill_chunk: int = 8192,
    decode: str = "moba",
) -> Iterator[int]:
    """Yield up to `max_tokens` new ids; ends before an id in `stop`. Needs a model of one process.

    Args:
        vocab_size: ids from here on are never chosen (a vocabulary padded beyond the tokenizer's); None: all may be.
        prefill_chunk: prompt tokens in flight at once, which bounds memory and changes nothing else.
        decode: "moba": as the layer plan says; "full": new tokens attend to everything in every layer.

    Raises:
        ValueError: an empty prompt, or settings that cannot work.
    """
    if not prompt or prefill_chunk < 1 or decode not in DECODE:
        raise ValueError(f"prompt of {len(prompt)} tokens, prefill_chunk {prefill_chunk}, decode {decode!r}")
    fit_length(model, len(prompt) + max_tokens)
    caches = new_caches(model, reserve=len(prompt) + max_tokens)
    for begin in range(0, len(prompt), prefill_chunk):
        following_V = next_logits(model, prompt[begin : begin + prefill_chunk], caches)
    if decode == "full":
        set_layer_plan([model.gpt], tuple(dataclasses.replace(layer, kind=LayerKind.FULL) for layer in model.plan))
    try:
        for remaining in range(max_tokens, 0, -1):
            token = sampler(following_V[:vocab_size])
            if token in stop:
                return
            yield token
            if remaining > 1:
                following_V = next_logits(model, [token], caches)
    finally:
        set_layer_plan([model.gpt], model.plan)
