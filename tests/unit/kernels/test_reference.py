"""The definition against formulas written out element by element in float64."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megatron_mhc.kernels import reference

STREAMS = (1, 2, 3, 4, 8)
CONVENTIONS = {"paper": (0.0, 0.0), "deepseek_v4": (1e-6, 1e-6)}  # pre_eps, sinkhorn_eps


def site_inputs(n: int, width: int = 5, tokens: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """x, f and the parameters of a site with weights of a trained model's size, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = n * n + 2 * n
    return {
        "x": normal(tokens, n, width),
        "f": normal(tokens, width),
        "phi": 0.3 * normal(rows, n * width),
        "alpha": 0.5 + 0.1 * normal(3),
        "bias": normal(rows),
    }


def sinkhorn_by_hand(logits: list[list[float]], iterations: int, eps: float) -> list[list[float]]:
    """Scalar loops: the paper's eq. 9 for eps 0, DeepSeek-V4's loop transposed for eps > 0."""
    n = len(logits)
    span = range(n)
    if eps == 0.0:
        m = [[math.exp(logits[i][j]) for j in span] for i in span]
        steps = iterations
    else:
        # V4 holds comb[src][dst]: softmax over its last index, + eps, then / (sum over src + eps)
        comb = [[math.exp(logits[dst][src]) for dst in span] for src in span]
        comb = [[value / sum(row) + eps for value in row] for row in comb]
        sums = [sum(comb[src][dst] for src in span) + eps for dst in span]
        m = [[comb[src][dst] / sums[dst] for src in span] for dst in span]
        steps = iterations - 1
    for _ in range(steps):
        columns = [sum(m[i][j] for i in span) + eps for j in span]
        m = [[m[i][j] / columns[j] for j in span] for i in span]
        m = [[value / (sum(row) + eps) for value in row] for row in m]
    return m


def coefficients_by_hand(
    p: dict[str, Tensor], token: int, pre_eps: float, sinkhorn_eps: float, iterations: int
) -> tuple[list[float], list[float], list[list[float]]]:
    """H_pre, H_post and H_res of one token with scalar arithmetic (paper eq. 7 and 8)."""
    x = p["x"][token]
    n = x.shape[0]
    v = [value for stream in x.tolist() for value in stream]
    r = math.sqrt(sum(value * value for value in v) / len(v) + 1e-6)

    def logit(row: int, group: int) -> float:
        z = sum(a * b / r for a, b in zip(v, p["phi"][row].tolist(), strict=True))
        return p["alpha"][group].item() * z + p["bias"][row].item()

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    pre = [sigmoid(logit(j, 0)) + pre_eps for j in range(n)]
    post = [2 * sigmoid(logit(n + j, 1)) for j in range(n)]
    res = [[logit(2 * n + dst * n + src, 2) for src in range(n)] for dst in range(n)]
    return pre, post, sinkhorn_by_hand(res, iterations, sinkhorn_eps)


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_boundary_equals_scalar_formulas(n: int, convention: str) -> None:
    pre_eps, sinkhorn_eps = CONVENTIONS[convention]
    p, following = site_inputs(n), site_inputs(n, seed=1)
    options = {"iterations": 7, "pre_eps": pre_eps, "sinkhorn_eps": sinkhorn_eps}
    f_bias = torch.linspace(-1, 1, 5, dtype=torch.float64)
    u, h_post, h_res = reference.pre(p["x"], p["phi"], p["alpha"], p["bias"], **options)
    y, u_next, post_next, res_next = reference.combine_pre(
        p["x"],
        p["f"],
        h_post,
        h_res,
        following["phi"],
        following["alpha"],
        following["bias"],
        f_bias=f_bias,
        **options,
    )
    for token in range(3):
        pre, post, res = coefficients_by_hand(p, token, pre_eps, sinkhorn_eps, 7)
        x, f = p["x"][token].tolist(), (p["f"][token] + f_bias).tolist()
        span, channels = range(n), range(5)
        want_u = [sum(pre[j] * x[j][c] for j in span) for c in channels]
        want_y = [
            [sum(res[i][j] * x[j][c] for j in span) + post[i] * f[c] for c in channels]
            for i in span
        ]
        # 1e-13: a few hundred float64 roundings
        close = {"rtol": 1e-13, "atol": 1e-13}
        torch.testing.assert_close(u[token], torch.tensor(want_u, dtype=torch.float64), **close)
        torch.testing.assert_close(y[token], torch.tensor(want_y, dtype=torch.float64), **close)
        next_pre, next_post, next_res = coefficients_by_hand(
            {**following, "x": y}, token, pre_eps, sinkhorn_eps, 7
        )
        for got, want in ((post_next, next_post), (res_next, next_res)):
            torch.testing.assert_close(got[token], torch.tensor(want, dtype=torch.float64), **close)
        want_u = [sum(next_pre[j] * y[token, j, c].item() for j in span) for c in channels]
        torch.testing.assert_close(
            u_next[token], torch.tensor(want_u, dtype=torch.float64), **close
        )


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_gradient(n: int, convention: str) -> None:
    # from n = 4 on along random directions: 288 entries of phi one by one take ten seconds
    check = functools.partial(gradcheck, fast_mode=n >= 4)
    pre_eps, sinkhorn_eps = CONVENTIONS[convention]
    options = {"iterations": 5, "pre_eps": pre_eps, "sinkhorn_eps": sinkhorn_eps}
    p, following = site_inputs(n, width=3, tokens=2), site_inputs(n, width=3, tokens=2, seed=1)
    h_pre, h_post, h_res = reference.coefficients(
        p["x"], p["phi"], p["alpha"], p["bias"], **options
    )
    bias = torch.ones(3, dtype=torch.float64)
    parameters = [following[name] for name in ("phi", "alpha", "bias")]

    def inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.detach().clone().requires_grad_() for t in tensors)

    assert check(lambda x: reference.sinkhorn(x, 5, sinkhorn_eps), inputs(h_res.log()))
    assert check(lambda *a: reference.coefficients(*a, **options), inputs(p["x"], *parameters))
    assert check(reference.aggregate, inputs(p["x"], h_pre))
    assert check(reference.combine, inputs(p["x"], p["f"], h_post, h_res, bias))
    assert check(
        lambda x, f, post, res, phi, alpha, beta, b: reference.combine_pre(
            x, f, post, res, phi, alpha, beta, f_bias=b, **options
        ),
        inputs(p["x"], p["f"], h_post, h_res, *parameters, bias),
    )
    fn, base = parameters[0][:n], parameters[2][:n]
    assert check(reference.head, inputs(p["x"], fn, torch.ones(1).double(), base))
    theta = following["phi"][: n + 2, :3] if n > 1 else following["phi"][:3, :3]
    assert check(
        reference.hc_coefficients, inputs(p["x"], theta, following["alpha"], following["bias"])
    )


# What 20 steps reach on 20,000 matrices of N(0, scale) logits: the 99th percentile of the column
# error as measured (1.5e-6, 0.033, 0.11 and 1.0; eps keeps large logits at 0.064 and 0.055), times
# two for other random numbers.
@pytest.mark.parametrize(
    ("scale", "eps", "column_bound"),
    [
        (1.0, 0.0, 3e-6),
        (3.0, 0.0, 0.066),
        (10.0, 0.0, 0.22),
        (80.0, 0.0, 2.0),
        (1.0, 1e-6, 5e-6),
        (3.0, 1e-6, 0.066),
        (10.0, 1e-6, 0.13),
        (80.0, 1e-6, 0.11),
    ],
)
def test_row_and_column_sums(scale: float, eps: float, column_bound: float) -> None:
    logits = scale * torch.randn(20_000, 4, 4, generator=torch.Generator().manual_seed(0))
    matrix = reference.sinkhorn(logits, 20, eps)
    assert matrix.isfinite().all() and (matrix >= 0).all()
    # rows are divided last: exact to rounding; with eps they miss one by about 1e-6
    assert (matrix.sum(-1) - 1).abs().max() < (1e-6 if eps == 0 else 1.5e-6)
    column_error = (matrix.sum(-2) - 1).abs().amax(-1)
    assert column_error.quantile(0.99) < column_bound


def test_logits_of_eighty_agree_with_float64() -> None:
    logits = 160 * torch.rand(5_000, 4, 4, generator=torch.Generator().manual_seed(0)) - 80
    exact = reference.sinkhorn(logits.double())
    # logits of 80 carry fp32 roundings of 4e-6, and exp turns them into relative errors
    assert (reference.sinkhorn(logits) - exact).abs().max() < 2e-5


def test_sinkhorn_of_permutations_and_constants() -> None:
    uniform = reference.sinkhorn(torch.zeros(3, 3))
    torch.testing.assert_close(uniform, torch.full((3, 3), 1 / 3))
    for order in itertools.permutations(range(3)):
        logits = 60 * torch.eye(3)[list(order)]
        torch.testing.assert_close(reference.sinkhorn(logits), torch.eye(3)[list(order)])


def test_deepseek_v4_rows_transpose() -> None:
    """V4 orders the res rows [src, dst]: permuted, its own y is ours."""
    n = 4
    p = site_inputs(n)
    options = {"pre_eps": 1e-6, "sinkhorn_eps": 1e-6}
    _, h_post, h_res = reference.pre(p["x"], p["phi"], p["alpha"], p["bias"], **options)
    v4_phi, v4_bias = (reference.transpose_res_rows(p[k], n) for k in ("phi", "bias"))
    v = p["x"].flatten(-2)
    z = v @ v4_phi.t() * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-6)
    comb = (p["alpha"][2] * z[:, 2 * n :] + v4_bias[2 * n :]).view(-1, n, n)  # [T, src, dst]
    comb = comb.softmax(-1) + 1e-6
    comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    torch.testing.assert_close(h_res, comb.transpose(-1, -2), rtol=1e-13, atol=1e-13)
    y = torch.einsum("tij,tic->tjc", comb, p["x"]) + h_post.unsqueeze(-1) * p["f"].unsqueeze(-2)
    torch.testing.assert_close(
        reference.combine(p["x"], p["f"], h_post, h_res), y, rtol=1e-13, atol=1e-13
    )


def test_hc_equals_scalar_formulas() -> None:
    n, width = 3, 5
    p = site_inputs(n)
    theta = site_inputs(n, seed=2)["phi"][: n + 2, :width]
    h_pre, h_post, h_res = reference.hc_coefficients(p["x"], theta, p["alpha"], p["bias"])
    for token, j in itertools.product(range(3), range(n)):
        stream = p["x"][token, j].tolist()
        r = math.sqrt(sum(value * value for value in stream) / width + 1e-6)

        def mixed(row: int, stream: list[float] = stream, r: float = r) -> float:
            return math.tanh(
                sum(a / r * b for a, b in zip(stream, theta[row].tolist(), strict=True))
            )

        alpha, bias = p["alpha"].tolist(), p["bias"].tolist()
        assert h_pre[token, j].item() == pytest.approx(alpha[0] * mixed(0) + bias[j], rel=1e-13)
        assert h_post[token, j].item() == pytest.approx(
            alpha[1] * mixed(1) + bias[n + j], rel=1e-13
        )
        for dst in range(n):
            want = alpha[2] * mixed(2 + dst) + bias[2 * n + dst * n + j]
            assert h_res[token, dst, j].item() == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_streams_keep_fp32_coefficients(dtype: torch.dtype) -> None:
    """Rows of H_res sum to one to fp32's rounding for any x; u and y round once, at the end."""
    p = site_inputs(4, width=64, tokens=50)
    x, f = p["x"].to(dtype), p["f"].to(dtype)
    parameters = [p[name].float() for name in ("phi", "alpha", "bias")]
    u, h_post, h_res = reference.pre(x, *parameters)
    assert (u.dtype, h_post.dtype, h_res.dtype) == (dtype, torch.float32, torch.float32)
    assert (h_res.sum(-1) - 1).abs().max() < 1e-6
    exact = reference.pre(x.double(), *(t.double() for t in parameters))
    # fp32 arithmetic on logits of a few units, and one rounding of u to its dtype
    torch.testing.assert_close(h_res.double(), exact[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        u.double(), exact[0], rtol=torch.finfo(dtype).eps, atol=8 * torch.finfo(torch.float32).eps
    )
    y = reference.combine(x, f, h_post, h_res)
    want = reference.combine(x.double(), f.double(), h_post.double(), h_res.double())
    torch.testing.assert_close(y.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)
