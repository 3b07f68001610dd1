"""MHCConfig: every setting of mHC once, with its check."""

import contextlib
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from megatron_mhc.kernels.backend import Backend, check_backend

Convention = Literal["paper", "deepseek_v4"]
Init = Literal["residual", "zero"]
Variant = Literal["mhc", "hc"]


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _is_count(value: Any) -> bool:
    # not isinstance: True is an int too
    return type(value) is int and value >= 1


@dataclass(frozen=True)
class MHCConfig:
    """The settings of mHC.

    Attributes:
        num_streams: n, the number of residual streams (the paper's expansion rate; 4 there).
        sinkhorn_iterations: (columns, rows) divisions of Sinkhorn-Knopp (paper eq. 9; 20 there).
        convention: "paper", or "deepseek_v4" as the V4 checkpoints have it: eps 1e-6 in Sinkhorn
            and on H_pre, and a learned head instead of the mean at the end of the model.
        init: "residual" starts as the ordinary residual network's function; "zero" starts with
            every bias at zero (H_pre 1/2, H_post 1, H_res uniform).
        variant: "mhc", or "hc" for the unconstrained hyper-connections it descends from.
        backend: "triton", "torch" (the reference) or "auto"; see `kernels.backend.resolve`.
        recompute: selective recompute of the streams in blocks of so many layers, "auto" for the
            number that needs the least memory, None for off. Gives the memory back with the Triton
            kernels; the reference keeps fp32 copies of bf16 streams all the same.
        overlap_p2p: run the ends of a pipeline stage and its communication beside the rest
            (`schedule`).
        overlap_in_flight: with `overlap_p2p` and 1F1B, the microbatches that a stage starts ahead
            for each stage behind it. 1 is 1F1B; 2 also hides the way of a gradient back, for up to
            twice the activations.

    Raises:
        ValueError: a value of another type, unknown, out of range or at odds with another.
    """

    num_streams: int = 4
    sinkhorn_iterations: int = 20
    convention: Convention = "paper"
    init: Init = "residual"
    variant: Variant = "mhc"
    backend: Backend = "auto"
    recompute: Literal["auto"] | int | None = None
    overlap_p2p: bool = False
    overlap_in_flight: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        for name in ("num_streams", "sinkhorn_iterations"):
            if not _is_count(value := getattr(self, name)):
                raise ValueError(f"{name} is {value!r}; expected an int, at least 1")
        _check_choice("convention", self.convention, get_args(Convention))
        _check_choice("init", self.init, get_args(Init))
        _check_choice("variant", self.variant, get_args(Variant))
        check_backend(self.backend)
        for name in ("sinkhorn_iterations", "convention", "init"):
            value, default = getattr(self, name), getattr(MHCConfig, name)
            if self.variant == "hc" and value != default:
                raise ValueError(
                    f"{name} is {value!r}, which variant 'hc' has no use for; leave it at its"
                    f" default, {default!r}"
                )
        if self.variant == "hc" and self.backend == "triton":
            raise ValueError("backend is 'triton', but variant 'hc' has the reference only")
        if not (self.recompute in (None, "auto") or _is_count(self.recompute)):
            raise ValueError(
                f"recompute is {self.recompute!r}; expected None, 'auto' or a number of layers"
            )
        if self.variant == "hc" and self.recompute is not None:
            raise ValueError(
                f"recompute is {self.recompute!r}, but variant 'hc' keeps fp32 copies of the"
                " streams, which recompute cannot give back; leave it off"
            )
        if type(self.overlap_p2p) is not bool:
            raise ValueError(f"overlap_p2p is {self.overlap_p2p!r}; expected True or False")
        if not (_is_count(self.overlap_in_flight) and self.overlap_in_flight <= 2):
            raise ValueError(f"overlap_in_flight is {self.overlap_in_flight!r}; expected 1 or 2")
        if self.overlap_in_flight == 2 and not self.overlap_p2p:
            raise ValueError(
                "overlap_in_flight is 2 without overlap_p2p: turn that on too (--mhc-overlap-p2p)"
            )

    @property
    def norm_eps(self) -> float:
        """Added to the mean square of the streams before the root (both conventions)."""
        return 1e-6

    @property
    def pre_eps(self) -> float:
        """Added to H_pre after the sigmoid."""
        return 1e-6 if self.convention == "deepseek_v4" else 0.0

    @property
    def sinkhorn_eps(self) -> float:
        """Added to the sums that Sinkhorn divides by."""
        return 1e-6 if self.convention == "deepseek_v4" else 0.0

    @property
    def learned_head(self) -> bool:
        """Whether a learned head ends the model; else the mean of the streams does."""
        return self.convention == "deepseek_v4"


with contextlib.suppress(ImportError):
    import yaml  # type: ignore[import-untyped]

    # Megatron's yaml of its configurations writes an object that it does not know without fields
    yaml.SafeDumper.add_representer(
        MHCConfig,
        lambda dumper, config: dumper.represent_data(
            {"_target_": f"{MHCConfig.__module__}.{MHCConfig.__qualname__}", **asdict(config)}
        ),
    )
