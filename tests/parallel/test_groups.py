"""The mesh as each rank sees it, the random state, and megatron-core's CUDA names on a CPU."""

import threading

import torch

from moba_train.config.schema import ParallelConfig
from tests.helpers.spawn import run_distributed


def _mesh(rank, world_size):
    from moba_train import device as devices
    from moba_train.parallel import groups as mesh
    from moba_train.parallel.seed import load_random_state, random_state, seed_everything

    devices.prepare()
    devices.prepare()  # a second call must not wrap what is wrapped
    groups = mesh.initialize(ParallelConfig(tensor=2, pipeline=2), "gloo", devices.local_device())
    seed_everything(7, groups.pipeline.rank)
    first = torch.rand(3)
    state = random_state()
    ahead = torch.rand(3)
    load_random_state(state)
    return {
        "axes": {
            axis: (getattr(groups, axis).rank, getattr(groups, axis).size) for axis in ("tensor", "pipeline", "data")
        },
        "ends": (groups.is_first_stage, groups.is_last_stage, groups.last_stage_rank),
        "first": first,
        "replayed": torch.equal(ahead, torch.rand(3)),
        "cuda": _cuda_on_cpu(),
    }


def _cuda_on_cpu():
    """Devices that CUDA spelled out leads to: in plain calls, inside backward, and in another thread."""
    seen = [
        torch.zeros(2, device="cuda").device,
        torch.empty(2, device=torch.cuda.current_device(), pin_memory=True).device,
        torch.zeros(2).cuda().device,
        torch.zeros(2).to("cuda").device,
        torch.zeros(2).to(device=torch.device("cuda"), dtype=torch.bfloat16).device,
    ]

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, gradient):
            seen.append(torch.ones(2, device="cuda").device)
            return gradient

    Inside.apply(torch.ones(2, requires_grad=True)).sum().backward()
    thread = threading.Thread(target=lambda: seen.append(torch.ones(2, device="cuda").device))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.Event().record()
    return [str(device) for device in seen], torch.zeros(2).type()


def test_mesh_of_four():
    found = run_distributed(_mesh, 4)
    assert [rank["axes"] for rank in found] == [
        {"tensor": (t, 2), "pipeline": (p, 2), "data": (0, 1)} for p in range(2) for t in range(2)
    ]
    assert [rank["ends"] for rank in found] == [(True, False, 2), (True, False, 3), (False, True, 2), (False, True, 3)]
    assert torch.equal(found[0]["first"], found[1]["first"]), "tensor ranks draw alike"
    assert not torch.equal(found[0]["first"], found[2]["first"]), "pipeline stages draw apart"
    assert all(rank["replayed"] for rank in found)
    for rank in found:
        devices, kind = rank["cuda"]
        assert set(devices) == {"cpu"}
        assert kind == "torch.cuda.FloatTensor", "megatron-core compares this string"
