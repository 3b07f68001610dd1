"""One mHC site in every implementation that is installed: F the identity, n streams, 20 iterations.

A builder takes Shapes and returns a Site: `forward()` builds the graph and returns what the next
site needs, `backward()` runs it back to the streams and the parameters. All get tensors of the same
shapes and scale; each peer is called as its own documentation asks.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_mhc import MHCConfig, kernels


@dataclass
class Shapes:
    """T tokens, n streams of width C, streams of `dtype` and fp32 parameters on the GPU."""

    tokens: int
    width: int
    n: int = 4
    dtype: torch.dtype = torch.bfloat16

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device="cuda") * scale

    def streams(self) -> Tensor:
        return self.normal(self.tokens, self.n, self.width).to(self.dtype)

    def sublayer(self) -> Tensor:
        """What F returned, or a gradient of that shape, [T, C]."""
        return self.normal(self.tokens, self.width).to(self.dtype)

    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.n * self.n + 2 * self.n
        phi = self.normal(rows, self.n * self.width, scale=0.02)
        return phi, torch.full((3,), 0.5, device="cuda"), self.normal(rows, scale=0.5)


@dataclass
class Site:
    """A site ready to run; `leaves` take gradients, `gradients` go into the results."""

    function: Callable[[], tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    results: tuple[Tensor, ...] = field(default=())

    def forward(self) -> tuple[Tensor, ...]:
        self.results = self.function()
        return self.results

    def backward(self) -> None:
        pairs = [(r, g) for r, g in zip(self.results, self.gradients, strict=True) if g is not None]
        results, gradients = zip(*pairs, strict=True)
        torch.autograd.grad(results, self.leaves, gradients, allow_unused=True)
        self.results = ()


def _ready(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def ours(shapes: Shapes, backend: str = "triton") -> Site:
    """A steady-state site: combine_pre of one boundary and that operation's backward."""
    tokens, n = shapes.tokens, shapes.n
    h_post = 2 * torch.sigmoid(shapes.normal(tokens, n))
    h_res = torch.softmax(shapes.normal(tokens, n, n), -1)
    f = shapes.sublayer()
    leaves = _ready(shapes.streams(), f, h_post, h_res, *shapes.parameters())
    gradients = (
        shapes.streams(),
        shapes.sublayer(),
        shapes.normal(tokens, n),
        shapes.normal(tokens, n, n),
    )
    return Site(lambda: kernels.combine_pre(*leaves, backend=backend), leaves, gradients)


def single_pass(shapes: Shapes) -> Site:
    """The same of delayed sites: combine_read in the convention deepseek_v4_1."""
    mhc = MHCConfig(convention="deepseek_v4_1")
    options = {name: getattr(mhc, name) for name in ("norm_eps", "pre_eps", "sinkhorn_eps")}
    tokens, n = shapes.tokens, shapes.n
    h_pre = torch.sigmoid(shapes.normal(tokens, n))
    h_res = torch.softmax(shapes.normal(tokens, n, n), -1)
    f = shapes.sublayer()
    leaves = _ready(shapes.streams(), f, 2 * h_pre, h_res, h_pre.clone(), *shapes.parameters())
    gradients = (
        shapes.streams(),
        shapes.sublayer(),
        shapes.normal(tokens, n),
        shapes.normal(tokens, n),
        shapes.normal(tokens, n, n),
    )
    return Site(
        lambda: kernels.combine_read(*leaves, **options, backend="triton"), leaves, gradients
    )


def _reference_site(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor]:
    u, h_post, h_res = kernels.reference.pre(x, phi, alpha, bias)
    return (kernels.reference.combine(x, u, h_post, h_res),)


def eager(shapes: Shapes) -> Site:
    """The reference in plain PyTorch."""
    leaves = _ready(shapes.streams(), *shapes.parameters())
    return Site(lambda: _reference_site(*leaves), leaves, (shapes.streams(),))


def compiled(shapes: Shapes) -> Site:
    """The reference through torch.compile."""
    leaves = _ready(shapes.streams(), *shapes.parameters())
    function = torch.compile(_reference_site, dynamic=False)
    return Site(lambda: function(*leaves), leaves, (shapes.streams(),))


def tile_kernels(shapes: Shapes) -> Site:
    """TileKernels 1.0.0: parameters accumulate into `main_grad`; [B, S, n, C]."""
    with contextlib.suppress(ModuleNotFoundError):  # the first import fails in a sub-package
        importlib.import_module("tile_kernels.modeling.mhc.functional")
    functional = importlib.import_module("tile_kernels.modeling.mhc.functional")
    x, phi, alpha, bias = leaves = _ready(shapes.streams()[None], *shapes.parameters())
    for parameter in (phi, alpha, bias):
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]

    def function() -> tuple[Tensor]:
        u, (post, comb) = functional.mhc_pre(
            x, phi, alpha, bias, post_mult_value=2.0, sinkhorn_repeat=20
        )
        return (functional.mhc_post(u, x, post, comb),)

    return Site(function, leaves, (shapes.streams()[None],))


def _transformer_engine_files() -> types.ModuleType:
    """Transformer Engine's two mHC files alone, with stand-ins for the packages above them."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("transformer_engine.pytorch.triton.mhc")
    root = Path(os.environ.get("TE_MHC_FILES", "/nonexistent")) / "transformer_engine"
    if not root.exists():
        raise ModuleNotFoundError("transformer_engine (nor its mHC files at $TE_MHC_FILES)")
    for name in ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton"):
        module = types.ModuleType(f"transformer_engine{name}")
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        # torch.compile and others look modules up by it
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
        sys.modules[module.__name__] = module
    gemm = types.ModuleType("transformer_engine.pytorch.cpp_extensions.gemm")
    gemm.general_gemm = lambda a, b, *_, **__: (b.t() @ a,)  # type: ignore[attr-defined]
    sys.modules["transformer_engine.pytorch.cpp_extensions"] = types.ModuleType(
        "transformer_engine.pytorch.cpp_extensions"
    )
    sys.modules[gemm.__name__] = gemm
    return importlib.import_module("transformer_engine.pytorch.triton.mhc")


def transformer_engine(shapes: Shapes, norm_weight: bool = True) -> Site:
    """Transformer Engine's mHC kernels, [s, b, C, n]; a norm weight of ones avoids an fp32 copy."""
    te = _transformer_engine_files()
    x = shapes.streams().transpose(1, 2).contiguous()[:, None]
    x, phi, alpha, bias = leaves = _ready(x, *shapes.parameters())
    ones = torch.ones(phi.shape[1], device="cuda") if norm_weight else None

    def function() -> tuple[Tensor]:
        u, post, res = te.mhc_generate_mix_and_aggregate(
            x, phi, alpha, bias[None], norm_weight=ones
        )
        return (te.mhc_fused_expand_combine(u, None, post, x, res, shapes.n),)

    return Site(function, leaves, (torch.randn_like(x),))


def liger(shapes: Shapes) -> Site:
    """Liger-Kernel: phi [n*C, rows] in the streams' dtype, for tensor cores; alpha in scalars."""
    functional = importlib.import_module("liger_kernel.transformers.functional")
    phi, _, bias = shapes.parameters()
    alphas = [torch.tensor(0.5, device="cuda") for _ in range(3)]
    leaves = _ready(shapes.streams(), phi.t().contiguous().to(shapes.dtype), bias, *alphas)

    def function() -> tuple[Tensor]:
        h_pre, h_post, h_res = functional.liger_mhc_coeffs(*leaves)
        u = functional.liger_mhc_pre(leaves[0], h_pre)
        return (functional.liger_mhc_post_res(leaves[0], u, h_post, h_res),)

    return Site(function, leaves, (shapes.streams(),))


def megatron_dev(shapes: Shapes) -> Site:
    """`--use-fused-mhc` of Megatron's branch dev, whose source stands on the path; [s, b, n, C].

    On Hopper Sinkhorn, aggregation and post/res are in Triton, the projection in PyTorch, in fp32.
    The coefficients are rounded to bf16.
    """
    fused = importlib.import_module("megatron.core.fusions.fused_mhc_kernels")
    phi, _, bias = shapes.parameters()
    alphas = [torch.full((1,), 0.5, device="cuda") for _ in range(3)]
    x, phi, bias, *alphas = leaves = _ready(shapes.streams()[:, None], phi, bias, *alphas)
    n = shapes.n

    def function() -> tuple[Tensor]:
        h_pre, h_post, h_res, _ = fused.fused_proj_rms_compute_h(
            x.view(shapes.tokens, -1), phi, *alphas, bias, n
        )
        h_res = fused.fused_sinkhorn(h_res.view(-1, 1, n, n), 20)
        h_pre, h_post, h_res = (h.to(x.dtype) for h in (h_pre, h_post, h_res))
        u = fused.fused_h_aggregate(x, h_pre.view(-1, 1, n))
        return (fused.fused_h_post_bda(h_res, x, h_post.view(-1, 1, n), u, None),)

    return Site(function, leaves, (shapes.streams()[:, None],))


PEERS: dict[str, Callable[[Shapes], Site]] = {
    "ours": ours,
    "ours, deepseek_v4_1": single_pass,
    "TileKernels": tile_kernels,
    "Transformer Engine": transformer_engine,
    "Transformer Engine, no weight": lambda shapes: transformer_engine(shapes, norm_weight=False),
    "Megatron dev": megatron_dev,
    "Liger-Kernel": liger,
    "torch.compile": compiled,
    "eager": eager,
}
