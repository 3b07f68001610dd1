"""The benchmarks: what their command lines and documents say, and how they count."""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.common import spans
from benchmarks.common.turns import in_turn, ratio
from benchmarks.kernels import site_tiles, sites_plot, tune
from benchmarks.kernels.by_kernel import longer_than, medians
from benchmarks.pipeline import timeline
from tests.megatron.common.launch import forked_python

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PROFILE = BENCHMARKS / "kernels" / "profile_site.py"
SCRIPTS = [
    path.relative_to(BENCHMARKS)
    for path in (*BENCHMARKS.rglob("*.py"), *BENCHMARKS.rglob("*.sh"))
    if path.suffix == ".sh" or 'if __name__ == "__main__":' in path.read_text()
]
# each as if it were alone: started elsewhere, with nothing of the others on the search path
HELP = """
import contextlib, io, json, runpy, sys
path, said = list(sys.path), {}
for script in sys.argv[1:]:
    sys.path[:], sys.argv = path, [script, "--help"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
    said[script] = [status or 0, out.getvalue()]
print(json.dumps(said))
"""


def test_every_script_says_how_it_is_called(tmp_path: Path) -> None:
    """From any folder and without a GPU: its help has its own path in an example."""
    pytest.importorskip("megatron.core")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PYTHON"] = sys.executable

    def printed(*command: str) -> tuple[int, str]:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        return done.returncode, done.stdout

    python = [str(BENCHMARKS / script) for script in SCRIPTS if script.suffix == ".py"]
    status, text = printed(sys.executable, "-c", HELP, *python)
    assert status == 0
    said = json.loads(text.splitlines()[-1])
    for script in SCRIPTS:
        if script.suffix == ".sh":
            said[str(BENCHMARKS / script)] = printed(str(BENCHMARKS / script), "--help")
    assert len(said) == len(SCRIPTS) > 15
    for script in SCRIPTS:
        status, text = said[str(BENCHMARKS / script)]
        example = script.with_suffix(".sh") if script.with_suffix(".sh") in SCRIPTS else script
        assert status == 0 and f"benchmarks/{example} " in text.replace("\n", " "), (script, text)


def test_documents_name_the_scripts_that_there_are() -> None:
    """Everywhere but in the dated reports, whose commands are history."""
    folders = ("megatron_mhc", "kernels", "patches", "examples", "benchmarks", "tests", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")]
    named = {
        (path, file.relative_to(ROOT))
        for file in files
        if file.suffix in (".py", ".sh", ".md", "") and "results" not in file.parts
        for path in re.findall(r"benchmarks/[\w./-]+\.(?:py|sh|md)\b", file.read_text())
    }
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name[0]).is_file()]
    listed = (BENCHMARKS / "README.md").read_text()
    assert not [script for script in SCRIPTS if f"{script.parent.name}/{script.name}" not in listed]
    moved = (BENCHMARKS / "results" / "README.md").read_text()
    now = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|sh))`", moved)
    assert now and not [path for path in now if not (BENCHMARKS / path).is_file()]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (
            ["--tiles", "projct=16,64"],
            2,
            "'projct=16,64' names none of the kernels combine_and_project, ",
        ),
        (["--tiles", "combine_and_project=16"], 2, "'16' is no tile: give tokens,channels["),
    ],
)
def test_a_tile_that_is_none_is_refused(arguments: list[str], status: int, says: str) -> None:
    done = forked_python(str(PROFILE), *arguments, stage="torch")
    assert done.returncode == status and says in done.stdout


def test_times_of_a_sites_kernels_are_medians_over_equal_steps() -> None:
    # two launches of "a" around one of "b" in each of three steps; 1, 2 and 4 between them
    steps = [
        [(at, at + 3.0, "a"), (at + 4, at + 9, "b"), (at + 9 + gap, at + 11 + gap, "a")]
        for at, gap in ((0.0, 0.0), (50.0, 1.0), (100.0, 3.0))
    ]
    records = [record for step in steps for record in step]
    assert medians(records, 3) == {"a": 5.0, "b": 5.0, "between kernels": 2.0}
    for other in ([], records[:-1], [*records[:-1], (112.0, 114.0, "c")]):
        with pytest.raises(RuntimeError, match="not the same ones each time"):
            medians(other, 3)


def test_kernels_are_told_by_how_much_longer_they_take() -> None:
    own, ordinary = {"site": 3.0, "gemm": 10.5}, {"gemm": 10.0, "residual": 4.0}
    told = list(longer_than(ordinary, own).items())
    assert told == [("residual", -4.0), ("site", 3.0), ("gemm", 0.5)]


def test_tuning_looks_for_kernels_that_there_are() -> None:
    """By the name that the profiler gives them; one that is not there would have no times."""
    assert (
        site_tiles.KERNELS.keys() == site_tiles.GRIDS.keys() == site_tiles.kernel_floors(4).keys()
    )
    assert site_tiles.WIDE_GRIDS.keys() == site_tiles.GRIDS.keys()
    assert {*site_tiles.KERNELS.values()} <= timeline.own_kernels()


@pytest.mark.parametrize("seconds", [0, 600])
def test_tiles_that_are_not_compiled_in_time_are_left_out(
    seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing waits for them: a process that compiles for minutes is ended."""
    grids: tune.Grids = {"coefficients": [(8, 1, 1, 1), (4, 1, 1, 1)], "aggregate": [(4, 512)]}
    asked = argparse.Namespace(streams=4, width=64, processes=1, seconds=seconds)
    ready = tune.compile_all(grids, asked)
    said = capsys.readouterr().out.splitlines()
    if seconds:
        assert (ready, said) == (grids, [])
    else:
        assert ready == {"coefficients": [], "aggregate": []}
        assert said[:2] == [
            "coefficients: no time left to compile (8, 1, 1, 1)",
            "aggregate: no time left to compile (4, 512)",
        ]


def test_what_a_step_costs_is_told_within_each_round() -> None:
    """One model always takes a quarter more, while the clock of both doubles."""
    clock = iter(range(1, 100))
    now = [0.0]

    def ordinary() -> float:
        now[0] = float(next(clock))
        return now[0]

    times = in_turn({"ordinary": ordinary, "wider": lambda: 1.25 * now[0]}, 20)
    assert len(times["ordinary"]) == len(times["wider"]) == 20
    assert ratio(times["wider"], times["ordinary"]) == (1.25, 1.25, 1.25)
    beside = ratio([float(i) for i in range(1, 21)], [1.0] * 20)
    assert beside == (10.5, 3.0, 18.0)
    with pytest.raises(ValueError, match="longer"):
        ratio([1.0], [1.0, 2.0])


def test_a_timeline_tells_messages_that_nothing_runs_beside(tmp_path: Path) -> None:
    """Two kernels of the model, one of ours and two messages, the first half hidden."""
    listed = {
        # milliseconds
        "gemm": [(0, 4), (3, 6)],
        "combine_and_project_kernel": [(6, 8)],
        "ncclDevKernel_SendRecv": [(7, 9), (12, 15)],
        "ncclDevKernel_AllReduce": [(20, 21)],
    }
    events = [
        {"cat": "kernel", "name": name, "ts": 1e3 * begin, "dur": 1e3 * (end - begin)}
        for name, times in listed.items()
        for begin, end in times
    ]
    events.append({"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 9e6})
    trace = tmp_path / "rank-3.json.gz"
    with gzip.open(trace, "wt") as file:
        json.dump({"baseTimeNanoseconds": 2_000_000, "traceEvents": events}, file)
    rows = timeline.rows_of(trace, timeline.own_kernels())
    assert rows == {
        "model": [(2, 8), (22, 23)],
        "mHC": [(8, 10)],
        "messages": [(9, 11), (14, 17)],
    }
    assert spans.exposed(trace) == {"p2p_ms": 5.0, "p2p_alone_ms": 4.0}
    assert timeline.rank_of(trace) == 3


def interpreted(program: str) -> None:
    """Run a program whose kernels Triton's interpreter runs."""
    done = forked_python("-c", program, stage="torch", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


def test_the_kernels_that_are_tuned_run_alone() -> None:
    interpreted("""
from benchmarks.kernels import site_tiles
for n in (4, 8):
    calls = site_tiles.subjects(9, 64, n, device="cpu")
    assert calls.keys() == site_tiles.GRIDS.keys()
    for kernel, call in calls.items():
        site_tiles.use_tile(kernel, site_tiles.running(kernel, n, 64))
        call()
""")


def test_traffic_moves_every_element() -> None:
    """Under the interpreter: a stub of a tile, of a block, and fewer tiles than programs."""
    interpreted("""
import torch
from benchmarks.kernels.traffic import run
x = torch.randn(37, 4, 40)
f = torch.randn(37, 40)
for programs in (1, 2, 9):
    for neighbours in (False, True):
        y = torch.full_like(x, torch.nan)
        run(x, f, y, channels=32, programs=programs, tokens=8, neighbours=neighbours)
        assert torch.equal(y, x + f[:, None])
""")


def test_hooks_are_emptied_beside_a_proxy_of_what_is_gone() -> None:
    from benchmarks.multi_gpu import rounds  # imports Megatron

    class Model:
        pass

    model = Model()
    gone = weakref.ref(model)

    def hook(held: Model = model) -> Any:
        def post_hook() -> Model:
            return held

        post_hook.__qualname__ = f"{rounds.HOOK}.<locals>.hook"
        return post_hook

    kept = [hook(), weakref.proxy(target := Model())]
    del target, model
    hook.__defaults__ = None
    with pytest.raises(ReferenceError):
        isinstance(kept[1], str)
    assert gone() is not None
    rounds.empty_hooks()
    assert gone() is None


def test_floors_count_each_pass_over_a_stream() -> None:
    """Counted at n 4 by hand: the site's kernels, and those of the single pass."""
    assert sites_plot.floors(4) == {"forward": 14, "both": 34}
    assert sites_plot.floors(4, sites_plot.SINGLE_PASS) == {"forward": 10, "both": 25}
    assert sites_plot.floors(1) == {"forward": 5, "both": 13}
