"""What `benchmarks/multi_gpu` launches and compares; nothing is launched here."""

import gzip
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks.multi_gpu.launches import Bench, Run
from benchmarks.multi_gpu.models import small_size
from benchmarks.multi_gpu.parts import step_times
from benchmarks.multi_gpu.parts.paper import LAYOUTS, paper
from benchmarks.multi_gpu.parts.pipelines import pipelines
from benchmarks.multi_gpu.run import command
from tests.megatron.common.launch import forked_python


def bench(folder: Path, *flags: str) -> Bench:
    """Of a call with these flags."""
    return Bench(command().parse_args(["--out", str(folder), *flags]))


def parallel(flags: str) -> dict[str, int]:
    """Ranks by kind of parallelism; the last of equal flags counts, as for Megatron."""
    kinds = ("tensor", "pipeline", "expert")
    found = {kind: re.findall(rf"--{kind}-model-parallel-size (\d+)", flags) for kind in kinds}
    return {kind: int((numbers or [1])[-1]) for kind, numbers in found.items()}


def test_what_can_be_named_is_there_and_fits_its_ranks(tmp_path: Path) -> None:
    for gpus in (2, 4, 8):
        found = step_times.layouts(bench(tmp_path), gpus)
        assert (*found,) == step_times.LAYOUTS
        for ranks, flags, _ in found.values():
            sizes = parallel(flags)
            dense, experts = (
                sizes["tensor"] * sizes["pipeline"],
                sizes["expert"] * sizes["pipeline"],
            )
            assert ranks % dense == ranks % experts == 0
    names = [name for _, _, variants in found.values() for name in variants]
    assert {*names} == {*step_times.VARIANTS} and {*step_times.TRACED} <= found.keys()
    for ranks in step_times.SCALES:  # each rank has the same work
        assert found[f"weak-{ranks}"][0] == ranks
        words = shlex.split(found[f"weak-{ranks}"][1])
        last = len(words) - 1 - words[::-1].index("--global-batch-size")
        assert int(words[last + 1]) == 4 * ranks


@pytest.mark.parametrize(
    ("flags", "launched"),
    [
        (
            "--only dense-pp paper-ep --variants mhc overlap",
            {"dense-pp": (["mhc", "overlap"], True), "paper-ep": (["mhc"], True)},
        ),
        ("--only paper-ep --variants mhc --trace", {"paper-ep": (["mhc"], False)}),
        (
            "--only paper-vpp-ep --trace dense-pp",
            {"paper-vpp-ep": ([*step_times.TIMED_EXPERTS], False)},
        ),
        ("--only dense-pp --variants attn", {"dense-pp": "not run: none of these variants"}),
        ("--only weak-8", {"weak-8": "not run: it needs 8 GPUs"}),
        ("--variants attn", {"paper-pp-ep-graphs": (["attn"], False)}),
    ],
)
def test_what_is_asked_for_is_launched_and_what_cannot_be_is_said(
    flags: str, launched: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = bench(tmp_path, *flags.split())
    found: dict[str, Any] = {}

    def rounds(name: str, ranks: int, flags: str, variants: Any, *, trace: bool, **_: Any) -> None:
        found[name] = [*variants], trace

    monkeypatch.setattr(asked, "rounds", rounds)
    step_times.step_times(asked, 4)
    assert found | {name: row.failure for name, row in asked.runs.items()} == launched


def test_a_row_says_what_its_own_traces_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an earlier call's; those that are cut are named; no row, where time was up, is no end."""
    asked = bench(tmp_path, "--only", "paper-ep", "--variants", "ordinary", "mhc", "ep-overlap")
    traces = asked.out / "traces" / "paper-ep"
    whole = gzip.compress(json.dumps({"traceEvents": []}).encode())

    def written(variant: str, data: bytes) -> None:
        (traces / variant).mkdir(parents=True, exist_ok=True)
        (traces / variant / "rank-0.json.gz").write_bytes(data)

    def rounds(name: str, *_: Any, **__: Any) -> None:
        for variant, data in {"ordinary": whole, "mhc": whole[:-9]}.items():
            written(variant, data)
            asked.runs[f"{name}: {variant}"] = Run(variant, 4, remark="1.000 of the first")

    written("old", whole)
    monkeypatch.setattr(asked, "rounds", rounds)
    step_times.step_times(asked, 4)
    assert not (traces / "old").exists()
    remarks = [row.remark for row in asked.runs.values()]
    assert remarks == [
        "1.000 of the first; p2p_ms 0, p2p_alone_ms 0",
        "1.000 of the first; its traces are cut short",
    ]
    written("empty", b"")
    assert step_times.messages(traces / "empty") == "its traces are cut short"


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_a_run_of_the_papers_layers_is_compared_with_one_of_its_layout(
    gpus: int, tmp_path: Path
) -> None:
    launches, checks = paper(bench(tmp_path), gpus, "")
    flags = {launch.args[0]: launch.args[2] for launch in launches}  # type: ignore[attr-defined]
    compared = [check.args for check in checks]  # type: ignore[attr-defined]
    for name, other, bound, *_ in compared:
        assert name != other and "--mhc" in flags[name] and "--mhc" in flags[other]
        assert bound is not None or parallel(flags[name]) == parallel(flags[other])
        assert bound is None or "free" in name or name in LAYOUTS
    # every run but the one that all others go by
    assert {name for name, *_ in compared} == flags.keys() - {"paper", "paper-ordinary"}
    assert ({"paper-pp4-overlap", "paper-wide-recompute"} <= flags.keys()) is (gpus == 8)
    for name, own in flags.items():
        sizes = parallel(own)
        assert gpus % (sizes["pipeline"] * sizes["expert"]) == 0
        named = [layout for prefix, layout in LAYOUTS.items() if name.startswith(prefix)]
        wanted = (*named, (min(gpus, 2), 2 if gpus >= 4 else 1))[0]
        assert (sizes["pipeline"], sizes["expert"]) == wanted


@pytest.mark.parametrize("device", ["--cpu", "--ranks-per-gpu=1"])
@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_a_layout_has_as_many_layers_as_its_model(gpus: int, device: str, tmp_path: Path) -> None:
    """Megatron refuses any other, on the GPUs."""
    of = bench(tmp_path, device)
    launches, _ = pipelines(of, gpus, small_size(of, gpus))
    given = [shlex.split(launch.args[2]) for launch in launches]  # type: ignore[attr-defined]
    laid_out = [dict(itertools.pairwise(flags)) for flags in given]
    layouts = [flags for flags in laid_out if "--pipeline-model-parallel-layout" in flags]
    assert len(layouts) == 5
    for flags in layouts:
        layout = flags["--pipeline-model-parallel-layout"]
        assert layout.count("t") == int(flags["--num-layers"])
        assert layout.count("|") % int(flags["--pipeline-model-parallel-size"]) == min(gpus, 4) - 1


def test_what_a_run_leaves_is_freed_and_nothing_else() -> None:
    done = forked_python(
        "-c",
        """
import torch
from benchmarks.multi_gpu import rounds
rounds.LARGE = 4096
model = torch.nn.Linear(4, 4)
grads = [torch.ones_like(p) for p in model.parameters()]
for p, grad in zip(model.parameters(), grads):
    p.grad = grad
optimizer = torch.optim.Adam(model.parameters())
optimizer.step()
main = torch.ones(8)
optimizer.param_groups[0]["params"].append(main)  # a main parameter is no nn.Parameter
moments = [state["exp_avg"] for state in optimizer.state.values()]
large, small, alone = torch.ones(2048), torch.ones(8), torch.nn.Parameter(torch.ones(8))
rounds.free_tensors("cuda")
size = lambda tensor: tensor.untyped_storage().nbytes()
assert all(map(size, [*model.parameters(), main, *moments, large, alone, small]))
rounds.free_tensors("cpu")
assert not any(map(size, [*model.parameters(), main, *moments, large, alone]))
assert all(map(size, [small]))
""",
        stage="megatron",
    )
    assert done.returncode == 0, done.stdout
