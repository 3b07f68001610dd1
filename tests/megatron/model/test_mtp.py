"""Multi-token prediction: its layer has sites of its own and reads the head's one stream."""

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.compare import assert_same_training
from tests.megatron.common.flags import ROPE, RUN, SOURCE, TINY, losses
from tests.megatron.common.launch import forked_python, forked_run, run_scenarios
from tests.megatron.common.settings import DELAYED, SGD, SUMMATION_ORDER, VIRTUAL, stages

pytestmark = pytest.mark.skipif(is_installed("<0.19"), reason="MTP is refused with Megatron 0.18")

ONE = {"mtp_num_layers": 1}
TWO = {"mtp_num_layers": 2}
REPEATED = {**TWO, "mtp_use_repeated_layer": True}
START: dict[str, Any] = {"perturb": False, "config": ONE}
# not tied: Megatron's own checkpoint of a tied model with MTP in a pipeline asserts
PIPELINED: dict[str, Any] = {
    "optimizer": SGD,
    "batch": 8,
    "microbatches": 4,
    "tied": False,
    "config": ONE,
}
SINGLE: dict[str, dict[str, Any]] = {
    "ordinary": {**START, "steps": 1, "mhc": None},
    "mhc": {**START, "steps": 5, "optimizer": {"lr": 3e-3}},
    "ordinary, two": {**START, "steps": 1, "mhc": None, "config": TWO},
    "mhc, two": {**START, "steps": 2, "config": TWO},
    "ordinary MoE": {**START, "steps": 1, "mhc": None, "kind": "moe"},
    "mhc MoE": {**START, "steps": 1, "kind": "moe"},
    "head": {"config": TWO, "mhc": {"convention": "deepseek_v4"}},
    "kept": {"config": TWO},
    "recomputed": {"config": TWO, "mhc": {"recompute": "auto"}},
    "ordinary, repeated": {**START, "steps": 1, "mhc": None, "config": REPEATED},
    "mhc, repeated": {**START, "steps": 2, "config": REPEATED},
    "repeated": {"config": REPEATED},
    "repeated, recomputed": {"config": REPEATED, "mhc": {"recompute": "auto"}},
    "mhc, delayed": {**START, "steps": 2, "config": TWO, "mhc": DELAYED},
    "delayed": {"config": TWO, "mhc": DELAYED},
    "delayed, recomputed": {"config": TWO, "mhc": {**DELAYED, "recompute": "auto"}},
    "delayed, pipelined": {**PIPELINED, "mhc": DELAYED},
    "pipelined": PIPELINED,
}
PAIR: dict[str, dict[str, Any]] = {
    "pipelined": {**PIPELINED, "parallel": stages(2)},
    "interleaved": {
        **PIPELINED,
        "parallel": VIRTUAL,
    },
    "overlapped": {**PIPELINED, "parallel": stages(2), "mhc": {"overlap_p2p": True}},
    "beside the loss alone": {
        **PIPELINED,
        "parallel": stages(2),
        "config": {**PIPELINED["config"], "pipeline_model_parallel_layout": "Etttt|mL"},
    },
    "beside the loss alone, overlapped": {
        **PIPELINED,
        "parallel": stages(2),
        "config": {**PIPELINED["config"], "pipeline_model_parallel_layout": "Etttt|mL"},
        "mhc": {"overlap_p2p": True},
    },
    "delayed": {**PIPELINED, "parallel": stages(2), "mhc": DELAYED},
    "tensor parallel": {
        **PIPELINED,
        "parallel": {"tensor_model_parallel_size": 2},
        "config": {**ONE, "sequence_parallel": True},
    },
}


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Results of one process."""
    return run_scenarios(1, SINGLE)


@pytest.mark.parametrize(
    ("wide", "ordinary"),
    [
        ("mhc", "ordinary"),
        ("mhc, two", "ordinary, two"),
        ("mhc, repeated", "ordinary, repeated"),
        ("mhc MoE", "ordinary MoE"),
        # each of its layers is a run of its own: it reads stream 0 first, ends by its last H_pre
        ("mhc, delayed", "ordinary, two"),
    ],
)
def test_it_starts_as_the_ordinary_models(single: dict[str, Any], wide: str, ordinary: str) -> None:
    """Weights that sum to one in fp32, over 8 sites and 2 a depth: a few roundings of 6e-8."""
    got, want = single[wide], single[ordinary]
    assert got["losses"][0] == pytest.approx(want["losses"][0], rel=1e-6)
    assert got["mtp_losses"][0] == pytest.approx(want["mtp_losses"][0], rel=1e-6)
    assert len(got["mtp_losses"][0]) == (1 if wide in ("mhc", "mhc MoE") else 2)


def test_it_trains(single: dict[str, Any]) -> None:
    (first,), (last,) = single["mhc"]["mtp_losses"][0], single["mhc"]["mtp_losses"][-1]
    assert last < first - 0.05


@pytest.mark.parametrize(
    ("kind", "depths"),
    [("mhc", 1), ("mhc, two", 2), ("mhc, repeated", 1), ("head", 2), ("delayed", 2)],
)
def test_its_sites_get_gradients_from_the_second_step_on(
    single: dict[str, Any], kind: str, depths: int
) -> None:
    gradients = single[kind]["gradients"][1]
    layers = {name.rsplit(".", 2)[0] for name in gradients if name.startswith("mtp.")}
    assert len(layers) == depths
    ours = {name: value for name, value in gradients.items() if name.startswith("mtp.")}
    assert len(ours) == depths * (6 + 3 * (kind == "head"))
    empty = [name for name, gradient in ours.items() if gradient.norm() == 0]
    assert not empty


def test_recompute_of_the_streams_is_exact(single: dict[str, Any]) -> None:
    assert_same_training(single["recomputed"], single["kept"], bound=None)
    assert_same_training(single["repeated, recomputed"], single["repeated"], bound=None)
    assert_same_training(single["delayed, recomputed"], single["delayed"], bound=None)


@pytest.mark.parametrize("kind", PAIR)
def test_it_stands_on_the_last_stage_and_under_tensor_parallelism(
    single: dict[str, Any], kind: str
) -> None:
    """The embedding's gradient is the sum of two stages': another order than one process's."""
    alone = single["delayed, pipelined" if kind == "delayed" else "pipelined"]
    got, want = run_scenarios(2, PAIR)[kind], alone
    assert_same_training(got, want, bound=SUMMATION_ORDER)
    for mine, theirs in zip(got["mtp_losses"], want["mtp_losses"], strict=True):
        assert mine == pytest.approx(theirs, rel=SUMMATION_ORDER)


def test_a_stage_without_the_loss_is_refused() -> None:
    layout = {"pipeline_model_parallel_layout": "Ett|tt|m|L"}
    settings = {"tied": False, "config": {**ONE, **layout}, "parallel": stages(4)}
    with pytest.raises(
        AssertionError, match=r"prediction with mHC stands on a .* without the loss"
    ):
        run_scenarios(4, {"bad": settings})


def test_the_runner_gives_it_sites() -> None:
    """Megatron's builder takes the layer of multi-token prediction from its own defaults."""
    flag = ["--mtp-num-layers", "1", *ROPE]
    ordinary, wide = forked_python(*RUN, *flag), forked_python(*RUN, *flag, "--mhc")
    assert ordinary.returncode == 0, ordinary.stdout[-3000:]
    assert wide.returncode == 0, wide.stdout[-3000:]
    assert "6 sites, 18,594 extra parameters" in wide.stdout
    mtp = [re.findall(r"mtp_1 loss: (\S+)", run.stdout) for run in (ordinary, wide)]
    assert len(mtp[0]) == 3 and mtp[0][0] == mtp[1][0] and mtp[0][2] != mtp[1][2]
    assert losses(ordinary.stdout)[0] == losses(wide.stdout)[0]


def test_one_layer_at_every_depth_is_counted_once(tmp_path: Path) -> None:
    """Its parameters once; its work, memory and FLOPs, at each depth."""
    flags = ["--mtp-num-layers", "2", "--mtp-use-repeated-layer"]
    script = tmp_path / "count.py"
    script.write_text(f"{SOURCE}\n{COUNTED}")
    status, printed = forked_run(1, str(script), *TINY, *flags, *ROPE, "--mhc")
    assert status == 0, printed[-3000:]
    counted = re.search(r"built: (\d+) sites, (\d+) parameters", printed)
    assert counted and f"; {counted[1]} sites, {int(counted[2]):,} extra parameters" in printed
    assert counted[1] == "6"


COUNTED = """
import gc
from megatron_mhc.model.connection import HyperConnection
built = [site for site in gc.get_objects() if isinstance(site, HyperConnection)]
parameters = sum(p.numel() for site in built for p in site.parameters())
print(f"built: {len(built)} sites, {parameters} parameters")
"""


def test_the_dry_run_counts_it_at_every_depth() -> None:
    flags = [*TINY, "--mtp-num-layers", "2", *ROPE, "--mhc"]
    both = [
        forked_python("-m", "megatron_mhc", "doctor", "--args", *flags, *more).stdout
        for more in WAYS
    ]
    pages = [re.search(DRY_RUN, page, re.S) for page in both]
    assert pages[0] and pages[1], both
    assert (pages[0][1], pages[1][1]) == ("8 sites, 24,792", "6 sites, 18,594")
    assert pages[0].groups()[1:] == pages[1].groups()[1:]


WAYS = ([], ["--mtp-use-repeated-layer"])
DRY_RUN = r"mHC: (\S+ sites, \S+) extra.* (\S+) forward, .*activations (\S+) bytes a token"
