"""Logits equal transformers' on the same weights: every family, every RoPE scaling, packed, in every layout."""

import dataclasses
from pathlib import Path

import pytest
import torch

from moba_train.config.schema import AttentionConfig, ParallelConfig, RunConfig, TrainConfig
from tests.helpers.hf import FAMILIES, hf_logits, smollm2, write_folder
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import assert_close

TOKENS = 64
PACKED, ALONE = (40, 24), (64,)
ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        **{"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32},
        # for each of the four pairs of head dim 8
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 1.5, 2.5, 4.0],
    },
}
LAYOUTS = {
    "tensor": ParallelConfig(tensor=2),
    "tensor and sequence": ParallelConfig(tensor=2, sequence=True),
    "pipeline": ParallelConfig(pipeline=2),
    "context": ParallelConfig(context=2),
    "context, ring": ParallelConfig(context=2, context_strategy="ring"),
    "context, all to all": ParallelConfig(context=2, context_strategy="all_to_all"),
}
FAMILY_NAMES, OTHERS = tuple(FAMILIES), (*(f"rope {name}" for name in ROPE), "odd vocabulary")


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder, and a row of documents of these lengths."""

    folder: Path
    lengths: tuple[int, ...]
    vocab: int


def _tokens(case):
    return torch.arange(TOKENS) * 977 % case.vocab


def _logits(case, parallel, rank):
    """This rank's part of the logits, [rows, vocabulary part] (None off the last stage), by our model of the folder."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from moba_train import device as devices
    from moba_train.attention import SequenceInfo
    from moba_train.context_parallel.layout import RULES
    from moba_train.model.build import build_model
    from moba_train.model.convert_hf import fill_model
    from moba_train.model.core_attention import RowParams
    from moba_train.model.hf_folder import load_hf_folder
    from moba_train.model.rope import inverse_frequencies, rotary_table
    from moba_train.parallel import groups as mesh
    from moba_train.parallel.seed import seed_everything

    devices.prepare()
    model, tensors = load_hf_folder(case.folder)
    attention, train = AttentionConfig(pattern="full"), TrainConfig(sequence_length=TOKENS)
    config = RunConfig(precision="fp32", model=model, attention=attention, parallel=parallel, train=train)
    groups = mesh.initialize(parallel, "gloo", devices.local_device())
    seed_everything(1, groups.pipeline.rank)
    chunks = build_model(config, groups, devices.local_device())
    fill_model(chunks, model, tensors.read)
    positions = torch.cat([torch.arange(length) for length in case.lengths])
    bounds = torch.tensor([0, *case.lengths]).cumsum(0).tolist()
    layout = RULES[parallel.context_layout](TOKENS, groups.context.size, bounds)
    rows = torch.tensor(layout.positions(groups.context.rank))
    params = RowParams(
        qkv_format="thd",
        sequence=SequenceInfo(bounds, q_positions=rows if groups.context.size > 1 else None),
        rotary=rotary_table(positions[rows], inverse_frequencies(model, max(case.lengths))),
    )

    def step(_, chunk):
        output = chunk(_tokens(case)[rows][None], positions[rows][None], None, packed_seq_params=params)
        return output, lambda logits, non_loss_data: logits[0].clone()

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=chunks[0],
            num_microbatches=1,
            seq_length=TOKENS,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    parallel_state.destroy_model_parallel()
    return (rows, found[0] if found else None)


def _all_logits(rank, world_size, cases, layouts):
    return {
        (name, layout): _logits(case, parallel, rank)
        for name, case in cases.items()
        for layout, parallel in layouts.items()
    }


def _joined(parts):
    """The whole [T, V] from all ranks' parts, as the layouts cut them."""
    rows, logits = zip(*[(rows, logits) for rows, logits in parts if logits is not None], strict=True)
    if len(logits) > 1 and len(rows[0]) == TOKENS:  # tensor ranks hold a part of the vocabulary each
        return torch.cat(logits, dim=1)
    return torch.cat(logits)[torch.cat(rows).argsort()]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    found = {}
    for name, (kind, fields) in FAMILIES.items():
        found[name] = Case(write_folder(root / name.replace(", ", "-"), kind, **fields), PACKED, 96)
    for name, rope in ROPE.items():
        # transformers takes the length of the input for these two: one document as long as the row, or two short ones
        lengths = ALONE if name in ("dynamic", "longrope") else PACKED
        extra = {"max_position_embeddings": 32} if name == "dynamic" else {}
        folder = write_folder(root / f"rope-{name}", "llama", rope_parameters={"rope_theta": 500.0, **rope}, **extra)
        found[f"rope {name}"] = Case(folder, lengths, 96)
    found["odd vocabulary"] = Case(write_folder(root / "odd", "llama", vocab_size=97), PACKED, 97)
    short = found["rope longrope"].folder
    found["rope longrope, short input"] = Case(short, (32, 32), 96)
    return found


@pytest.fixture(scope="module")
def expected(cases):
    return {name: hf_logits(case.folder, _tokens(case), case.lengths) for name, case in cases.items()}


def _check(found, expected):
    for (name, layout), whole in found.items():
        vocab = expected[name].shape[1]
        assert_close(whole[:, :vocab], expected[name], torch.float32, f"{name}, {layout}")
        assert whole[:, vocab:].isneginf().all()
        padded = name == "odd vocabulary" and "tensor" in layout
        assert whole.shape[1] == vocab + padded


def test_every_family_and_scaling_in_one_process(cases, expected):
    results = run_distributed(_all_logits, 1, cases, {"one": ParallelConfig()})
    found = {key: _joined([rank[key] for rank in results]) for key in results[0]}
    assert len(found) == len(cases) >= 12
    _check(found, expected)
    # The scalings do something: no two of the llamas that differ in nothing else agree.
    llamas = [expected[f"rope {name}"] for name in ("linear", "llama3", "yarn")]
    assert all((a - b).abs().max() > 1e-2 for at, a in enumerate(llamas) for b in llamas[:at])


@pytest.mark.parametrize("names", [FAMILY_NAMES, OTHERS], ids=["families", "others"])
def test_every_layout_of_two_ranks(cases, expected, names):
    some = {name: cases[name] for name in names}
    results = run_distributed(_all_logits, 2, some, LAYOUTS)
    found = {key: _joined([rank[key] for rank in results]) for key in results[0]}
    assert len(found) == len(some) * len(LAYOUTS)
    _check(found, expected)


@pytest.mark.skipif(smollm2() is None, reason="MOBA_TRAIN_SMOLLM2 does not name a folder of the real SmolLM2")
def test_smollm2_itself_alone_and_in_two_stages_and_two_context_ranks():
    cases = {"smollm2": Case(smollm2(), PACKED, 49152)}
    expected = {"smollm2": hf_logits(cases["smollm2"].folder, _tokens(cases["smollm2"]), PACKED)}
    layouts = {name: LAYOUTS[name] for name in ("pipeline", "context")}
    for world_size, some in ((1, {"one": ParallelConfig()}), (2, layouts)):
        results = run_distributed(_all_logits, world_size, cases, some)
        _check({key: _joined([rank[key] for rank in results]) for key in results[0]}, expected)
