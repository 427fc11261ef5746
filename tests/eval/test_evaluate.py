"""A checkpoint of another layout is opened; measures equal training's own and each other in any layout."""

from __future__ import annotations

import json

import pytest
import torch

from moba_train.config.schema import ConfigError
from moba_train.eval.position_loss import windows
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import LOSS_RTOL
from tests.helpers.training import corpus, losses, small_config

# Rates at which two steps teach something, so that losses and margins are not all alike.
FAST = ["optim.learning_rate=0.02", "optim.warmup_steps=0", "model.init_std=0.2"]
LAYOUT = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]  # of the checkpoint that all tests open
LENGTHS, CONTEXT = (191, 256), 95  # 191 and 95 do not divide among context ranks


def _evaluate(root, name, *overrides, model="run"):
    """evaluation.json of one call in this process group, which stays."""
    from megatron.core import parallel_state

    from moba_train.eval import evaluate as module

    module.close = parallel_state.destroy_model_parallel
    arguments = module.EvaluateArguments(
        checkpoint=str(root / model),
        output=str(root / "evaluation" / name),
        overrides=overrides,
        lengths=LENGTHS,
        depths=(0.0, 1.0),
        samples=1,
        distractors=2,
        documents=3,
        buckets=4,
        context=CONTEXT,
    )
    assert module.evaluate(arguments) == 0


def _two_ranks(rank, world_size, data, root):
    from megatron.core import parallel_state

    from moba_train.eval.generation import Sampler, generate
    from moba_train.eval.model import find_source, open_model
    from moba_train.eval.scoring import document_row, score
    from moba_train.train.convert import core_to_hf
    from moba_train.train.setup import preflight, setup
    from moba_train.train.step import validate_model

    losses(small_config(data, root / "run", *FAST, *LAYOUT), 2, save=True)
    start = [f"checkpoint.load={root / 'run'}", "checkpoint.load_weights_only=true"]
    config = small_config(data, root / "again", *FAST, *LAYOUT, *start)
    preflight(config)
    run = setup(config)
    validation, rows = validate_model(run).loss, [run.data.valid[i] for i in range(len(run.data.valid))]
    parallel_state.destroy_model_parallel()

    model = open_model(find_source(str(root / "run"), []))
    scores = [score(model, row) for row in rows]
    scored = float(sum(s.losses_R.double().sum() for s in scores) / sum(len(s.hits_R) for s in scores))
    prompt = rows[0].tokens[:90].tolist()
    answer = list(generate(model, prompt, max_tokens=6, sampler=Sampler()))
    hits = []
    for tokens in (answer, [*answer[:3], (answer[3] + 1) % 384, *answer[4:]]):
        row = document_row(torch.tensor([*prompt, *tokens, 0]), first_loss=89, end_loss=95)
        hits.append(score(model, row).hits_R.tolist())
    parallel_state.destroy_model_parallel()
    _evaluate(root, "data")
    _evaluate(root, "context", "parallel.context=2")
    if rank == 0:
        core_to_hf(root / "run", root / "exported")
    torch.distributed.barrier()
    _evaluate(root, "exported", f"data.path={data}", model="exported")
    _evaluate(root, "scaled", "model.rope_scaling.rope_type=linear", "model.rope_scaling.factor=4")
    return {"validation": validation, "scored": scored, "hits": hits}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def data(root):
    return corpus(root / "data")


@pytest.fixture(scope="module")
def found(root, data):
    return run_distributed(_two_ranks, 2, data, root)[1]


def report(root, name):
    return json.loads((root / "evaluation" / name / "evaluation.json").read_text())


def test_the_loss_of_a_resharded_checkpoint_is_that_of_validation_in_training(found):
    assert found["scored"] == pytest.approx(found["validation"], rel=LOSS_RTOL)


def test_an_exact_match_is_what_greedy_decoding_would_write(found):
    right, wrong = found["hits"]
    assert right == [True] * 6
    assert wrong[:3] == [True] * 3
    assert wrong[3] is False


@pytest.mark.parametrize("other, context", [("context", 2), ("exported", 1)])
def test_shards_of_rows_and_the_exported_folder_measure_the_same(root, found, other, context):
    expected, actual = report(root, "data"), report(root, other)
    assert expected["layout"] == {"tensor": 1, "context": 1, "data": 2}
    assert actual["layout"] == {"tensor": 1, "context": context, "data": 2 // context}
    for theirs, ours in zip(expected["loss_by_position"], actual["loss_by_position"], strict=True):
        assert (ours["length"], ours["documents"]) == (theirs["length"], theirs["documents"])
        assert ours["by_position"] == pytest.approx(theirs["by_position"], rel=LOSS_RTOL)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS_RTOL)
    for theirs, ours in zip(expected["passkey"], actual["passkey"], strict=True):
        assert ours.pop("margin") == pytest.approx(theirs.pop("margin"), rel=LOSS_RTOL, abs=1e-4)
        assert ours == theirs


def test_from_the_end_of_the_context_the_same_tokens_are_predicted(root, found):
    losses = report(root, "data")["loss_by_position"]
    for cut in losses:
        if cut["context"] is not None:
            (whole,) = [each for each in losses if each["length"] == cut["length"] and each["context"] is None]
            buckets = len(cut["by_position"])
            same = buckets * CONTEXT // cut["length"]  # in the first window nothing is cut
            assert cut["by_position"][:same] == pytest.approx(whole["by_position"][:same], rel=LOSS_RTOL)
            assert all(a != b for a, b in zip(cut["by_position"][same:], whole["by_position"][same:], strict=True))


@pytest.mark.parametrize("length, context", [(128, 64), (130, 64), (64, 64), (100, 5), (7, None), (40, 64)])
def test_windows_count_every_token_once_with_enough_before_it(length, context):
    counted = []
    for start, end, first in windows(length, context):
        assert end - start == min(context or length, length)
        counted += range(first, end)
        assert start == 0 or first - start >= end - start - max(1, context // 4)
    assert counted == list(range(length))


def test_a_report_says_what_was_asked_and_overrides_count(root, found):
    plain, scaled = report(root, "data"), report(root, "scaled")
    said = [(entry["length"], entry["context"]) for entry in plain["loss_by_position"]]
    assert said == [*((length, None) for length in LENGTHS), *((n, CONTEXT) for n in LENGTHS if n > CONTEXT)]
    assert [(cell["length"], cell["depth"]) for cell in plain["passkey"]] == [
        (n, d) for n in LENGTHS for d in (0.0, 1.0)
    ]
    assert plain["trained_length"] == 128
    assert plain["step"] == 2
    assert scaled["rope_scaling"]["factor"] == 4
    assert scaled["loss_by_position"][0]["loss"] != plain["loss_by_position"][0]["loss"]
    assert {path.name for path in (root / "evaluation" / "data").iterdir()} == {
        *("evaluation.json", "loss_by_position.png", "passkey.png"),
    }


@pytest.mark.parametrize(
    "checkpoint, overrides, said",
    [
        ("nowhere", [], "no such folder"),
        ("data", [], "no checkpoint there"),
        ("run", ["model.hidden_size=64"], "model.hidden_size=64"),
        ("run", ["parallel.pipeline=2"], "every copy of the model is whole"),
        ("run", ["parallel.context=2"], "world_size=1"),
        ("run", ["model.hiden_size=64"], "did you mean model.hidden_size"),
        ("run", ["hello"], "not in key=value form"),
        ("run", ["attention.pattern=dense"], "attention.pattern='dense'"),
    ],
)
def test_what_cannot_be_opened_is_refused(root, found, checkpoint, overrides, said, monkeypatch):
    from moba_train.eval.model import find_source

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=said):
        find_source(str(root / checkpoint), overrides)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"lengths": (10**6,)}, "the longest has"),
        ({"lengths": (40,), "tasks": ("passkey",)}, "needle, question and answer"),
        ({"tasks": ("needle",)}, "--tasks"),
        ({"depths": (2.0,)}, "--depths"),
        ({"data": "nowhere"}, "no such folder"),
        ({"output": "/dev/null/report", "tasks": ("position",)}, "--output"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_built(root, found, options, said, monkeypatch):
    from moba_train.eval.evaluate import EvaluateArguments, evaluate

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=said):
        evaluate(EvaluateArguments(**{"checkpoint": str(root / "run"), "output": str(root / "none"), **options}))
    assert not (root / "none").exists()
