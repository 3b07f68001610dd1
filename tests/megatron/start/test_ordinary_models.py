"""Ordinary models beside the plugin: they train as Megatron alone trains them, digit for digit."""

from pathlib import Path

import pytest

from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.flags import (
    HYBRID_SCRIPT,
    HYBRID_SPEC,
    ROPE,
    RUN,
    SOURCE,
    STAND_IN,
    TINY,
    training_log,
)
from tests.megatron.common.launch import ROOT, forked, forked_python, forked_run

SAYS_ITS_PATCHES = f"""{SOURCE}
from megatron_mhc.start.activate import plugin_patches
from megatron_mhc.patches import registry
applied = [s.patch.id for s in registry.status(*plugin_patches()) if s.state == "applied"]
print("applied:", *applied, flush=True)
"""
ALONE = f"""{STAND_IN}{SOURCE}
import sys
print("plugin", "megatron_mhc.start.activate" in sys.modules)
"""
EXPERTS = ["--num-experts", "2", "--disable-bias-linear"]
ORDINARY: dict[str, tuple[int, list[str]]] = {
    "one process": (1, ["--bf16"]),
    "virtual stages": (
        2,
        [
            *("--bf16", "--use-distributed-optimizer", "--num-layers", "4"),
            *("--pipeline-model-parallel-size", "2"),
            *("--num-layers-per-virtual-pipeline-stage", "1", "--global-batch-size", "4"),
        ],
    ),
    "multi-token prediction": (
        1,
        ["--mtp-num-layers", "1", *ROPE],
    ),
    "hybrid": (1, ["--bf16", *ROPE, *HYBRID_SPEC, "--hybrid-layer-pattern", "*-E*", *EXPERTS]),
}
SOURCES = {
    "hybrid": f"import sys; sys.path.insert(0, 'examples')\n{(ROOT / HYBRID_SCRIPT).read_text()}"
}


def test_the_runner_without_the_flag_trains_as_megatron_alone(tmp_path: Path) -> None:
    """Beside a process that has never imported the plugin, on the CPU as the runner's is."""
    script = tmp_path / "train.py"
    script.write_text(ALONE)
    status, alone = forked(1, str(script), *TINY, stage="torch")
    assert status == 0 and "plugin False" in alone, alone[-3000:]
    assert len(training_log(alone)) == 3
    assert training_log(forked_python(*RUN, stage="torch").stdout) == training_log(alone)


if is_installed("<0.19"):  # whose script builds no such layer
    del ORDINARY["multi-token prediction"]


@pytest.mark.parametrize("case", ORDINARY)
def test_our_patches_change_no_digit_of_an_ordinary_model(case: str, tmp_path: Path) -> None:
    """Those of the optimizer, the schedule and the building of a model are on its way too."""
    from megatron_mhc.patches.cpu import SHIPPED_HELPERS
    from megatron_mhc.patches.spec_function import spec_function_patches
    from megatron_mhc.start.activate import plugin_patches, spec_patch

    script = tmp_path / "train.py"
    source = SAYS_ITS_PATCHES.replace(SOURCE, SOURCES.get(case, SOURCE))
    script.write_text(source)
    processes, flags = ORDINARY[case]
    command = [str(script), *TINY, *flags, "--weight-decay", "0.1", "--log-params-norm"]
    (status, alone), (status_too, patched) = (
        forked_run(processes, *command, runner=runner) for runner in (False, True)
    )
    assert status == status_too == 0, alone[-3000:] + patched[-3000:]
    # the stand-in's, and what importing our spec applies
    few = [patch.id for patch in (*spec_function_patches(), spec_patch(), SHIPPED_HELPERS)]
    assert f"applied: {' '.join(few)}\n" in alone, alone[-3000:]
    assert f"applied: {' '.join(patch.id for patch in plugin_patches())}\n" in patched
    log = training_log(alone)
    assert len(log) == 3 and all("grad norm: " in line for line in log)
    assert training_log(patched) == log
