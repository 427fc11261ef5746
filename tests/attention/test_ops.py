"""The public ops: what they refuse, which backend they choose, what they save."""

from __future__ import annotations

import csv
import logging
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moba_train.attention import (
    SequenceInfo,
    choice,
    flash_library,
    full_attention,
    moba_attention,
    ops,
    select_blocks,
    select_from_means,
)

SEQ = SequenceInfo([0, 8])
SIZES = {"block_size": 2, "top_k": 2}


def q(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*(shape or (8, 2, 4)), dtype=dtype)


@pytest.mark.parametrize(
    ("inputs", "changes", "message"),
    [
        ((q(8, 4), q(), q()), {}, "q must be"),
        ((q(7, 2, 4), q(), q()), {}, "7 rows .* 8 queries"),
        ((q(), q(7, 2, 4), q(7, 2, 4)), {}, "k must be"),
        ((q(), q(8, 2, 3), q(8, 2, 3)), {}, "k must be"),
        ((q(), q(), q(8, 1, 4)), {}, "v must match k"),
        ((q(8, 3, 4), q(), q()), {}, "multiple of key heads"),
        ((q(), q(8, 0, 4), q(8, 0, 4)), {}, "multiple of key heads"),
        ((q(), q(dtype=torch.float64), q()), {}, "share a dtype"),
        ((q(dtype=torch.int64),) * 3, {}, "floating point"),
        ((q(), q().to("meta"), q().to("meta")), {}, "share a device"),
        ((q(), q(), q()), {"top_k": 0}, "top_k"),
        ((q(), q(), q()), {"top_k": 1, "force_previous_block": True}, "2 blocks are picked"),
        ((q(), q(), q()), {"force_first_block": True, "force_previous_block": True}, "3 blocks are picked"),
        ((q(), q(), q()), {"block_size": 0}, "block_size"),
        ((q(), q(), q()), {"block_size": 2.0}, "block_size"),
        ((q(), q(), q()), {"top_k": True}, "top_k"),
        ((q(), q(), q()), {"picks": torch.zeros(8, 2, 2)}, "picks must be int32"),
        ((q(), q(), q()), {"picks": torch.zeros(8, 2, 3, dtype=torch.int32)}, r"picks must be int32 \[8, 2, 2\]"),
        ((q(), q(), q()), {"backend": "sdpa"}, "does not serve"),
        ((q(), q(), q()), {"backend": "fast"}, "is not a backend"),
    ],
)
def test_refused(inputs: tuple, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moba_attention(*inputs, SEQ, **(SIZES | changes))


def test_full_and_gate_check_too() -> None:
    with pytest.raises(ValueError, match="v must match k"):
        full_attention(q(), q(), q(8, 1, 4), SEQ)
    with pytest.raises(ValueError, match="top_k"):
        select_blocks(q(), q(), SEQ, block_size=2, top_k=-1)
    with pytest.raises(ValueError, match="4 blocks"):
        select_from_means(q(), q(3, 2, 4), SEQ, **SIZES)


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_logged", set())
    with caplog.at_level(logging.INFO, logger=ops.__name__):
        for _ in range(2):
            moba_attention(q(), q(), q(), SEQ, **SIZES)
        moba_attention(q(), q(), q(), SEQ, **SIZES, backend="reference")
    lines = [record.getMessage() for record in caplog.records]
    assert sum("moba_attention" in line for line in lines) == 1
    assert any("'portable'" in line and "cpu" in line and "float32" in line for line in lines)
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_slow_path_of_a_gpu_is_a_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_logged", set())
    with caplog.at_level(logging.INFO, logger=ops.__name__):
        ops._log_choice("moba_attention", "portable", q().to("meta"))
        ops._log_choice("full_attention", "sdpa", q().to("meta"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]


@pytest.mark.parametrize("op", ops._BACKENDS)
def test_auto_takes_no_kernel_on_a_gpu_for_what_none_serves(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_logged", set())
    chosen: list[str] = []
    monkeypatch.setattr(ops, "_log_choice", lambda op, name, q_THD: chosen.append(name))
    ops._function(op, "auto", q(dtype=torch.float64).to("meta"))
    ops._function(op, "auto", torch.empty(2, 1, 512, dtype=torch.bfloat16, device="meta"))
    assert chosen in (["portable"] * 2, ["reference"] * 2)


def test_deterministic_on_a_gpu_is_for_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_logged", set())
    monkeypatch.setattr(ops, "_load", lambda op, name: lambda **options: (name, options))
    gpu = q().to("meta")
    for op, backend in (("moba_attention", "portable"), ("full_attention", "sdpa"), ("full_attention", "reference")):
        with pytest.raises(ValueError, match=f"come from backends triton, flash and mixed, not {backend}"):
            ops._attention(op, backend, gpu, True)
        ops._attention(op, backend, gpu, None)
        ops._attention(op, backend, q(), True)
    for op in ("moba_attention", "full_attention"):
        assert ops._attention(op, "auto", gpu, True)() == ("triton", {"deterministic": True})
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert ops._attention("full_attention", "auto", gpu, None)() == ("triton", {"deterministic": None})
    assert ops._attention("full_attention", "sdpa", gpu, None)() == ("sdpa", {})
    assert ops._attention("full_attention", "auto", gpu, False)() == ("sdpa", {})
    with pytest.raises(ValueError, match="float64"):
        ops._attention("moba_attention", "auto", q(dtype=torch.float64).to("meta"), True)


@pytest.mark.parametrize(
    "block_size, length, expected",
    [
        (128, 1 << 17, "triton"),
        (64, 4096, "triton"),
        (512, 1 << 17, "mixed"),
        (4096, 1 << 17, "flash"),
        (8192, 1 << 20, "flash"),
    ],
)
def test_choice_is_the_nearest_measured_shape(block_size: int, length: int, expected: str) -> None:
    assert choice.moba_backend(block_size, length, length) == expected
    assert choice.moba_backend(block_size, length, length // 2) == expected  # a context rank's part
    assert choice.moba_backend(block_size, length, 1) == "triton"


def test_the_table_is_the_committed_page() -> None:
    page = Path(__file__).parents[2] / "benchmarks/results/attention_h200_2026-11-23.csv"
    with page.open(newline="") as file:
        times = {(row["setting"], int(row["length"]), row["kernel"]): row for row in csv.DictReader(file)}
    setting = {128: "small", 512: "medium", 4096: "1m"}
    for row in choice.MEASURED:
        for backend, forward, backward in (
            ("triton", row.triton_forward, row.triton_backward),
            ("flash", row.flash_forward, row.flash_backward),
        ):
            found = times[setting[row.block_size], row.length, f"moba {backend}"]
            both = float(found["both_ms"])
            assert (forward, forward + backward) == pytest.approx((float(found["forward_ms"]), both), abs=0.11)


def test_choice_is_by_pass() -> None:
    assert choice.Measured(1, 1, 2.0, 3.0, 1.0, 1.0).fastest == "flash"
    assert choice.Measured(1, 1, 1.0, 3.0, 2.0, 1.0).fastest == "mixed"
    assert choice.Measured(1, 1, 1.0, 1.0, 2.0, 2.0).fastest == "triton"


@pytest.mark.parametrize("head_dim, served", [(16, False), (80, False), (24, False), (96, True), (288, False)])
def test_flash_takes_head_dims_whose_gradients_are_right(head_dim: int, served: bool, monkeypatch) -> None:
    monkeypatch.setattr(flash_library.importlib.util, "find_spec", lambda name: name)
    assert (flash_library.refusal_early(torch.bfloat16, head_dim, None) is None) == served
    assert "bf16" in flash_library.refusal_early(torch.float32, head_dim, None)


@pytest.mark.parametrize(
    "gpu, head_dim, said", [(9, 256, None), (10, 128, None), (10, 256, "up to 128"), (8, 64, "Hopper")]
)
def test_flash_takes_the_gpus_it_was_made_for(gpu: int, head_dim: int, said: str | None, monkeypatch) -> None:
    monkeypatch.setattr(flash_library.importlib.util, "find_spec", lambda name: name)
    refusal = flash_library.refusal_early(torch.bfloat16, head_dim, gpu)
    assert refusal is None if said is None else said in refusal


def test_every_registered_backend_has_its_function() -> None:
    for op, backends in ops._BACKENDS.items():
        for name in set(backends) - {"triton", "flash", "mixed"}:
            assert callable(ops._function(op, name, q()))
        assert set(backends) <= set(ops._NAMES)


def test_dense_path_where_picks_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for covering top_k without picks; never by the reference, never against given picks."""

    class Taken(Exception):
        pass

    def taken(*_: object, **__: object) -> None:
        raise Taken

    monkeypatch.setattr(ops, "full_attention", taken)
    cover = partial(moba_attention, q(), q(), q(), SEQ, block_size=2, top_k=4)
    for backend in ("auto", "portable"):
        with pytest.raises(Taken):
            cover(backend=backend)
    cover(backend="reference")
    cover(picks=select_blocks(q(), q(), SEQ, block_size=2, top_k=4))
    moba_attention(q(), q(), q(), SEQ, block_size=2, top_k=3)


@pytest.mark.parametrize("sparse", [True, False], ids=["moba", "full"])
def test_saves_its_own_inputs_and_outputs_only(sparse: bool) -> None:
    """Context parallelism drops k and v between the passes by identity of what is saved."""
    tensors = [torch.randn(8, 2, 4, requires_grad=True) for _ in range(3)]
    picks = select_blocks(*tensors[:2], SEQ, **SIZES)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        op = partial(moba_attention, picks=picks, **SIZES) if sparse else full_attention
        out, lse = op(*tensors, SEQ)
    expected = [*tensors, out, lse, *([picks] if sparse else [])]
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in expected]


def test_the_library_s_first_kernel_is_replaced_only_in_versions_that_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("library")
    exec(
        "def _bwd_preprocess(): return 'theirs'\n"
        "def _flash_attn_bwd(*, dlse=2): return _bwd_preprocess, _flash_attn_bwd.cache, dlse\n"
        "_flash_attn_bwd.cache = {}",
        vars(module),
    )
    monkeypatch.setattr(flash_library, "_interface", lambda: module)
    for version, replaced in (("4.0.0b36", True), ("4.1", False), (None, False)):
        monkeypatch.setattr(flash_library, "version", lambda version=version: version)
        found = flash_library._backward_of_known_rows.__wrapped__()  # nothing of this test stays in the cache
        assert (found is not None) == replaced
        if replaced:
            assert found() == (flash_library._known_rows, module._flash_attn_bwd.cache, 2)
            assert module._flash_attn_bwd()[0] is module._bwd_preprocess, "others' calls stay as they were"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_never_waits_for_the_device(dtype: torch.dtype) -> None:
    seq = SequenceInfo([0, 100, 256])
    tensors = [torch.randn(256, heads, 16, device="cuda", dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    ops_to_run = [full_attention, partial(moba_attention, block_size=16, top_k=3, backend="portable")]
    for op in ops_to_run:
        op(*tensors, seq)  # start-up of libraries may wait
    fresh = SequenceInfo([0, 100, 256])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for op in ops_to_run:
            out, lse = op(*tensors, fresh)
            torch.autograd.grad(out.float().sum() + lse.sum(), tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
