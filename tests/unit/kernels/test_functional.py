"""The public operations: what they refuse, and which implementation they run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_mhc import MHCConfig, kernels
from megatron_mhc.kernels import backend, checks
from megatron_mhc.start.banner import banner
from tests.kernel_cases import check_rebuild

X = torch.randn(2, 3, 4, 8)
F = torch.randn(2, 3, 8)
PHI, ALPHA, BIAS = torch.randn(24, 32), torch.ones(3), torch.zeros(24)
POST, RES = torch.rand(2, 3, 4), torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.pre(X[0, 0, 0], PHI, ALPHA, BIAS), "x has shape"),
        (lambda: kernels.pre(X.int(), PHI, ALPHA, BIAS), "x has dtype torch.int32"),
        (
            lambda: kernels.pre(X, PHI.t(), ALPHA, BIAS),
            r"phi has shape \(32, 24\); expected \(24, 32\)",
        ),
        (lambda: kernels.pre(X, PHI.bfloat16(), ALPHA, BIAS), "phi has dtype torch.bfloat16"),
        (lambda: kernels.pre(X, PHI.to("meta"), ALPHA, BIAS), "phi is on meta; expected cpu"),
        (lambda: kernels.coefficients(X, PHI, ALPHA[:2], BIAS), r"alpha has shape \(2,\)"),
        (lambda: kernels.coefficients(X, PHI, ALPHA, BIAS[1:]), r"bias has shape \(23,\)"),
        (lambda: kernels.pre(X, PHI, ALPHA, BIAS, iterations=0), "iterations is 0"),
        (lambda: kernels.sinkhorn(RES[..., :3], 5), "expected [[]..., n, n[]]"),
        (lambda: kernels.sinkhorn(RES, 0), "iterations is 0"),
        (lambda: kernels.sinkhorn(RES, 2.5), "iterations is 2.5; expected a whole number"),
        (lambda: kernels.sinkhorn(RES.long()), "logits has dtype torch.int64; expected one of"),
        (lambda: kernels.sinkhorn(RES + 0j), "logits has dtype torch.complex64; expected one of"),
        (lambda: kernels.aggregate(X, POST[:1]), "h_pre has shape"),
        (lambda: kernels.aggregate(X, POST.double()), "h_pre has dtype torch.float64"),
        (lambda: kernels.combine(X, F.double(), POST, RES), "f has dtype torch.float64"),
        (lambda: kernels.combine(X, F[..., :7], POST, RES), "f has shape"),
        (lambda: kernels.combine(X, F, POST[..., :3], RES), "h_post has shape"),
        (lambda: kernels.combine(X, F, POST, RES[..., :3]), "h_res has shape"),
        (lambda: kernels.combine(X, F, POST, RES, torch.ones(9)), "f_bias has shape"),
        (lambda: kernels.combine_pre(X, F, POST, RES, PHI[1:], ALPHA, BIAS), "phi has shape"),
        *(
            (
                lambda flat=flat: kernels.combine(flat, F[..., :1], POST, RES),
                r"expected \[..., n, C\] or \[..., n\*C\], n = 4 as in h_post",
            )
            for flat in (torch.randn(2, 3, 33), torch.randn(2, 3, 3), torch.randn(2, 3, 0))
        ),
        (lambda: kernels.combine(X.flatten(2).int(), F, POST, RES), "x has dtype torch.int32"),
        (lambda: kernels.head(X, PHI, ALPHA[:1], BIAS[:4]), "fn has shape"),
        (lambda: kernels.head(X, PHI[:4], ALPHA, BIAS[:4]), "scale has shape"),
        (lambda: kernels.hc_coefficients(X, PHI, ALPHA, BIAS), "theta has shape"),
        (lambda: kernels.pre_with_h_pre(X, PHI[1:], ALPHA, BIAS), "phi has shape"),
        (
            lambda: kernels.combine_pre_with_h_pre(X, F[1:], POST, RES, PHI, ALPHA, BIAS),
            "f has shape",
        ),
        (lambda: kernels.rebuild(X, [POST], [(F, POST, RES, None)]), "expected one more h_pre"),
        (lambda: kernels.rebuild(X, [POST[:1]], []), r"h_pre\[0\] has shape"),
        (
            lambda: kernels.rebuild(X, [POST, POST], [(F[1:], POST, RES, None)]),
            r"ended\[0\]'s f has shape",
        ),
        (lambda: kernels.rebuild(X, [POST], [], us=[]), "us has 0 tensors; expected 1"),
        (
            lambda: kernels.rebuild(X, [POST], [], us=[torch.ones(8, 3, 2).transpose(0, 2)]),
            r"us\[0\] is not contiguous",
        ),
        (lambda: kernels.pre(X, PHI, ALPHA, BIAS, backend="cuda"), "backend is 'cuda'"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_fits_is_looked_at_once_and_what_does_not_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another shape, dtype or absent tensor is looked at anew; when many are known, they go."""
    looked: list[Any] = []
    check = checks.check
    monkeypatch.setattr(checks, "check", lambda *a: looked.append(a[0]) or check(*a))
    monkeypatch.setattr(checks, "_passed", {})
    monkeypatch.setattr(checks, "MOST_KINDS", 3)

    def looks(*arguments: Any) -> int:
        looked.clear()
        kernels.combine(*arguments)
        return len(looked)

    other = (X.bfloat16(), F.bfloat16(), POST, RES)
    fits = (X, F, POST, RES)
    assert [looks(*a) for a in (fits, fits, other, other, fits)] == [3, 0, 3, 0, 0]
    assert [looks(*fits, F[0, 0]), looks(*fits, F[0, 0]), looks(*fits)] == [4, 0, 0]
    for _ in range(2):
        with pytest.raises(ValueError, match="f has dtype"):
            kernels.combine(X, F.double(), POST, RES)
    assert looks(X[:1], F[:1], POST[:1], RES[:1]) == 3 and len(checks._passed) == 1
    assert looks(*fits) == 3


def test_streams_may_be_one_dimension() -> None:
    """[..., n*C] for [..., n, C]: y is in the shape of x, all else as it was."""
    wide = X.flatten(-2)
    y = kernels.combine(wide, F, POST, RES)
    assert torch.equal(y, kernels.combine(X, F, POST, RES).flatten(-2))
    for operation in (kernels.combine_pre, kernels.combine_pre_with_h_pre):
        got = operation(wide, F, POST, RES, PHI, ALPHA, BIAS)
        want = operation(X, F, POST, RES, PHI, ALPHA, BIAS)
        assert torch.equal(got[0], want[0].flatten(-2))
        assert all(map(torch.equal, got[1:], want[1:]))


def test_operations_are_the_references() -> None:
    options = {"iterations": 3, "norm_eps": 1e-5, "pre_eps": 1e-3, "sinkhorn_eps": 1e-4}
    reference = kernels.reference
    for got, want in (
        (kernels.sinkhorn(RES, 3, 1e-4), reference.sinkhorn(RES, 3, 1e-4)),
        (
            kernels.coefficients(X, PHI, ALPHA, BIAS, **options),
            reference.coefficients(X, PHI, ALPHA, BIAS, **options),
        ),
        (
            kernels.pre(X, PHI, ALPHA, BIAS, **options),
            reference.pre(X, PHI, ALPHA, BIAS, **options),
        ),
        (kernels.aggregate(X, POST), reference.aggregate(X, POST)),
        (kernels.combine(X, F, POST, RES, F[0, 0]), reference.combine(X, F, POST, RES, F[0, 0])),
        (
            kernels.combine_pre(X, F, POST, RES, PHI, ALPHA, BIAS, f_bias=F[0, 0], **options),
            reference.combine_pre(X, F, POST, RES, PHI, ALPHA, BIAS, f_bias=F[0, 0], **options),
        ),
        (
            kernels.head(X, PHI[:4], ALPHA[:1], BIAS[:4], pre_eps=0.1),
            reference.head(X, PHI[:4], ALPHA[:1], BIAS[:4], pre_eps=0.1),
        ),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_no_tokens_are_fine() -> None:
    x = X[:0].requires_grad_()
    u, h_post, h_res = kernels.pre(x, PHI, ALPHA, BIAS)
    y = kernels.combine(x, F[:0], h_post, h_res)
    (u.sum() + y.sum()).backward()
    assert (u.shape, y.shape, h_res.shape) == ((0, 3, 8), (0, 3, 4, 8), (0, 3, 4, 4))
    assert x.grad is not None and x.grad.shape == x.shape


def test_triton_on_a_cpu_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="Triton needs a CUDA device and the tensors are on 'cpu'"):
        kernels.pre(X, PHI, ALPHA, BIAS, backend="triton")
    with pytest.raises(ValueError, match="no Triton kernel for 3 streams"):
        backend.resolve("triton", 3, torch.device("cuda"))


def test_use_backend_is_scoped() -> None:
    cpu = torch.device("cpu")
    assert backend.resolve(None, 4, cpu) == "torch"
    with kernels.use_backend("triton"):
        with pytest.raises(ValueError, match="backend is 'triton'"):
            kernels.aggregate(X, POST)
        with kernels.use_backend("torch"):
            assert backend.resolve(None, 4, cpu) == "torch"
        kernels.aggregate(X, POST, backend="auto")
    kernels.aggregate(X, POST)
    with pytest.raises(ValueError, match="expected one of"), kernels.use_backend("cuda"):  # type: ignore[arg-type]
        pass


def test_auto_takes_triton_on_a_gpu_where_there_is_a_kernel() -> None:
    cuda = torch.device("cuda")
    assert [backend.resolve("auto", n, cuda) for n in (1, 2, 3, 4, 8)] == [
        *("triton", "triton", "torch", "triton", "triton")
    ]


class Card:
    """What a device says of itself; counts how often it is asked."""

    name = "RTX 8000"

    def __init__(self, major: int, minor: int) -> None:
        self.major, self.minor, self.asked = major, minor, 0

    def __call__(self, device: torch.device) -> "Card":
        self.asked += 1
        return self


@pytest.fixture
def no_card_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_cards", {}, raising=False)


@pytest.mark.usefixtures("no_card_is_known")
@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        (
            (7, 5),
            None,
            "the kernels need a GPU of compute capability 8.0 or higher and the RTX 8000 has 7.5",
        ),
        (
            (9, 4),
            "6.2.41133",
            "the kernels are written for NVIDIA's GPUs and this PyTorch is one for ROCm",
        ),
        ((8, 0), None, None),
        ((12, 0), None, None),
    ],
)
def test_cards_that_the_kernels_do_not_run_on(
    capability: tuple[int, int],
    hip: str | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card, cuda = Card(*capability), torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", card)
    assert backend.resolve("auto", 4, cuda) == ("torch" if reason else "triton")
    assert backend.resolve("torch", 4, cuda) == "torch"
    line = banner(MHCConfig(), "flags", 24, 1000, cuda, torch.bfloat16)
    if reason is None:
        assert backend.resolve("triton", 4, cuda) == "triton"
        assert "backend triton;" in line and "The first step compiles the kernels" in line
    else:
        assert "compiles" not in line
        assert f"backend torch, because {reason}" in line
        with pytest.raises(ValueError, match=f"{reason}.*; use 'auto' or 'torch'"):
            backend.resolve("triton", 4, cuda)
    assert card.asked <= 1, "a device is asked once, not at every operation"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_references_rebuild_equals_its_forward_to_the_bit(dtype: torch.dtype) -> None:
    check_rebuild(5, 3, 7, 4, dtype, "cpu", backend="torch")


def test_tensors_without_memory_have_results_without_memory() -> None:
    arguments = [tensor.to("meta") for tensor in (X, F, POST, RES, PHI, ALPHA, BIAS)]
    results = kernels.combine_pre(*arguments)
    assert [r.shape for r in results] == [X.shape, F.shape, POST.shape, RES.shape]
    assert {r.device.type for r in results} == {"meta"}


@pytest.mark.parametrize("operation", ["combine_pre", "hc_coefficients"])
def test_the_reference_keeps_fp32_under_autocast(operation: str) -> None:
    """`enable_autocast` of Megatron's TransformerConfig runs layers under it."""
    arguments = {
        "combine_pre": (X, F, POST, RES, PHI, ALPHA, BIAS),
        "hc_coefficients": (X, torch.randn(6, 8), ALPHA, BIAS),
    }[operation]
    wanted = getattr(kernels, operation)(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = getattr(kernels, operation)(*arguments)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_operations_are_traced_as_one_graph() -> None:
    """What stands in front of the kernels breaks no graph: on a CPU, with the reference behind it.

    The backend "eager" runs what was traced, so the arithmetic is the same.
    """

    def site(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept = kernels.combine_pre(x, F, POST, RES, PHI, ALPHA, BIAS, norm_eps=0, backend="torch")
        return *kept, kernels.sinkhorn(RES, 3, eps=0, backend="torch")

    torch.compiler.reset()
    traced = torch.compile(site, fullgraph=True, backend="eager")(X)
    for got, want in zip(traced, site(X), strict=True):
        assert torch.equal(got, want)
