"""What is compared of two models' settings: the fields of a convention, whatever its name."""

from typing import Any

import pytest

from megatron_mhc import MHCConfig
from megatron_mhc.config import CONVENTIONS
from megatron_mhc.model.stored_settings import (
    CheckpointSettingsError,
    check_settings,
    function_settings,
)

OLD = {"num_streams": 4, "sinkhorn_iterations": 20, "variant": "mhc"}
"""With a convention's name, all that a checkpoint had before the fields were stored."""


def compare(stored: dict[str, Any], **given: Any) -> None:
    """Load such a checkpoint into a model with these settings."""
    check_settings(stored, function_settings(MHCConfig(**given)), "it")


@pytest.mark.parametrize("name", ["paper", "deepseek_v4"])
def test_an_old_checkpoints_name_stands_for_its_fields(name: str) -> None:
    old = {**OLD, "convention": name}
    compare(old, convention=name)
    for other in CONVENTIONS:
        if other != name:
            with pytest.raises(
                CheckpointSettingsError,
                match=f"convention is {name} there and {other} here. .*: --mhc-convention {name} ",
            ):
                compare(old, convention=other)
    with pytest.raises(CheckpointSettingsError, match=r"norm_eps is 1e-06 there and 1e-05 here"):
        compare(old, convention=name, norm_eps=1e-5)


def test_old_settings_of_variant_hc_are_todays() -> None:
    compare({**OLD, "convention": "paper", "variant": "hc"}, variant="hc")


@pytest.mark.parametrize("name", CONVENTIONS)
def test_equal_fields_are_one_convention_whatever_the_name(name: str) -> None:
    stored = function_settings(MHCConfig(convention=name))
    compare(stored, convention=name)
    fields = {n: v for n, v in CONVENTIONS[name]._asdict().items() if v is not None}
    compare(stored, convention="paper", **fields)
    compare({**stored, "convention": "a later one"}, convention=name)


@pytest.mark.parametrize(
    ("stored", "given", "message"),
    [
        ({"norm_eps": 1e-5}, {}, "norm_eps is 1e-05 there .* --mhc-norm-eps 1e-05 "),
        ({}, {"end": "head"}, r"end is mean there and head here.*MHC_END=mean\)"),
        (
            {"convention": "glm_5_3", "norm_eps": 1e-7},
            {"num_streams": 2},
            "num_streams is 4 there and 2 here, convention is glm_5_3 there and paper here,"
            " norm_eps is 1e-07 there and 1e-06 here. Give the checkpoint's:"
            " --mhc-num-streams 4 --mhc-convention glm_5_3 --mhc-norm-eps 1e-07 ",
        ),
        (
            {"end": "last_pre", "delayed": True},
            {},
            "end is last_pre there and mean here, delayed is True there and False here. Give the"
            " checkpoint's: --mhc-end last_pre --mhc-delayed ",
        ),
        ({}, {"delayed": True}, "checkpoint's: --no-mhc-delayed .*MHC_DELAYED=False"),
        (
            {"convention": "megatron_dev", "end": "mean"},
            {"convention": "megatron_dev"},
            r"head_eps is None there .*: --mhc-end mean \(with --spec: MHC_END=mean\)",
        ),
    ],
)
def test_what_differs_is_named_with_the_flags_to_give(
    stored: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointSettingsError, match=message):
        compare(function_settings(MHCConfig(**stored)), **given)


def test_a_name_that_is_not_known_here_is_named() -> None:
    with pytest.raises(CheckpointSettingsError, match="convention is a later one there and paper"):
        compare({**OLD, "convention": "a later one"})
