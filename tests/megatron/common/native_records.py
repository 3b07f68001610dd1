"""Recorded models with Megatron's own mHC; what `tiny_gpt` builds, and the tests compare with."""

from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_mhc.tools.safetensors_files import find_tensors, read_tensor

RECORDS = Path(__file__).with_name("native_models")
ITERATIONS = 7
EPSILON = 1e-4
"""The model's `layernorm_epsilon`: not Megatron's default, which dev's learned head has from it."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "main_2026_08": {"enable_mhc_connections": True, "mhc_num_residual_streams": 4},
    "dev": {"enable_hyper_connections": True, "num_residual_streams": 4},
}
"""What its training would have in Megatron's arguments."""
COMMON = {"mhc_sinkhorn_iterations": ITERATIONS, "norm_epsilon": EPSILON, "spec": None}
CONVENTIONS: dict[str, dict[str, Any]] = {
    "main_2026_08": {"convention": "megatron_main_2026_08", "sinkhorn_iterations": ITERATIONS},
    "dev": {
        "convention": "megatron_dev",
        "head_eps": EPSILON,
        "sinkhorn_iterations": ITERATIONS,
    },
}
"""Our settings for it."""


def record(name: str) -> dict[str, Tensor]:
    """A model's tensors by key, every layer with keys of its own, and its `logits`."""
    places = find_tensors(RECORDS / name, lambda key: True)
    return {key: read_tensor(place) for key, place in places.items()}
