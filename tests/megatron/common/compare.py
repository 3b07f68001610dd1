"""How two trainings are compared."""

from typing import Any

import torch
from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, and 0 where both are zero."""
    got, want = got.double(), want.double()
    norm = want.norm().item()
    error = (got - want).norm().item()
    return error / norm if norm else error


def assert_same_training(got: dict[str, Any], want: dict[str, Any], *, bound: float | None) -> None:
    """Losses of every step and every updated parameter agree: bit for bit where bound is None.

    Raises:
        AssertionError: names what differs and by how much.
    """
    assert got["parameters"].keys() == want["parameters"].keys()
    pairs = [("losses", torch.tensor(got["losses"]), torch.tensor(want["losses"]))]
    pairs += [(k, value, want["parameters"][k]) for k, value in got["parameters"].items()]
    for name, a, b in pairs:
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        error = relative_error(a, b)
        same = torch.equal(a, b) if bound is None else error <= bound
        assert same, f"{name} differs: relative error {error:.2e}, allowed {bound or 'none'}"
