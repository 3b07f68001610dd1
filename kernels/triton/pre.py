"""`pre` in Triton, and `coefficients`, which is `pre` without u = H_pre x."""

from torch import Tensor

from ..arguments import DEFAULT, Options
from .passes.finish import Finished, finish
from .passes.projection import combine_and_project
from .passes.stream_gradients import streams_gradients
from .passes.token_gradients import token_gradients
from .torch_operator import operator


def _forward(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, options: Options, *, aggregate: bool
) -> Finished:
    _, partial = combine_and_project(x, phi, None)
    return finish(x, partial, alpha, bias, options, aggregate=aggregate)


def _gradients(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    z_over_r: Tensor,
    inverse_r: Tensor,
    options: Options,
    **given: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, phi, alpha and bias from those of u or h_pre, of h_post and of h_res."""
    token = token_gradients(x, z_over_r, inverse_r, alpha, bias, options, **given)
    out = streams_gradients(x, du=given.get("du"), phi=phi, token=token)
    return out.dx, out.d_phi, token.d_alpha, token.d_bias


@operator("pre", "u", "h_post", "h_res", "h_pre", "z_over_r", "inverse_r")
def _pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [T, n, C] -> u, h_post, h_res, h_pre; for the backward z / r [T, rows] and 1 / r [T]."""
    out = _forward(x, phi, alpha, bias, options, aggregate=True)
    return out.u, out.h_post, out.h_res, out.h_pre, out.z_over_r, out.inverse_r


@_pre.gradient
def _pre_backward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    z_over_r: Tensor,
    inverse_r: Tensor,
    du: Tensor | None,
    d_post: Tensor | None,
    d_res: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = {"du": du, "d_post": d_post, "d_res": d_res}
    return _gradients(x, phi, alpha, bias, z_over_r, inverse_r, options, **given)


@operator("coefficients", "h_pre", "h_post", "h_res", "z_over_r", "inverse_r")
def _coefficients(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [T, n, C] -> h_pre, h_post, h_res, and for the backward z / r [T, rows] and 1 / r [T]."""
    out = _forward(x, phi, alpha, bias, options, aggregate=False)
    return out.h_pre, out.h_post, out.h_res, out.z_over_r, out.inverse_r


@_coefficients.gradient
def _coefficients_backward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    z_over_r: Tensor,
    inverse_r: Tensor,
    d_pre: Tensor | None,
    d_post: Tensor | None,
    d_res: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = {"d_pre": d_pre, "d_post": d_post, "d_res": d_res}
    return _gradients(x, phi, alpha, bias, z_over_r, inverse_r, options, **given)


def _dense(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The token dimensions of x as one; all of them contiguous."""
    flat = x.reshape(-1, *x.shape[-2:]).contiguous()
    return flat, *(parameter.contiguous() for parameter in parameters)


def coefficients(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, options: Options = DEFAULT
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.coefficients`."""
    tokens, n = x.shape[:-2], x.shape[-2]
    h_pre, h_post, h_res, _, _ = _coefficients(*_dense(x, phi, alpha, bias), *options)
    return h_pre.view(*tokens, n), h_post.view(*tokens, n), h_res.view(*tokens, n, n)


def pre_with_h_pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, options: Options = DEFAULT
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.pre_with_h_pre`."""
    tokens, (n, width) = x.shape[:-2], x.shape[-2:]
    u, h_post, h_res, h_pre, _, _ = _pre(*_dense(x, phi, alpha, bias), *options)
    return (
        u.view(*tokens, width),
        h_post.view(*tokens, n),
        h_res.view(*tokens, n, n),
        h_pre.detach().view(*tokens, n),
    )


def pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, options: Options = DEFAULT
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.pre`."""
    return pre_with_h_pre(x, phi, alpha, bias, options=options)[:3]
