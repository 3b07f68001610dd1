"""Muon over data-parallel ranks some of which step no parameter of mHC: two dtypes to gather."""

from tests.megatron.common.flags import DISTRIBUTED, HYBRID_SCRIPT, HYBRID_SPEC, ROPE, TINY, losses
from tests.megatron.common.launch import forked_run

ONE_SITE = [*TINY, *HYBRID_SPEC, "--hybrid-layer-pattern", "*", *ROPE, "--bf16", "--mhc"]
"""Attention alone: so few parameters of mHC that one of four ranks has none."""
MUON = [
    *("--optimizer", "muon", "--use-distributed-optimizer"),
    "--no-use-layer-wise-param-layout",  # 0.19 has no other here
]


def train(flags: list[str], **environment: str) -> tuple[list[str], str]:
    _, printed = forked_run(4, HYBRID_SCRIPT, *ONE_SITE, *flags, **environment)
    return losses(printed), printed


def test_ranks_without_mhcs_parameters_get_them() -> None:
    """Digit for digit as with overlap, where Megatron gathers bucket by bucket, of one dtype."""
    gathered, printed = train(MUON)
    assert len(gathered) == 3 and len(set(gathered)) == 3, printed[-3000:]
    assert gathered == train([*MUON, *DISTRIBUTED])[0]


def test_without_the_patch_it_stops() -> None:
    got, printed = train(MUON, MEGATRON_MHC_PATCHES="-muon-gather")
    assert "Invalid usage of tensors with different dtypes" in printed
    assert len(got) < 3
