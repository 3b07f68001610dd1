"""What code that is in no wheel, or in no extra of ours, computes at `site`: run once, recorded.

    PYTHONPATH=.:MEGATRON_LM python -m tests.unit.model.models_code megatron_main_2026_08

records it anew: `megatron_main_2026_08` from a checkout of Megatron-LM's d98e8a64dd, `megatron_dev`
from d48bd6be0a, `deepseek_v4_1` where nemo-automodel 0.7.0 is installed. A test compares with the
record, and where that code is at hand the record with the code.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mhc.kernels import reference

from .test_conventions import EXACT, ITERATIONS, RMS, WIDTH, N, site

RECORDS = Path(__file__).with_name("models_code_records")
SITES = 4
"""Of DeepSeek-V4.1's, one behind the other."""
Named = dict[str, Tensor]


def in_float64(module: torch.nn.Module, p: Named, head: bool = False) -> Any:
    """A module of theirs with our parameters, res rows in their order."""
    if head:
        values = dict(hc_fn=p["phi"][:N], hc_base=p["bias"][:N], hc_scale=p["alpha"][:1])
    else:
        fn, base = (reference.transpose_res_rows(p[name], N) for name in ("phi", "bias"))
        values = dict(fn=fn, base=base, scale=p["alpha"])
    for name, value in values.items():
        setattr(module, name, torch.nn.Parameter(value))
    return module


def not_compiled(function: Any) -> Any:
    """What `torch.compile` was given."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def native_code(mark: Callable[[Any], bool]) -> Any:
    """Megatron's module of hyper-connections, where it has one with this mark; else None."""
    try:
        native = importlib.import_module("megatron.core.transformer.hyper_connection")
    except ImportError:
        return None
    return native if mark(native) else None


def native_site(p: Named) -> SimpleNamespace:
    """What a method of its HyperConnectionModule reads from `self`."""
    alphas = zip(("alpha_pre", "alpha_post", "alpha_res"), p["alpha"].split(1), strict=True)
    return SimpleNamespace(n=N, bias=p["bias"], compute_h_eps=1e-6, **dict(alphas))


def of_august(native: Any, p: Named) -> Named:
    """Megatron main's, 22 August 2026."""
    v = p["x"].flatten(-2)[:, None]
    inverse_norm = 1.0 / (v.norm(dim=-1, keepdim=True) / (N * WIDTH) ** 0.5 + 1e-6)
    compute = not_compiled(native.HyperConnectionModule._compute_h)
    h_pre, h_post, h_res = compute(native_site(p), v @ p["phi"].t(), inverse_norm)
    h_res = native.SinkhornKnopp.apply(h_res.view(-1, 1, N, N), ITERATIONS)
    return {"u": (h_pre.mT * p["x"]).sum(-2), "h_post": h_post[:, 0], "h_res": h_res[:, 0]}


def of_dev(native: Any, p: Named) -> Named:
    """Megatron dev's, its learned head too."""
    theirs = {**p, **{k: reference.transpose_res_rows(p[k], N) for k in ("phi", "bias")}}
    v = p["x"].flatten(-2)
    projected, r = not_compiled(native.native_proj_rms)(v, theirs["phi"])
    compute = not_compiled(native.HyperConnectionModule._compute_h)
    h_pre, h_post, logits = compute(native_site(theirs), projected[:, None], r[:, None])
    matrix = not_compiled(native._sinkhorn_iterations)(logits.view(-1, N, N), ITERATIONS, 1e-6)
    x, f = p["x"][:, None], p["f"][:, None]
    u = not_compiled(native.native_h_aggregate)(x, h_pre)
    y = not_compiled(native.native_h_post_bda)(matrix, x, h_post, f, None)
    with pytest.MonkeyPatch.context() as inside:  # what casts to fp32 there casts to float64 here
        inside.setattr(torch, "float32", torch.float64)
        contract = not_compiled(native.learned_output_contract)
        end = contract(v, p["phi"][:N], p["bias"][:N], p["alpha"][:1], N, 1e-5)
    found = {"u": u[:, 0], "h_post": h_post[:, 0], "h_res": matrix.mT, "y": y[:, 0], "end": end}
    return {name: tensor.detach() for name, tensor in found.items()}


def automodel() -> Any:
    """Its layers of DeepSeek-V4.1; None where it is not installed."""
    try:
        return importlib.import_module("nemo_automodel.components.models.deepseek_v41.layers")
    except ImportError:
        return None


def of_automodel(theirs: Any, p: Named) -> Named:
    """Four sites of DeepSeek-V4.1 from the start, each with parameters of its own and f = tanh(u);
    each reads with the H_pre of the one before."""
    config = SimpleNamespace(
        hc_mult=N,
        hc_sinkhorn_iters=ITERATIONS,
        hc_eps=1e-6,
        rms_norm_eps=1e-20,
        hidden_size=WIDTH,
        initializer_range=0.02,
    )
    found: Named = {}
    x = p["x"][:, :1].repeat(1, N, 1)
    h_pre = torch.eye(N, dtype=torch.float64)[0].expand(1, len(x), N)
    with pytest.MonkeyPatch.context() as inside:  # what casts to fp32 there casts to float64 here
        inside.setattr(torch.Tensor, "float", torch.Tensor.double)
        for k in range(SITES):
            own = in_float64(theirs.DeepseekV41HyperConnection(config), rolled(p, k))
            mix = own(x[None])
            u = own.collapse(x[None], h_pre)[0]
            found |= {f"x{k}": x, f"u{k}": u, f"h_pre{k}": mix.pre[0], f"h_post{k}": mix.post[0]}
            found[f"h_res{k}"] = mix.comb[0].mT
            h_pre, x = mix.pre, own.expand(u.tanh()[None], x[None], mix)[0]
        found["end"] = own.collapse(x[None], h_pre)[0]
    return {name: tensor.detach() for name, tensor in found.items()}


def rolled(p: Named, k: int) -> Named:
    """Parameters of the k-th of several sites."""
    return {**p, "phi": p["phi"].roll(k, 1), "bias": p["bias"].roll(k)}


CODE: dict[str, tuple[Callable[[], Any], Callable[[Any, Named], Named]]] = {
    "megatron_main_2026_08": (
        lambda: native_code(lambda native: hasattr(native.SinkhornKnopp, "_sinkhorn_normalize")),
        of_august,
    ),
    "megatron_dev": (
        lambda: native_code(lambda native: hasattr(native, "learned_output_contract")),
        of_dev,
    ),
    "deepseek_v4_1": (automodel, of_automodel),
}
"""By preset: the code, if it is at hand, and what it computes."""


def recorded(name: str, scale: float) -> Named:
    """What a model's code computed of `site(scale)`.

    Raises:
        AssertionError: the code is at hand and computes something else now.
    """
    listed = json.loads((RECORDS / f"{name}.json").read_text())[str(scale)]
    record = {key: torch.tensor(numbers, dtype=torch.float64) for key, numbers in listed.items()}
    find, compute = CODE[name]
    if (code := find()) is not None:
        now = compute(code, site(scale))
        assert now.keys() == record.keys()
        for key, tensor in now.items():
            torch.testing.assert_close(tensor, record[key], **EXACT)
    return record


def main(name: str) -> None:
    """Record it.

    Raises:
        SystemExit: its code is not at hand.
    """
    find, compute = CODE[name]
    if (code := find()) is None:
        sys.exit(f"models_code: the code of {name} is not on the path; the head of this file says")
    found = {
        str(scale): {k: t.tolist() for k, t in compute(code, site(scale)).items()} for scale in RMS
    }
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
