"""The stand-in for CUDA: its scope, its answers, and Megatron training in it as it should."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._device
from torch import Tensor

from megatron_mhc.patches import cpu
from megatron_mhc.patches.cpu import torch_cuda
from megatron_mhc.patches.registry import Patch, locate, registry
from tests.megatron.common.launch import cold_python

# every training test of the suite runs inside the stand-in; what it is by itself changes with it
pytestmark = pytest.mark.thorough


def patches_here() -> list[Patch]:
    """The stand-in's patches, but for the optional ones whose target this Megatron lacks."""
    states = {status.patch: status.state for status in registry.status(*cpu.CPU_PATCHES)}
    return [patch for patch in cpu.CPU_PATCHES if states[patch] != "missing"]


def everything() -> dict[tuple[str, str], int]:
    """What stands, by identity, wherever the stand-in may change something."""
    owners: dict[str, Any] = {
        "cuda": torch.cuda,
        "nvtx": torch.cuda.nvtx,
        "nccl": torch.cuda.nccl,
        "random": torch.cuda.random,
        "torch": torch,
        "tensor": torch.Tensor,
        "module": torch.nn.Module,
        "accelerator": torch.accelerator,
        "distributed": torch.distributed,
        "context": torch.utils._device.DeviceContext,
    }
    for patch in patches_here():
        owners[patch.target], _ = locate(patch.target)
    return {
        (where, name): id(value)
        for where, owner in owners.items()
        for name, value in vars(owner).items()
        # Python's own, which it renews as it likes
        if name not in ("__annotations__", "__annotate_func__", "__annotations_cache__")
    }


@pytest.fixture
def inside() -> Iterator[None]:
    with cpu.cpu_stand_in():
        yield


def python(program: str) -> str:
    finished = cold_python("-W", "ignore", "-c", program)
    assert finished.returncode == 0, finished.stdout[-4000:]
    return finished.stdout


def test_everything_is_put_back() -> None:
    before = everything()
    places = [(owner, name) for owner, name, _ in torch_cuda.replacements()]
    places += [locate(patch.target) for patch in patches_here() if displaces(patch)]
    held = [vars(owner).get(name) for owner, name in places]
    for _ in range(2):
        with cpu.cpu_stand_in():
            for (owner, name), original in zip(places, held, strict=True):
                assert vars(owner)[name] is not original, (owner, name)
        assert everything() == before
    assert len(places) > 100


def displaces(patch: Patch) -> bool:
    """Whether a patch changes anything here: where no fused kernels are, some have nothing to."""
    owner, name = locate(patch.target)
    original = vars(owner).get(name, getattr(owner, name))
    return patch.replace(original) is not original


def test_is_off_unless_asked_for() -> None:
    python(
        "import sys, torch\n"
        "before = {**vars(torch.cuda)}, {**vars(torch)}, {**vars(torch.Tensor)}\n"
        "from megatron_mhc.patches import cpu\n"
        "assert before[0] == vars(torch.cuda) and before[2] == vars(torch.Tensor)\n"
        "changed = {k for k, v in before[1].items() if vars(torch)[k] is not v}\n"
        "assert not changed, changed\n"
        "assert not cpu.active()\n"
        "assert not [name for name in sys.modules if name.startswith('megatron.')]\n"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_stays_untouched() -> None:
    python(
        "import torch\n"
        "from megatron_mhc.patches.cpu.torch_cuda import cuda_is_cpu\n"
        "with cuda_is_cpu():\n"
        "    torch.manual_seed(1)\n"
        "    layer = torch.nn.Linear(2, 2, device='cuda').cuda()\n"
        "    x = torch.ones(2, 2, device=torch.cuda.current_device()).pin_memory()\n"
        "    layer(x.to('cuda')).sum().backward()\n"
        "    torch.cuda.synchronize()\n"
        "    assert layer.weight.grad.device.type == 'cpu'\n"
        "    data = torch.utils.data.TensorDataset(x)\n"
        "    batches = list(torch.utils.data.DataLoader(data, pin_memory=True))\n"
        "    assert not batches[0][0].is_cuda\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert torch.ones(1, device='cuda').is_cuda\n"
    )


def test_leaves_nothing_in_a_megatron_imported_inside() -> None:
    python(
        "import torch\n"
        "real = torch.cuda.device\n"
        "from megatron_mhc.patches import cpu\n"
        "cpu.enter()\n"
        "assert torch.cuda.device is not real\n"
        "import megatron.core.tensor_parallel.random as random\n"
        "assert random.device_ctx_manager is torch.cuda.device\n"
        "cpu.leave()\n"
        "assert random.device_ctx_manager is torch.cuda.device is real\n"
    )


def test_entering_twice_is_entering_once() -> None:
    with cpu.cpu_stand_in():
        stream = torch.cuda.Stream
        with cpu.cpu_stand_in():
            assert torch.cuda.Stream is stream
        assert cpu.active() and torch.cuda.Stream is stream
        cpu.enter()
        assert torch.cuda.Stream is stream
    assert not cpu.active() and torch.cuda.Stream is not stream
    cpu.leave()


def test_a_patch_applied_by_another_stays() -> None:
    registry.apply(cpu.SHIPPED_HELPERS)
    try:
        with cpu.cpu_stand_in():
            pass
        assert registry.status(cpu.SHIPPED_HELPERS)[0].state == "applied"
    finally:
        registry.undo(cpu.SHIPPED_HELPERS.id)


def test_a_failing_entry_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything()
    missing = Patch("cpu-missing", "megatron.core.utils:no_such_name", lambda x: x, "a test")
    monkeypatch.setattr(cpu, "CPU_PATCHES", (cpu.SHIPPED_HELPERS, missing))
    with pytest.raises(RuntimeError, match="cpu-missing"):
        cpu.enter()
    monkeypatch.undo()
    assert not cpu.active()
    assert everything() == before


def test_no_factory_of_torch_is_forgotten() -> None:
    constructors = {id(function) for function in torch.utils._device._device_constructors()}
    public = {name for name, value in vars(torch).items() if id(value) in constructors}
    assert len(public) > 30
    assert public <= set(torch_cuda.FACTORIES.split())


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0), 0])
def test_cuda_is_the_cpu(inside: None, device: Any) -> None:
    here = torch.ones(2)
    made = [
        torch.zeros(2, device=device),
        torch.tensor([1.0], device=device),
        torch.empty(2, pin_memory=True),
        torch.ones_like(here, device=device),
        here.new_zeros(2, device=device),
        here.to(device),
        here.to(device=device, dtype=torch.bfloat16),
        here.cuda(),
        here.pin_memory(),
        torch.nn.Linear(2, 2, device=device).weight,
        torch.nn.Linear(2, 2).to(device).weight,
        torch.nn.Linear(2, 2).cuda().weight,
    ]
    with torch.device(device):
        made.append(torch.zeros(2))
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert here.to(device, torch.float64).dtype == torch.float64
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
    assert torch.zeros(2, device="meta").device.type == "meta"


def test_a_checkpoint_saved_on_cuda_loads(inside: None, tmp_path: Path) -> None:
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "file")
    for where in ({}, {"map_location": "cuda"}, {"map_location": torch.device("cuda", 0)}):
        assert torch.load(tmp_path / "file", **where)["weight"].tolist() == [0, 1, 2]


def test_types_have_cudas_names(inside: None) -> None:
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type("torch.cuda.HalfTensor").dtype == torch.float16
    assert torch.ones(1).type(torch.int64).dtype == torch.int64


def test_streams_and_events(inside: None) -> None:
    stream = torch.cuda.Stream()
    outside = torch.cuda.current_stream()
    with torch.cuda.stream(stream), torch.cuda.stream(stream):
        assert torch.cuda.current_stream() is stream
    assert torch.cuda.current_stream() is outside is torch.cuda.default_stream()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with pytest.raises(RuntimeError, match="recorded"):
        start.elapsed_time(end)
    start.record()
    stream.wait_event(start)
    torch.ones(1).record_stream(stream)
    end.record()
    assert 0 < start.elapsed_time(end) < 1000
    with pytest.raises(RuntimeError, match="CUDAGraph works with what a GPU holds"):
        torch.cuda.CUDAGraph()


@pytest.mark.parametrize("name", ["CUDAGraph", "MemPool"])
def test_what_no_cpu_has_stays_a_class(name: str, inside: None) -> None:
    """Megatron has them in annotations and asks whether something is one."""
    held = getattr(torch.cuda, name)
    assert (held | None) and not isinstance(object(), held)
    with pytest.raises(RuntimeError, match=f"torch.cuda.{name} works with what a GPU holds"):
        held()


def test_seeding_cuda_seeds_dropout(inside: None) -> None:
    drawn = []
    for seed in (torch.cuda.manual_seed, torch.manual_seed, torch.cuda.manual_seed_all):
        seed(3)
        drawn.append(torch.rand(4, device="cuda"))
    state = torch.cuda.get_rng_state()
    drawn_next = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.rand(4), drawn_next) and not torch.equal(drawn_next, drawn[0])


def test_the_tracker_keeps_its_generators_apart(inside: None) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(3)
    want_outside = torch.rand(2, 4)
    want_inside = torch.rand(2, 4, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(3)
    tracker = CudaRNGStatesTracker()
    tracker.add("inside", 7)
    outside, drawn = [], []
    for _ in range(2):
        outside.append(torch.rand(4))
        with tracker.fork("inside"):
            drawn.append(torch.rand(4))
    assert torch.equal(torch.stack(outside), want_outside)
    assert torch.equal(torch.stack(drawn), want_inside)


def test_a_data_loader_leaves_dropout_alone(inside: None) -> None:
    state = torch.cuda.get_rng_state()
    data = torch.utils.data.TensorDataset(torch.arange(4))
    assert len(list(torch.utils.data.DataLoader(data, pin_memory=True))) == 4
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_compiled_functions_run_as_they_are(inside: None) -> None:
    traced = []

    @torch.compile
    def double(x: Tensor) -> Tensor:
        traced.append(type(x))
        return 2 * x

    assert double(torch.ones(1)).item() == double(torch.ones(1)).item() == 2
    # a compiled function would have run its Python once, or not at all
    assert traced == [Tensor, Tensor]


def test_helpers_are_compiled_only_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    compile_helpers = cpu.SHIPPED_HELPERS.replace(lambda: asked.append("make"))
    module = "megatron.core.datasets.helpers_cpp"
    monkeypatch.setitem(sys.modules, module, type(sys)(module))
    compile_helpers()
    assert asked == []
    # None makes an import of it fail
    monkeypatch.setitem(sys.modules, module, None)
    compile_helpers()
    assert asked == ["make"]


def test_kernels_of_other_packages_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads
    from megatron.core.transformer import transformer_block

    monkeypatch.setattr(optimizer, "Adam", "fused")
    monkeypatch.setattr(clip_grads, "l2_norm_impl", "fused")
    monkeypatch.setattr(transformer_block, "LayerNormImpl", "fused")
    with cpu.cpu_stand_in():
        assert optimizer.Adam is torch.optim.AdamW
        assert clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm"
        assert transformer_block.LayerNormImpl.__name__ == "WrappedTorchNorm"
    assert optimizer.Adam == clip_grads.l2_norm_impl == transformer_block.LayerNormImpl == "fused"
