"""Every backend of an op on every device at hand, as fixtures: `moba_backend`, `full_backend`, `gate_backend`,
`conv_backend`.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from moba_train.attention import ops
from tests.helpers import flash_stand_in as stand_in
from tests.helpers.interpreter import INTERPRETING


class Backend(NamedTuple):
    """A backend on a device, and the dtypes it is tested in against the reference in the same dtype."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"


_KERNELS = ("triton", "flash", "mixed")


def _params(op: str, *, cuda: bool = True) -> list[object]:
    params: list[object] = []
    for name in ops._BACKENDS[op]:
        if name == "reference":
            continue
        if name not in _KERNELS:
            params.append(pytest.param(Backend(name, "cpu", (torch.float64, torch.float32)), id=f"{name}-cpu"))
        if name not in ("flash", "mixed"):  # 16-bit only: tested by error against fp64, with the kernels
            absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
            dtypes = (torch.float64, torch.float32) if name == "portable" else (torch.float32,)
            marks = (pytest.mark.gpu, absent)
            params.append(pytest.param(Backend(name, "cuda", dtypes), id=f"{name}-cuda", marks=marks))
    return params


@pytest.fixture(params=_params("moba_attention"))
def moba_backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(params=_params("full_attention"))
def full_backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(params=_params("select_from_means"))
def gate_backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(params=_params("convolve_keys"))
def conv_backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(autouse=True)
def _scalar_loop_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's scalars are arrays of one element, which NumPy 2.4 no longer turns into loop bounds."""
    if not INTERPRETING:
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture
def flash_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention's varlen contract in plain torch, in the dtype of its inputs."""
    from moba_train.attention import flash_library

    monkeypatch.setattr(flash_library, "refusal", lambda q_THD: None)
    monkeypatch.setattr(flash_library, "forward", stand_in.forward)
    monkeypatch.setattr(flash_library, "backward", stand_in.backward)
