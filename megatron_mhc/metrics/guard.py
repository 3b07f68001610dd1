"""The watchdog behind `--mhc-guard`: which bounds the metrics of a step pass, and where."""

from typing import Any

DEFAULT_GAIN = 100.0
"""The bound on the composite gain: 27B models reached about 1.6 with mHC and 3000 with HC."""
ROW_ERROR = 1e-3
"""The bound on |row sum of H_res - 1|: Sinkhorn's last division leaves fp32's rounding, 1e-6."""


class GuardError(RuntimeError):
    """`--mhc-guard stop`: a bound was passed. Raised on every rank, before the weights change."""


def site_name(site: int) -> str:
    """A site's index as a reader of Megatron counts: layers from 1, two sites each."""
    return f"site {site} (layer {site // 2 + 1}, {'MLP' if site % 2 else 'attention'})"


def violations(metrics: dict[str, Any], gain_bound: float) -> list[str]:
    """A sentence for every bound that was passed; none is an empty list.

    Args:
        metrics: what `recorder.Recorder.summary` returned.
        gain_bound: for the Amax gain of the composite map, its maximum over tokens.
    """
    sites, values = metrics["sites"], metrics["site"]
    found = []
    for name, order in (("forward", 1), ("backward", -1)):
        gains = values[f"depth_gain_{name}_max"][::order]
        # "not <=" so that a NaN is a violation too
        passed = [
            site for site, gain in zip(sites[::order], gains, strict=True) if not gain <= gain_bound
        ]
        if not gains[-1] <= gain_bound:
            single = values[f"gain_{name}_max"]
            largest = max(range(len(sites)), key=single.__getitem__)
            found.append(
                f"the composite {name} gain of H_res over {len(sites)} sites is {gains[-1]:.4g}"
                f" (bound {gain_bound:.4g}), passed at {site_name(passed[0])}; the largest gain of"
                f" one site is {single[largest]:.4g} at {site_name(sites[largest])}"
            )
    errors = values["row_error"] if metrics["variant"] == "mhc" else []
    for site, error in zip(sites, errors, strict=False):
        if not error <= ROW_ERROR:
            found.append(
                f"a row of H_res at {site_name(site)} misses the sum 1 by {error:.4g} (bound"
                f" {ROW_ERROR:.4g})"
            )
    return found
