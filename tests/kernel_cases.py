"""Inputs of the operations and their judgement against float64, for the CPU and the GPU tests.

Every error is a relative RMSE, |got - wanted| / |wanted|, of one named tensor.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_mhc import kernels
from megatron_mhc.kernels import reference

OPERATIONS = (
    *("sinkhorn", "coefficients", "aggregate", "pre", "combine", "combine_pre", "combine_read"),
    *("head", "hc_coefficients"),
)
PAPER: dict[str, Any] = {"pre_eps": 0.0, "sinkhorn_eps": 0.0, "norm_eps": 1e-6}
DEEPSEEK: dict[str, Any] = {"pre_eps": 1e-6, "sinkhorn_eps": 1e-6, "norm_eps": 1e-6}
LARGE_EPS: dict[str, Any] = {"pre_eps": 0.1, "sinkhorn_eps": 0.05, "norm_eps": 0.5}
"""Large enough that an operation or a gradient without one of them is far outside its bound."""
OTHER_FORMS: dict[str, Any] = {
    **LARGE_EPS,
    "norm_form": "outside_root",
    "sinkhorn_order": "rows_first",
}
"""Megatron's own forms, with eps as large."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROUNDING = {
    torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8,
    torch.float16: 2.0**-11,
}
"""Results in the dtype of x: half a unit in the last place (Triton's interpreter cuts bf16 off
instead of rounding it: a whole unit)."""
SMALL = {
    torch.bfloat16: 2e-5,
    torch.float16: 1e-5,
    torch.float32: 2e-6 if INTERPRETED else 1e-5,
}
"""fp32 results: fp32 sums (on a GPU of TF32 products), and for bf16 d_z and phi as two bf16 terms
each (2^-17, 2^-16 where they are cut off) in the streams' gradient, which d_h_post, d_h_res and
d_f_bias are sums of."""

DEVIATIONS = 4
"""alpha, scale: a sum over tokens and rows of terms that largely cancel. A term is as near as SMALL
says, so with errors that know nothing of each other the sum's is SMALL times the root of the sum of
the terms' squares. It is measured against that root, not against the sum, and may be so many times
SMALL: four standard deviations."""

CARDS = {
    # compute capability, bytes of shared memory a program, multiprocessors
    "A100": (80, 166_912, 108),
    "L40S": (89, 101_376, 142),
    "H100": (90, 232_448, 132),
    "B200": (100, 232_448, 148),
    "RTX5090": (120, 101_376, 170),
}


def inputs(
    operation: str, tokens: int, n: int, width: int, dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of an operation by name, at the scale of a trained model; all take gradients."""
    generator = torch.Generator().manual_seed(seed)
    rows = n * n + 2 * n

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    x, f = normal(tokens, n, width).to(dtype), normal(tokens, width).to(dtype)
    h_post = 2 * torch.sigmoid(normal(tokens, n))
    h_res = reference.sinkhorn(normal(tokens, n, n))
    projection = {
        "phi": normal(rows, n * width, scale=(n * width) ** -0.5),
        "alpha": torch.tensor([0.7, 1.1, 0.9]),
        "bias": normal(rows),
    }
    mixing = {"x": x, "f": f, "h_post": h_post, "h_res": h_res}
    arguments = {
        "sinkhorn": {"logits": normal(tokens, n, n, scale=3.0)},
        "coefficients": {"x": x, **projection},
        "aggregate": {"x": x, "h_pre": torch.sigmoid(normal(tokens, n))},
        "pre": {"x": x, **projection},
        "combine": {**mixing, "f_bias": normal(width)},
        "combine_pre": {**mixing, **projection, "f_bias": normal(width)},
        "combine_read": {
            **mixing,
            "h_pre": torch.sigmoid(normal(tokens, n)),
            **projection,
            "f_bias": normal(width),
        },
        "hc_coefficients": {
            "x": x,
            "theta": normal(n + 2, width, scale=width**-0.5),
            "alpha": projection["alpha"],
            "bias": projection["bias"],
        },
        "head": {
            "x": x,
            "fn": normal(n, n * width, scale=(n * width) ** -0.5),
            "scale": torch.tensor([0.8]),
            "base": normal(n),
        },
    }[operation]
    return {name: tensor.to(device).requires_grad_() for name, tensor in arguments.items()}


def settings(operation: str, convention: dict[str, Any], iterations: int) -> dict[str, Any]:
    """The keyword arguments of an operation in this convention."""
    if operation == "sinkhorn":
        return {"iterations": iterations, "eps": convention["sinkhorn_eps"]}
    if operation == "head":
        return {name: convention[name] for name in ("pre_eps", "norm_eps")}
    if operation in ("aggregate", "combine", "hc_coefficients"):
        return {}
    return {"iterations": iterations, **convention}


def run(
    function: Callable[..., Any], arguments: dict[str, Tensor], **keywords: Any
) -> tuple[Tensor, ...]:
    """The results of an operation, always as a tuple."""
    out = function(**arguments, **keywords)
    return out if isinstance(out, tuple) else (out,)


def _reference(operation: str, y: Tensor | None) -> Callable[..., Any]:
    """The definition; the second half of a boundary starts from the y that was rounded."""
    if operation not in ("combine_pre", "combine_read"):
        return getattr(reference, operation)

    def from_rounded(  # type: ignore[no-untyped-def]
        x, f, h_post, h_res, phi, alpha, bias, f_bias, h_pre=None, **keywords: Any
    ):
        exact = reference.combine(x, f, h_post, h_res, f_bias)
        rounded = exact + (y.detach().double() - exact).detach()
        if h_pre is None:
            return exact, *reference.pre(rounded, phi, alpha, bias, **keywords)
        u = reference.aggregate(rounded, h_pre)
        return exact, u, *reference.coefficients(rounded, phi, alpha, bias, **keywords)

    return from_rounded


def relative(got: Tensor, wanted: Tensor) -> float:
    """Relative RMSE; infinite where a value is missing or not finite."""
    got = got.double()
    if got.shape != wanted.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    norm = wanted.norm().item()
    return ((got - wanted).norm().item() / norm) if norm > 0 else got.norm().item()


def _a_row_and_token(scales: Tensor, tokens: int, n: int) -> tuple[Tensor, ...]:
    """alpha or scale as leaves [tokens, rows], one for each number. The reference multiplies
    logits with them all the same; their gradients are the terms of its gradient."""
    rows = (n, n, n * n)[: scales.numel()]
    wide = scales.detach().double()
    return tuple(
        scale.expand(tokens, count).clone().requires_grad_()
        for scale, count in zip(wide, rows, strict=True)
    )


def errors(
    operation: str, arguments: dict[str, Tensor], keywords: dict[str, Any], seed: int = 1
) -> dict[str, tuple[float, torch.dtype]]:
    """Errors against float64 of every result and every gradient, by name, with their dtype."""
    got = run(getattr(kernels, operation), arguments, backend="triton", **keywords)
    exact: dict[str, Any] = {k: v.detach().double().requires_grad_() for k, v in arguments.items()}
    for name in {"alpha", "scale"} & exact.keys():
        tokens, n, _ = arguments["x"].shape
        terms = _a_row_and_token(arguments[name], tokens, n)
        exact[name] = terms if name == "alpha" else terms[0]
    wanted = run(_reference(operation, got[0]), exact, **keywords)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(r.shape, generator=generator).to(r.device, r.dtype) for r in got]
    torch.autograd.backward(got, weights)
    torch.autograd.backward(wanted, [weight.double() for weight in weights])
    table = {
        f"result {i}": (relative(a.detach(), b.detach()), a.dtype)
        for i, (a, b) in enumerate(zip(got, wanted, strict=True))
    }
    for name, argument in arguments.items():
        if name in ("alpha", "scale"):
            leaves = exact[name] if name == "alpha" else (exact[name],)
            terms = [leaf.grad for leaf in leaves]
            wrong = argument.grad.double() - torch.stack([term.sum() for term in terms])
            root = sum(term.square().sum() for term in terms).sqrt()
            error = float(wrong.norm() / root) if wrong.isfinite().all() else float("inf")
            table[f"d_{name}"] = (error, argument.dtype)
            continue
        table[f"d_{name}"] = (relative(argument.grad, exact[name].grad), argument.dtype)
    return table


def check(
    operation: str,
    tokens: int,
    n: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    convention: dict[str, Any] = PAPER,
    iterations: int = 20,
) -> None:
    """Assert that every result and gradient of one case is as near float64 as its dtype allows."""
    arguments = inputs(operation, tokens, n, width, dtype, device)
    keywords = settings(operation, convention, iterations)
    for name, (error, result_dtype) in errors(operation, arguments, keywords).items():
        small = result_dtype == torch.float32 and dtype != torch.float32
        bound = SMALL[dtype] if small or dtype == torch.float32 else ROUNDING[result_dtype]
        if name in ("d_alpha", "d_scale"):
            bound = DEVIATIONS * SMALL[dtype]
        assert error <= bound, f"{operation}: {name} is off by {error:.2e} > {bound:.1e}"


def check_rebuild(
    tokens: int,
    n: int,
    width: int,
    sites: int,
    dtype: torch.dtype,
    device: str,
    backend: str = "triton",
) -> None:
    """Assert that `rebuild` writes the bits that `pre` and `combine_pre` returned, site by site."""
    first = inputs("pre", tokens, n, width, dtype, device)
    x = first["x"].detach()
    parameters = {name: first[name] for name in ("phi", "alpha", "bias")}
    options: dict[str, Any] = {**DEEPSEEK, "iterations": 3, "backend": backend}
    plain = kernels.pre(x, **parameters, **options)
    *again, weights = kernels.pre_with_h_pre(x, **parameters, **options)
    assert all(map(torch.equal, plain, again)) and not weights.requires_grad
    u, h_post, h_res = again
    y, ys, us, h_pre, ended = x, [], [u], [weights], []
    for site in range(1, sites):
        own = inputs("combine_pre", tokens, n, width, dtype, device, seed=site)
        f_bias = own["f_bias"] if site % 2 else None  # an attention's, and none of an MoE's
        parameters = {name: own[name] for name in ("phi", "alpha", "bias")}
        mixing = (own["f"], h_post, h_res)
        plain = kernels.combine_pre(y, *mixing, **parameters, f_bias=f_bias, **options)
        *again, weights = kernels.combine_pre_with_h_pre(
            y, *mixing, **parameters, f_bias=f_bias, **options
        )
        assert all(map(torch.equal, plain, again)), site
        ended.append((*mixing, f_bias))
        y, u, h_post, h_res = again
        ys.append(y)
        us.append(u)
        h_pre.append(weights)
    poisoned = [[torch.full_like(t, torch.nan) for t in tensors] for tensors in (ys, us)]
    for given in ({}, dict(zip(("ys", "us"), poisoned, strict=True))):
        new_ys, new_us = kernels.rebuild(x, h_pre, ended, **given, backend=backend)
        for name, got, wanted in (("y", new_ys, ys), ("u", new_us, us)):
            for site, (a, b) in enumerate(zip(got, wanted, strict=True)):
                assert torch.equal(a, b), f"{name} of site {site} differs"
    assert all(map(torch.equal, poisoned[0], ys)) and all(map(torch.equal, poisoned[1], us))
