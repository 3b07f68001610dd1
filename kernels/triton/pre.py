"""`pre` in Triton, and `coefficients`, which is `pre` without u = H_pre x.

`coefficients` serves delayed sites, which read with another H_pre, and has the bits of their fused
boundary, `combine_read`.
"""

from torch import Tensor

from ..arguments import DEFAULT, Options, Sizes
from .passes.coefficient_gradients import coefficient_gradients
from .passes.coefficients import Coefficients, coefficients_and_u
from .passes.projection import combine_and_project
from .passes.stream_gradients import stream_gradients
from .torch_operator import operator


def _forward(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, options: Options, *, aggregate: bool
) -> Coefficients:
    sizes = Sizes.of(x)
    _, partial = combine_and_project(sizes, x, phi, None, delayed=not aggregate)
    leading = x.shape[:-2]
    return coefficients_and_u(sizes, leading, x, partial, alpha, bias, options, aggregate=aggregate)


def _gradients(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    normed: Tensor,
    options: Options,
    **given: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, phi, alpha and bias from those of u or h_pre, of h_post and of h_res."""
    sizes = Sizes.of(x)
    token = coefficient_gradients(sizes, x, normed, alpha, bias, options, **given)
    out = stream_gradients(sizes, x, du=given.get("du"), phi=phi, token=token)
    return out.dx, out.d_phi, token.d_alpha, token.d_bias


@operator("pre", "u", "h_post", "h_res", "h_pre", "normed")
def _pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [..., n, C] -> u, h_post, h_res, h_pre; normed."""
    out = _forward(x, phi, alpha, bias, options, aggregate=True)
    return out.u, out.h_post, out.h_res, out.h_pre, out.normed


@_pre.gradient
def _pre_backward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    normed: Tensor,
    du: Tensor | None,
    d_post: Tensor | None,
    d_res: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = {"du": du, "d_post": d_post, "d_res": d_res}
    return _gradients(x, phi, alpha, bias, normed, options, **given)


@operator("coefficients", "h_pre", "h_post", "h_res", "normed")
def _coefficients(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [..., n, C] -> h_pre, h_post, h_res; normed."""
    out = _forward(x, phi, alpha, bias, options, aggregate=False)
    return out.h_pre, out.h_post, out.h_res, out.normed


@_coefficients.gradient
def _coefficients_backward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    normed: Tensor,
    d_pre: Tensor | None,
    d_post: Tensor | None,
    d_res: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = {"d_pre": d_pre, "d_post": d_post, "d_res": d_res}
    return _gradients(x, phi, alpha, bias, normed, options, **given)


def coefficients(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, options: Options = DEFAULT
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.coefficients`."""
    return _coefficients(x, phi, alpha, bias, options)


def pre_with_h_pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, options: Options = DEFAULT
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.pre_with_h_pre`."""
    return _pre(x, phi, alpha, bias, options)


def pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, options: Options = DEFAULT
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.pre`."""
    return _pre(x, phi, alpha, bias, options)[:3]
