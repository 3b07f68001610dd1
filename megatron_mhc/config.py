"""MHCConfig: every setting of mHC once, with its check."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from megatron_mhc.kernels.arguments import NORM_FORMS, SINKHORN_ORDERS, NormForm, SinkhornOrder
from megatron_mhc.kernels.backend import TRITON_STREAMS, Backend, check_backend

End = Literal["mean", "head", "last_pre"]


class Convention(NamedTuple):
    """What a model's hyper-connections compute, beside their number and their parameters.

    Attributes:
        norm_eps: eps in the streams' norm.
        norm_form: where it stands: 1 / sqrt(mean square + eps) with "inside_root",
            1 / (root mean square + eps) with "outside_root".
        pre_eps: added to H_pre after the sigmoid.
        sinkhorn_eps: added to the sums that Sinkhorn divides by (`kernels.reference.sinkhorn`).
        sinkhorn_order: "columns_first" divides by the sums over dst and then over src;
            "rows_first" the other way round.
        end: what makes one stream of n behind the last site: their "mean", a learned "head", or
            the H_pre of the last site, "last_pre" (with `delayed`).
        delayed: a site reads the streams with the H_pre of the site before, the model's first
            site stream 0 alone (DeepSeek-V4.1's single pass).
        head_eps: of the learned head, inside its root and on its weights; None stands for norm_eps
            and pre_eps.
    """

    norm_eps: float = 1e-6
    norm_form: NormForm = "inside_root"
    pre_eps: float = 0.0
    sinkhorn_eps: float = 0.0
    sinkhorn_order: SinkhornOrder = "columns_first"
    end: End = "mean"
    delayed: bool = False
    head_eps: float | None = None


_V4 = Convention(pre_eps=1e-6, sinkhorn_eps=1e-6, end="head")
CONVENTIONS: Mapping[str, Convention] = {
    "paper": Convention(),
    "deepseek_v4": _V4,
    "deepseek_v4_1": _V4._replace(norm_eps=1e-20, end="last_pre", delayed=True),
    "glm_5_3": _V4._replace(norm_eps=1e-5, end="mean"),
    # Megatron's own mHC. The head's eps is the model's layernorm_epsilon; this is its default.
    "megatron_main_2026_08": Convention(norm_form="outside_root", sinkhorn_order="rows_first"),
    "megatron_dev": _V4._replace(norm_form="outside_root", head_eps=1e-5),
}
"""The named conventions: each sets all fields."""
CONVENTION_FIELDS = Convention._fields
Init = Literal["residual", "zero"]
Variant = Literal["mhc", "hc"]


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _check_eps(name: str, value: Any) -> None:
    """A number, at least zero; above it in the norm, of streams that may all be zero."""
    is_number = type(value) in (int, float) and math.isfinite(value)
    least = "above" if name == "norm_eps" else "at least"
    if not is_number or value < 0 or (value == 0 and name == "norm_eps"):
        raise ValueError(f"{name} is {value!r}; expected a number, {least} 0")


def _is_count(value: Any) -> bool:
    # not isinstance: True is an int too
    return type(value) is int and value >= 1


_OF_CONVENTION: Any = None
"""The default of a field that the convention sets."""


@dataclass(frozen=True)
class MHCConfig:
    """The settings of mHC.

    Attributes:
        num_streams: n, the number of residual streams (the paper's expansion rate; 4 there).
        sinkhorn_iterations: (columns, rows) divisions of Sinkhorn-Knopp (paper eq. 9; 20 there).
        convention: of CONVENTIONS, whose name sets the fields below that are not given: "paper";
            "deepseek_v4", "deepseek_v4_1" and "glm_5_3" as the checkpoints of these models have it;
            "megatron_main_2026_08" and "megatron_dev" as Megatron's own mHC. The fields count: two
            models compute the same function where these are equal.
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
        norm_eps: this one and the seven behind it (norm_form, pre_eps, sinkhorn_eps,
            sinkhorn_order, end, delayed, head_eps) are as in `Convention`. None is the
            convention's; it is never None afterwards, but for `head_eps`. (So `dataclasses.replace`
            with another convention alone keeps the fields of this one.)

    Raises:
        ValueError: a value of another type, unknown, out of range or at odds with another.
    """

    num_streams: int = 4
    sinkhorn_iterations: int = 20
    convention: str = "paper"
    init: Init = "residual"
    variant: Variant = "mhc"
    backend: Backend = "auto"
    recompute: Literal["auto"] | int | None = None
    overlap_p2p: bool = False
    overlap_in_flight: Literal[1, 2] = 1
    norm_eps: float = _OF_CONVENTION
    norm_form: NormForm = _OF_CONVENTION
    pre_eps: float = _OF_CONVENTION
    sinkhorn_eps: float = _OF_CONVENTION
    sinkhorn_order: SinkhornOrder = _OF_CONVENTION
    end: End = _OF_CONVENTION
    delayed: bool = _OF_CONVENTION
    head_eps: float | None = _OF_CONVENTION

    def __post_init__(self) -> None:
        for name in ("num_streams", "sinkhorn_iterations"):
            if not _is_count(value := getattr(self, name)):
                raise ValueError(f"{name} is {value!r}; expected an int, at least 1")
        _check_choice("convention", self.convention, tuple(CONVENTIONS))
        self._take_convention()
        _check_choice("init", self.init, get_args(Init))
        _check_choice("variant", self.variant, get_args(Variant))
        check_backend(self.backend)
        if self.backend == "triton" and self.num_streams not in TRITON_STREAMS:
            raise ValueError(
                f"backend is 'triton', which has kernels for {', '.join(map(str, TRITON_STREAMS))}"
                f" streams, and num_streams is {self.num_streams}: take another number, or backend"
                " 'torch'"
            )
        for name in ("sinkhorn_iterations", "convention", "init"):
            value, default = getattr(self, name), getattr(MHCConfig, name)
            if self.variant == "hc" and value != default:
                raise ValueError(
                    f"{name} is {value!r}, which variant 'hc' has no use for; leave it at its"
                    f" default, {default!r}"
                )
        if self.variant == "hc" and (given := self.overrides):
            raise ValueError(
                f"{', '.join(given)} given, which variant 'hc' has no use for: leave them out"
            )
        if not (self.recompute in (None, "auto") or _is_count(self.recompute)):
            raise ValueError(
                f"recompute is {self.recompute!r}; expected a number of layers, at least 1, 'auto',"
                " or None (--mhc-recompute off)"
            )
        if self.variant == "hc" and self.recompute is not None:
            raise ValueError(
                f"recompute is {self.recompute!r}, but variant 'hc', which is there to compare"
                " with, has none; leave it off"
            )
        if type(self.overlap_p2p) is not bool:
            raise ValueError(f"overlap_p2p is {self.overlap_p2p!r}; expected True or False")
        if not (_is_count(self.overlap_in_flight) and self.overlap_in_flight <= 2):
            raise ValueError(f"overlap_in_flight is {self.overlap_in_flight!r}; expected 1 or 2")
        if self.overlap_in_flight == 2 and not self.overlap_p2p:
            raise ValueError(
                "overlap_in_flight is 2 without overlap_p2p: turn that on too (--mhc-overlap-p2p)"
            )

    def _take_convention(self) -> None:
        """Set the fields that were not given to the convention's, and check all of them."""
        preset = CONVENTIONS[self.convention]
        if self.head_eps is not None and (self.end or preset.end) != "head":
            raise ValueError(
                f"head_eps is {self.head_eps!r}, but no learned head ends the model: leave it out,"
                " or set end to 'head'"
            )
        for name, value in preset._asdict().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.end != "head":
            object.__setattr__(self, "head_eps", None)
        _check_choice("norm_form", self.norm_form, NORM_FORMS)
        _check_choice("sinkhorn_order", self.sinkhorn_order, SINKHORN_ORDERS)
        _check_choice("end", self.end, get_args(End))
        for name in ("norm_eps", "pre_eps", "sinkhorn_eps", "head_eps"):
            if (value := getattr(self, name)) is not None:
                _check_eps(name, value)
                object.__setattr__(self, name, float(value))
        if type(self.delayed) is not bool:
            raise ValueError(f"delayed is {self.delayed!r}; expected True or False")
        if self.end == "last_pre" and not self.delayed:
            raise ValueError(
                "end is 'last_pre', the H_pre that the site behind the last would read with, and"
                " sites read with their own: turn delayed on (--mhc-delayed), or end with 'mean' or"
                " 'head'"
            )

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields of the convention that have other values than its name says."""
        preset = CONVENTIONS[self.convention]._asdict()
        if self.end != "head":
            preset["head_eps"] = None
        mine = {name: getattr(self, name) for name in CONVENTION_FIELDS}
        return {name: value for name, value in mine.items() if value != preset[name]}

    @property
    def convention_in_words(self) -> str:
        """The convention's name, and what was given beside it: "paper with norm_eps 1e-05"."""
        given = [f"{name} {value}" for name, value in self.overrides.items()]
        return " with ".join([self.convention, *([", ".join(given)] if given else [])])

    @property
    def learned_head(self) -> bool:
        """Whether a learned head ends the model."""
        return self.end == "head"


def as_flag(name: str, value: Any) -> str:
    """What sets a field of MHCConfig to this value on the command line; nothing sets None."""
    flag = name.replace("_", "-")
    if type(value) is bool:
        return f"--mhc-{flag}" if value else f"--no-mhc-{flag}"
    return "" if value is None else f"--mhc-{flag} {value}"


with contextlib.suppress(ImportError):
    import yaml  # type: ignore[import-untyped]

    # Megatron's yaml of its configurations writes an object that it does not know without fields
    yaml.SafeDumper.add_representer(
        MHCConfig,
        lambda dumper, config: dumper.represent_data(
            {"_target_": f"{MHCConfig.__module__}.{MHCConfig.__qualname__}", **asdict(config)}
        ),
    )
