"""A loss in chunks is the loss: values and gradients, also over tensor ranks and with a frozen output layer."""

import dataclasses

import pytest
import torch

from moba_train.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import assert_close

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=65,  # padded over two ranks
)
CONFIG = RunConfig(precision="fp32", model=MODEL, train=TrainConfig(sequence_length=64))
VARIANTS = {
    "tied": CONFIG,
    "untied": dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, tie_embeddings=False)),
    "frozen": dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, freeze=("embedding.*",))),
}
ROWS = 24  # of 64: the last chunk is short


def _both_ways(rank, world_size, layout):
    """Per variant: losses and gradients of every parameter, whole and in chunks, and the largest logits formed."""
    from moba_train import device as devices
    from moba_train.attention import SequenceInfo
    from moba_train.model import chunked_loss
    from moba_train.model.build import build_gpt, transformer_config
    from moba_train.model.core_attention import RowParams
    from moba_train.model.freeze import freeze_parameters
    from moba_train.model.rope import inverse_frequencies, rotary_table
    from moba_train.parallel import groups as mesh
    from moba_train.parallel.seed import seed_everything

    devices.prepare()
    device = devices.local_device()
    groups = mesh.initialize(layout, "gloo", device)
    tokens = torch.arange(64)[None] * 7 % 65
    positions = torch.arange(64)
    found = {}
    for name, config in VARIANTS.items():
        config = dataclasses.replace(config, parallel=layout)
        seed_everything(1, 0)
        gpt = build_gpt(config, transformer_config(config, device), groups, device)
        freeze_parameters([gpt], config.train.freeze, recompute=False)
        rotary = rotary_table(positions, inverse_frequencies(config.model))
        params = RowParams(qkv_format="thd", sequence=SequenceInfo([0, 64]), rotary=rotary)
        formed = []
        gpt.output_layer.register_forward_hook(
            lambda module, args, output, formed=formed: formed.append(len(output[0]))
        )
        runs = []
        for limit in (1 << 30, ROWS * gpt.output_layer.output_size_per_partition):
            chunked_loss.LOGITS_AT_ONCE = limit
            formed.clear()
            gpt.zero_grad()
            losses = gpt(tokens, positions[None], None, labels=tokens.roll(-1), packed_seq_params=params)
            (losses * torch.linspace(0, 1, 64)).sum().backward()
            grads = {key: p.grad.clone() for key, p in gpt.named_parameters() if p.grad is not None}
            runs.append((losses.detach(), grads, max(formed)))
        found[name] = runs
    return found


@pytest.mark.parametrize(
    "world_size, layout",
    [(1, ParallelConfig()), (2, ParallelConfig(tensor=2)), (2, ParallelConfig(tensor=2, sequence=True))],
)
def test_chunks_change_nothing(world_size, layout):
    for found in run_distributed(_both_ways, world_size, layout):
        for name, ((losses, grads, formed), (chunked, chunked_grads, chunk)) in found.items():
            assert (formed, chunk) == (64, ROWS)
            assert_close(chunked, losses, torch.float32, f"{name}, losses")
            assert grads.keys() == chunked_grads.keys()
            assert ("embedding.word_embeddings.weight" in grads) == (name != "frozen")
            for key, grad in grads.items():
                assert_close(chunked_grads[key], grad, torch.float32, f"{name}, {key}")
