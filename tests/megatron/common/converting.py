"""Ordinary checkpoints for the tests of `convert`, and starts of models with mHC made of them."""

import functools
import sys
from pathlib import Path

import pytest
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.__main__ import main
from megatron_mhc.tools.convert import convert
from tests.megatron.common.flags import MOE, RESUMED, SCRIPT, losses
from tests.megatron.common.launch import forked_run, run_scenarios
from tests.megatron.common.native_records import COMMON

ORDINARY = [
    *(flag for flag in RESUMED if flag not in ("--mhc", "--bf16")),
    *("--make-vocab-size-divisible-by", "32"),  # the same size whatever the layout
]
# two processes write two files; layers that differ have a key each, not one for their stack
MODELS: dict[str, tuple[int, list[str]]] = {
    "dense": (2, ["--tensor-model-parallel-size", "2"]),
    "moe": (
        2,
        [
            *(*MOE, "--disable-bias-linear", "--moe-layer-freq", "[0,1]"),
            *("--expert-model-parallel-size", "2", "--use-distributed-optimizer"),
        ],
    ),
}


@functools.cache
def ordinary(model: str, folder: Path) -> Path:
    """The checkpoint of an ordinary model after three iterations."""
    processes, flags = MODELS[model]
    save = ["--save", str(folder / model), "--save-interval", "3", "--exit-interval", "3"]
    status, printed = forked_run(processes, SCRIPT, *ORDINARY, *flags, *save)
    assert status == 0, printed[-3000:]
    return folder / model


def go_on(model: str, load: Path, *flags: str) -> list[float]:
    """The losses of a run that starts from a checkpoint with a new optimizer."""
    processes, layout = MODELS[model]
    if model == "dense":  # resharded, to one process
        processes, layout = 1, []
    status, printed = forked_run(processes, SCRIPT, *ORDINARY, *layout, "--load", str(load), *flags)
    assert status == 0, printed[-3000:]
    return [float(loss) for loss in losses(printed)]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`python -m megatron_mhc convert`, in this process."""
    monkeypatch.setattr(sys, "argv", ["megatron_mhc", "convert", *map(str, arguments)])
    main()


@functools.cache
def with_mhc(folder: Path) -> Path:
    """A start of a model with mHC: 4 streams, 20 iterations."""
    made = folder / "with mHC"
    convert(ordinary("dense", folder), made, MHCConfig())
    return made


def logits_of(**scenario: object) -> Tensor:
    """The logits of a tiny GPT (`tiny_gpt.run`)."""
    return run_scenarios(1, {"one": scenario}, "common.tiny_gpt")["one"]["logits"]


@functools.cache
def rest(folder: Path) -> Path:
    """The checkpoint of a tiny GPT without mHC: the rest of a model of `hf_checkpoints`."""
    logits_of(kind="ordinary", save=str(folder / "rest"), args=COMMON)
    return folder / "rest"
