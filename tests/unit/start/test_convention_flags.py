"""A convention's name and its fields on the command line, in the environment and a checkpoint."""

import argparse
import dataclasses

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.config import CONVENTION_FIELDS, CONVENTIONS
from megatron_mhc.start.banner import banner
from megatron_mhc.start.environment import config_from_environment
from megatron_mhc.start.flags import (
    SPEC,
    config_from_arguments,
    flags_of,
    prepare_arguments,
    take_from_checkpoint,
)
from tests.unit.start.test_flags import parse


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_convention_is_its_fields(name: str) -> None:
    """Its name sets them, a flag of its own wins over it, and all of them come back as flags."""
    mhc = MHCConfig(convention=name)
    assert {field: getattr(mhc, field) for field in CONVENTION_FIELDS} == (
        CONVENTIONS[name]._asdict()
    )
    assert mhc.convention_in_words == name and MHCConfig(**dataclasses.asdict(mhc)) == mhc
    other = MHCConfig(convention=name, norm_eps=1e-7, sinkhorn_order="rows_first")
    assert (other.pre_eps, other.end) == (mhc.pre_eps, mhc.end) and other.norm_eps == 1e-7
    assert other.convention_in_words.startswith(f"{name} with norm_eps 1e-07")
    args = parse(*flags_of(other).split())
    prepare_arguments(args)
    assert config_from_arguments(args) == other
    assert config_from_environment(
        {"MHC_CONVENTION": name, "MHC_NORM_EPS": "1e-7", "MHC_SINKHORN_ORDER": "rows_first"}
    ) == dataclasses.replace(other)


def test_the_fields_of_a_convention_come_from_a_checkpoint_with_it() -> None:
    """Where the command line names another one, nothing of the checkpoint's is mixed into it."""
    stored = argparse.Namespace(spec=SPEC, mhc_convention="glm_5_3", mhc_norm_eps=1e-7)
    for flags, want in (
        ((), MHCConfig(convention="glm_5_3", norm_eps=1e-7)),
        (("--mhc-convention", "paper"), MHCConfig()),
        (("--mhc-norm-eps", "1e-4"), MHCConfig(convention="glm_5_3", norm_eps=1e-4)),
    ):
        args = parse("--mhc", *flags)
        take_from_checkpoint(args, None, stored)
        prepare_arguments(args)
        assert config_from_arguments(args) == want


def test_a_switch_of_the_convention_has_no_value() -> None:
    args = parse("--mhc", "--mhc-delayed", "--mhc-end", "last_pre")
    prepare_arguments(args)
    assert config_from_arguments(args).delayed
    environ = {"MHC_DELAYED": "1", "MHC_END": "last_pre"}
    assert config_from_environment(environ) == config_from_arguments(args)


def test_the_banner_says_what_was_given_beside_the_name() -> None:
    mhc = MHCConfig(convention="deepseek_v4", norm_eps=1e-20)
    line = banner(mhc, "flags", 2, 10, torch.device("cpu"), torch.float32)
    assert ", convention deepseek_v4 with norm_eps 1e-20, 20 Sinkhorn iterations," in line


def test_what_a_convention_turns_on_can_be_turned_off() -> None:
    mhc = MHCConfig(convention="deepseek_v4_1", delayed=False, end="mean")
    args = parse(*flags_of(mhc).split())
    prepare_arguments(args)
    assert config_from_arguments(args) == mhc
