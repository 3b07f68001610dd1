"""The pieces of an mHC site that TileKernels 2.1.0 has, and what of ours does the same.

`tile_kernels_2.py` times them. Shapes and dtypes are those of TileKernels' own wrappers; its H_res
is [src, dst], ours [dst, src].
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.peers import Shapes
from megatron_mhc import kernels
from megatron_mhc.kernels.arguments import Mixing, Options, Sizes
from megatron_mhc.kernels.triton.passes.aggregate import gradients_of_u
from megatron_mhc.kernels.triton.passes.coefficient_gradients import (
    CoefficientGradients,
    coefficient_gradients,
)
from megatron_mhc.kernels.triton.passes.coefficients import Coefficients, coefficients_and_u
from megatron_mhc.kernels.triton.passes.combine_gradients import combine_gradients
from megatron_mhc.kernels.triton.passes.projection import combine_and_project
from megatron_mhc.kernels.triton.sinkhorn import _run as run_sinkhorn

N, ROWS, ITERATIONS, EPS = 4, 24, 20, 1e-6
OPTIONS = Options(ITERATIONS, EPS, EPS, EPS)
BOUNDARIES = 9  # that "recompute" goes through, as in TileKernels' own benchmark
Tensors = Sequence[Tensor]


@dataclass
class Piece:
    """What TileKernels runs, what of ours does the same, and what the first one's results begin
    with, from those of ours."""

    name: str
    theirs: Callable[[], Tensors]
    expected: Callable[[Any], Tensors]
    operation: str = ""
    ours: Callable[[], Any] | None = None


def call(
    function: Callable[..., Any], inputs: Tensors, outputs: Tensors, *rest: float
) -> Callable[[], Tensors]:
    """A step, function(*inputs, *outputs, *rest), that returns the outputs and what that did."""

    def step() -> Tensors:
        returned = function(*inputs, *outputs, *rest)
        returned = (returned,) if isinstance(returned, Tensor) else returned or ()
        return [*outputs, *returned]

    return step


def zeros(*like: Tensor) -> list[Tensor]:
    """Outputs of these shapes; some pieces add to what they find."""
    return [torch.zeros_like(tensor) for tensor in like]


def derived(function: Callable[..., Any], inputs: Tensors, gradients: Tensors) -> Any:
    """The gradients of the inputs by PyTorch, as a piece's `expected`."""

    def expected(_: object) -> Tensors:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, gradients)

    return expected


def swapped(tensor: Tensor) -> Tensor:
    """[..., ROWS] with the places of H_res as the other library orders them."""
    return kernels.reference.transpose_res_rows(tensor.movedim(-1, 0), N).movedim(0, -1)


class Buffers:
    """A site's tensors as TileKernels has them: H_res, `logits` and `matrix`, is [src, dst]."""

    def __init__(self, shapes: Shapes) -> None:
        self.tk = importlib.import_module("tile_kernels.mhc")
        self.reference = importlib.import_module("tile_kernels.torch.mhc")
        self.shapes, self.values = shapes, N * shapes.width
        self.x, self.dy = shapes.streams(), shapes.streams()
        self.f, self.du = shapes.sublayer(), shapes.sublayer()
        self.sizes = Sizes.of(self.x)
        self.fn, self.scale, self.base = shapes.parameters()
        flat = self.x.flatten(1).float()
        self.product, self.square = (flat @ self.fn.t())[:, None], flat.square().sum(1)[:, None]
        self.mixes = self.norm(self.product, self.square)
        pre, post, comb = self.split(self.mixes, self.scale, self.base)
        self.pre, self.post = pre.reshape(-1, N), post.reshape(-1, N)
        self.logits = comb.reshape(-1, N, N).contiguous()
        self.matrix = self.reference.sinkhorn_normalize_ref(self.logits, ITERATIONS, EPS)
        self.h_res, self.d_matrix = self.matrix.mT.contiguous(), torch.randn_like(self.matrix)
        self.d_pre, self.d_post = torch.randn_like(self.pre), torch.randn_like(self.post)
        phi, self.bias = swapped(self.fn.t()).t().contiguous(), swapped(self.base)
        self.partial = combine_and_project(self.sizes, self.x, phi, None)[1]

    def norm(self, product: Tensor, square: Tensor) -> Tensor:
        """mixes [T, ROWS] of the projection [T, 1, ROWS] and the sum of squares [T, 1]."""
        return (product * torch.rsqrt(square[..., None] / self.values + EPS)).sum(1)

    def split(self, mixes: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
        """H_pre, H_post and H_res's logits, each behind a dimension of one."""
        return self.reference.mhc_pre_split_mixes_ref(mixes[None], scale, base, N, 2.0, EPS)

    def ours(self, aggregate: bool = False) -> Coefficients:
        """Our coefficients, and u."""
        tensors = (self.x, self.partial, self.scale, self.bias)
        leading = self.x.shape[:1]
        return coefficients_and_u(self.sizes, leading, *tensors, OPTIONS, aggregate=aggregate)


def forward(b: Buffers) -> list[Piece]:
    """The pieces of a site's forward."""
    tk, gates, projected = b.tk, (b.scale, b.base), (b.product, b.square)
    parts = [tensor[None] for tensor in projected]
    product, square, mixes, pre, post, logits, matrix, u = zeros(
        *projected, b.mixes, b.pre, b.post, b.logits.flatten(1), b.matrix, b.f
    )
    norm = call(
        tk.mhc_reduce_partials_and_rmsnorm_fwd, parts, (product, square, mixes), b.values, EPS, 1
    )
    split = call(tk.mhc_pre_split_mixes_fwd, (b.mixes, *gates), (pre, post, logits), 2.0, EPS)
    sinkhorn = call(tk.mhc_sinkhorn_fwd, (b.logits,), (matrix,), ITERATIONS, EPS)
    inputs = (b.product[None, :, 0], b.square[None, :, 0], *gates, b.x)
    eps_and_counts = (EPS, EPS, EPS, 2.0, ITERATIONS, 1)
    fused = call(tk.mhc_pre_big_fuse_fwd, inputs, (*zeros(post, logits), u), *eps_and_counts)
    apply = call(tk.mhc_pre_apply_mix_fwd, (b.x, b.pre), zeros(u))
    mixed = (b.f[None], b.x[None], b.post[None, ..., None], b.matrix[None])
    own_logits = b.logits.mT.contiguous()

    def coefficients() -> Tensors:
        norm()
        return [*split()[:2], *sinkhorn()]

    def as_coefficients(own: Any) -> Tensors:
        return own.h_pre, own.h_post, own.h_res.mT

    def as_fused(own: Any) -> Tensors:
        return own.h_post, own.h_res.mT.flatten(1), own.u

    def own_sinkhorn() -> Tensor:
        return kernels.sinkhorn(own_logits, ITERATIONS, EPS, backend="triton")

    def own_aggregate() -> Tensor:
        return kernels.aggregate(b.x, b.pre, backend="triton")

    def own_combine() -> Tensor:
        return kernels.combine(b.x, b.f, b.post, b.h_res, backend="triton")

    both = "coefficients_kernel, aggregate_kernel"
    return [
        Piece("norm", norm, lambda _: (*projected, b.norm(*projected))),
        Piece("split", split, lambda _: b.split(b.mixes, *gates)),
        Piece("sinkhorn", sinkhorn, lambda own: [own.mT], "sinkhorn", own_sinkhorn),
        Piece("coefficients", coefficients, as_coefficients, "coefficients_kernel", b.ours),
        Piece("apply", apply, lambda own: [own], "aggregate", own_aggregate),
        Piece("fused", fused, as_fused, both, lambda: b.ours(aggregate=True)),
        Piece("post", call(tk.mhc_post_fwd, mixed, ()), lambda own: [own], "combine", own_combine),
    ]


def backward(b: Buffers) -> list[Piece]:
    """The pieces of a site's backward, in the order in which one reads what another wrote."""
    tk, gates, projected = b.tk, (b.scale, b.base), (b.product, b.square)
    d_logits, d_mixes = torch.randn_like(b.logits), torch.randn_like(b.mixes)
    d_scale, d_base, *d_projected = zeros(*gates, *projected)
    sinkhorn = call(tk.mhc_sinkhorn_bwd, (b.d_matrix, b.logits), (d_logits,), ITERATIONS, EPS)
    inputs = (b.d_pre, b.d_post, d_logits.flatten(1), b.mixes, b.post, *gates)
    split = call(tk.mhc_pre_split_mixes_bwd, inputs, (d_mixes, d_scale, d_base), 2.0)
    inputs_of_norm = (d_mixes, *projected)
    norm = call(tk.mhc_reduce_partials_and_rmsnorm_bwd, inputs_of_norm, d_projected, b.values, EPS)
    apply = call(tk.mhc_pre_apply_mix_bwd, (b.du, b.x, b.pre), zeros(b.x))
    mixed = (b.f[None], b.x[None], b.post[None, ..., None], b.matrix[None], b.dy[None])
    gradients = (b.d_pre[None, ..., None], b.d_post[None, ..., None], d_logits[None])
    own_logits, d_res = b.logits.mT.contiguous(), b.d_matrix.mT.contiguous()
    normed = b.ours().normed

    def coefficients() -> Tensors:
        sinkhorn()
        split()
        return [*norm(), d_scale, d_base]

    def own_coefficients() -> CoefficientGradients:
        given = {"d_pre": b.d_pre, "d_post": b.d_post, "d_res": d_res}
        arguments = (b.sizes, b.x, normed, b.scale, b.bias, OPTIONS)
        return coefficient_gradients(*arguments, **given)

    def as_coefficients(own: CoefficientGradients) -> Tensors:
        d_z, k, _ = own.d_z_k_h_pre.flatten().split([x * len(b.x) for x in (ROWS, 1, N)])
        d_bias, d_alpha = own.left.partial.sum(0).split([ROWS, 3])
        return swapped(d_z.view(-1, 1, ROWS)), k / 2, d_alpha, swapped(d_bias)

    def own_post() -> Tensors:
        mixing = Mixing(b.f, b.post, b.h_res)
        dx, df, d_post, d_res, *_ = combine_gradients(b.sizes, b.x, b.dy, mixing)
        return df, dx, d_post, d_res

    return [
        Piece("sinkhorn, backward", sinkhorn, lambda own: [own.mT], "sinkhorn's",
              lambda: run_sinkhorn(own_logits, d_res, ITERATIONS, EPS)),
        Piece("split, backward", split, derived(b.split, (b.mixes, *gates), gradients)),
        Piece("norm, backward", norm, derived(b.norm, projected, [d_mixes])),
        Piece("coefficients, backward", coefficients, as_coefficients,
              "coefficient_gradients_kernel", own_coefficients),
        Piece("post, backward", call(tk.mhc_post_bwd, mixed, ()),
              lambda own: (*own[:3], own[3].mT), "combine's", own_post),
        Piece("apply, backward", apply, lambda own: own, "aggregate's",
              lambda: gradients_of_u(b.sizes, b.x, b.pre, b.du)),
    ]  # fmt: skip


def around(b: Buffers) -> list[Piece]:
    """What is not of every site: the norm's weight, a model's entry and exit."""
    tk, weight, d_fn = b.tk, torch.rand_like(b.fn[0]), torch.randn_like(b.fn)
    logits, scale, base = b.mixes[:, :N].contiguous(), b.scale[:1], b.base[:N]
    sms = importlib.import_module("tile_kernels.config").get_num_sms()
    sums = [b.scale.new_zeros(sms, size) for size in (1, N)]

    def head(*given: Tensor) -> Tensor:
        return b.reference.mhc_head_compute_mix_ref(*given, EPS)

    forward, backward = tk.mhc_head_compute_mix_fwd, tk.mhc_head_compute_mix_bwd
    d_head = call(backward, (b.d_pre, logits, scale, base), (*zeros(logits), *sums), sms)
    return [
        Piece("merge", call(tk.mhc_fn_normw_merge_fwd, (b.fn, weight), zeros(b.fn)),
              lambda _: [b.fn * weight]),
        Piece("merge, backward", call(
            tk.mhc_fn_normw_merge_bwd, (b.fn, weight, d_fn), zeros(b.fn, weight)),
            derived(torch.mul, (b.fn, weight), [d_fn])),
        Piece("expand", call(tk.expand_to_mhc_fwd, [b.f], zeros(b.x)),
              lambda _: [b.f[:, None].expand_as(b.x)]),
        Piece("expand, backward", call(tk.expand_to_mhc_bwd, [b.dy], zeros(b.f)),
              lambda _: [b.dy.float().sum(1)]),
        Piece("head", call(forward, (logits, scale, base), zeros(logits), EPS),
              lambda _: [head(logits, scale, base)]),
        Piece("head, backward", lambda: [d_head()[0], *(part.sum(0) for part in sums)],
              derived(head, (logits, scale, base), [b.d_pre])),
    ]  # fmt: skip


def recompute(b: Buffers) -> list[Piece]:
    """The streams and u of consecutive sites again; the tables of pointers are made beforehand."""
    run = importlib.import_module("tile_kernels.mhc.multilayer_recompute_cuda")
    f = [b.shapes.sublayer() for _ in range(BOUNDARIES)]
    u, own_u, y, own_y = (zeros(*like) for like in 2 * [[b.f, *f]] + 2 * [[b.x] * BOUNDARIES])
    listed = ([b.pre] * len(u), f, [b.post] * len(f), [b.matrix] * len(f), u, y)
    tables = [torch.tensor([t.data_ptr() for t in tensors], device="cuda") for tensors in listed]
    block = math.gcd(512, b.shapes.width)

    def theirs() -> Tensors:
        run.mhc_multilayer_recompute_cuda(b.x, *tables, n_thr=64, h_blk=block, use_pdl=False)
        return [*y, *u]

    def ours() -> tuple[list[Tensor], list[Tensor]]:  # keeps all that the tables point to
        ended = [Mixing(one, b.post, b.h_res) for one in f]
        return kernels.rebuild(b.x, listed[0], ended, ys=own_y, us=own_u, backend="triton")

    return [Piece("recompute", theirs, lambda own: [*own[0], *own[1]], "rebuild", ours)]
