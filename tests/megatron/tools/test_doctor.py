"""What is refused before anything runs, and what `doctor` says: releases, hooks, ids of patches."""

import re
from pathlib import Path

import pytest
import torch

import megatron_mhc
from megatron_mhc import with_mhc
from megatron_mhc.patches.cpu import CPU_PATCHES
from megatron_mhc.patches.supported_versions import (
    REFUSED,
    SUPPORTED,
    distribution_version,
    megatron_core_folder,
    megatron_core_version,
)
from tests.megatron.common.altered_megatron import altered, with_flag, with_release
from tests.megatron.common.flags import RUN, SOURCE, TINY
from tests.megatron.common.launch import ROOT, RUNNER, cold_python, forked_python
from tests.megatron.model.test_specs import specs

REFUSALS = [
    *((f"{series}.1", f"{series}.1 is not supported: {why}. ") for series, why in REFUSED.items()),
    ("0.99.0", "0.99.0 is not supported. "),
]
WAYS = {
    "runner": [*RUN, "--mhc"],
    "auto": ["-c", "import megatron_mhc.auto"],
    # as Megatron's own import_module does it: an ImportError would train the ordinary model
    "spec": [
        "-c",
        "try: __import__('megatron_mhc.spec')\nexcept ImportError: print('trains without mHC')",
    ],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("release", "message"), REFUSALS, ids=[r for r, _ in REFUSALS])
def test_an_unsupported_megatron_is_refused_by_name(
    release: str, message: str, way: str, tmp_path: Path
) -> None:
    """What counts is what an import finds: pip has a supported one on record here."""
    environment = altered(tmp_path, **with_release(release))
    result = forked_python(*WAYS[way], stage="torch", **environment)
    assert result.returncode != 0
    assert (
        f": Megatron-Core {message}It is in {tmp_path}/megatron/core, which"
        f" Python finds before the {distribution_version()} that is installed. megatron_mhc works"
        f" with {SUPPORTED}: pip install 'megatron-core{SUPPORTED}'"
    ) in result.stdout


def test_a_megatron_beside_the_script_is_judged_as_the_script_would_import_it(
    tmp_path: Path,
) -> None:
    """`python SCRIPT` looks in the script's folder first, and so does the runner."""
    altered(tmp_path, **with_release("0.99.0"))
    (tmp_path / "train.py").write_text(SOURCE)
    result = forked_python(*RUNNER, str(tmp_path / "train.py"), *TINY, "--mhc", stage="torch")
    assert result.returncode != 0
    assert f"Megatron-Core 0.99.0 is not supported. It is in {tmp_path}/megatron" in result.stdout


def test_the_found_release_decides_and_not_the_one_on_record(tmp_path: Path) -> None:
    """Patches for some releases alone, and refusals, follow it too."""
    program = (
        "from megatron_mhc.patches.supported_versions import is_installed, check_release\n"
        "check_release()\n"
        "from megatron_mhc.model.compatibility import CONFLICTS, CONFLICTS_OF_0_18\n"
        "print(is_installed('<0.19'), CONFLICTS_OF_0_18[0] in CONFLICTS)"
    )
    for release, is_old in (("0.18.9", True), ("0.19.9", False)):
        folder = tmp_path / release
        folder.mkdir()
        environment = altered(folder, **with_release(release))
        result = forked_python("-c", program, stage="torch", **environment)
        assert result.stdout.splitlines()[-1] == f"{is_old} {is_old}", result.stdout


def test_doctor_says_its_verdict_and_what_to_paste_into_an_issue() -> None:
    """As a user starts it: in a screen, without the names of patches that are as they should be."""
    result = cold_python("-m", "megatron_mhc", "doctor", MEGATRON_MHC_PATCHES="-parameter-groups")
    assert result.returncode == 0, result.stdout
    page = result.stdout[result.stdout.index("doctor: ") :]  # torch logs that there is no CUDA
    verdict, *issue = page.splitlines()
    found = megatron_core_version()
    assert verdict.startswith(f"doctor: all is well, Megatron-Core {found} can train")
    assert issue[:2] == ["", "What to paste into an issue:"] and len(issue) < 22
    assert "UserWarning" not in result.stdout
    rows = dict(line.strip().split(maxsplit=1) for line in issue[2:-2])
    assert rows["megatron_mhc"] == f"{megatron_mhc.__version__} in {ROOT / 'megatron_mhc'}"
    core = f"{found} in {megatron_core_folder()}"
    if distribution_version() != found:  # a checkout's source before the wheel
        core += f"; pip has {distribution_version()} on record, which is not what runs"
    assert rows["megatron-core"] == core
    assert rows["torch"] == torch.__version__.split("+")[0] and rows["GPU"] == "none"
    assert rows["environment"] == "MEGATRON_MHC_PATCHES=-parameter-groups"
    assert rows["hooks"] == "7 of 7 found"
    assert rows["patches"].endswith(" applied; parameter-groups off by MEGATRON_MHC_PATCHES")
    for built in ("Megatron's parser with --mhc", "a layer's spec with mHC", "a HybridModel's"):
        assert built in rows["built"]
    assert "validation" not in page and "cpu-" not in page


def test_doctor_lists_every_patch_when_asked() -> None:
    result = forked_python(
        "-m", "megatron_mhc", "doctor", "--patches", MEGATRON_MHC_PATCHES="-parameter-groups"
    )
    assert result.returncode == 0, result.stdout
    assert "MISSING" not in result.stdout and "ERROR" not in result.stdout
    assert "parameter-groups           off (by MEGATRON_MHC_PATCHES)" in result.stdout
    for applied in ("arguments", "validation", "built-model"):
        assert f"  {applied:26} applied" in result.stdout
    listed = re.findall(r"^  (cpu-\S+) ", result.stdout, re.M)
    assert {patch.id for patch in CPU_PATCHES} - {"shipped-dataset-helpers"} == {*listed}


def test_doctor_fails_with_a_release_that_is_refused(tmp_path: Path) -> None:
    environment = altered(tmp_path, **with_release("0.99.0"))
    result = forked_python("-m", "megatron_mhc", "doctor", **environment)
    assert result.returncode == 1, result.stdout
    assert "doctor: ERROR: Megatron-Core 0.99.0 is not supported. It is in " in result.stdout
    assert result.stdout.count("not supported") == 1, "a patch would say it again"
    assert "What to paste into an issue:" in result.stdout
    assert "Traceback" not in result.stdout


def test_doctor_says_where_the_module_is_not_what_pip_has_on_record(tmp_path: Path) -> None:
    found = megatron_core_version()
    assert found is not None
    release = f"{found.rpartition('.')[0]}.99"
    environment = altered(tmp_path, **with_release(release))
    result = forked_python("-m", "megatron_mhc", "doctor", **environment)
    assert result.returncode == 0, result.stdout
    assert (
        f"  megatron-core              {release} in {tmp_path}/megatron/core; pip has"
        f" {distribution_version()} on record, which is not what runs"
    ) in result.stdout


def test_doctor_fails_where_no_command_line_could_work(tmp_path: Path) -> None:
    """Every patch applies and every hook is there, but the parser cannot be built."""
    environment = altered(tmp_path, **with_flag("--mhc-num-streams", "type=float"))
    result = forked_python("-m", "megatron_mhc", "doctor", **environment)
    assert result.returncode == 1, result.stdout
    assert "doctor: ERROR: Megatron's parser with --mhc: PatchError: Megatron-C" in result.stdout
    assert "conflicting option string: --mhc-num-streams" in result.stdout
    assert result.stdout.count("ERROR") == 1 and "MISSING" not in result.stdout


def test_doctor_fails_where_a_hook_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mhc.tools import doctor

    assert doctor.page()[1]
    missing = [(f"megatron.core:no_such_{name}", "of this test") for name in ("hook", "other")]
    monkeypatch.setattr(doctor, "HOOKS", missing)
    page, is_well = doctor.page()
    assert page.startswith("doctor: ERROR (1 more below): Megatron-Core ") and not is_well
    assert "has no megatron.core:no_such_hook (of this test): " in page.splitlines()[0]
    assert re.search("^  ERROR .*no_such_other", page, re.M)
    assert "  hooks                      0 of 2 found" in page


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("-parameter-groups,-nonsense", "MEGATRON_MHC_PATCHES turns off nonsense, and with Mega"),
        ("parameter-groups", "has the entry 'parameter-groups'; expected ids with a minus"),
    ],
)
def test_doctor_fails_where_a_patch_that_is_turned_off_does_not_exist(
    ids: str, message: str
) -> None:
    result = forked_python("-m", "megatron_mhc", "doctor", MEGATRON_MHC_PATCHES=ids)
    assert result.returncode == 1, result.stdout
    assert message in result.stdout and "Traceback" not in result.stdout


@pytest.mark.parametrize("way", ["activate", "with_mhc"])
def test_ids_of_patches_that_do_not_exist_are_refused(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_mhc.patches import PatchError, registry
    from megatron_mhc.start.activate import activate

    turn_on = activate if way == "activate" else lambda: with_mhc(specs()["local"])
    # the second is of --cpu alone, and the third of a training run alone: neither is unknown
    known = "-muon-layout,-cpu-rng-get,-arguments"
    try:
        monkeypatch.setenv("MEGATRON_MHC_PATCHES", f"{known},-muon_layout")
        with pytest.raises(
            PatchError, match=r"off muon_layout, .* near are muon-layout,.* doctor --patches"
        ):
            turn_on()
        monkeypatch.setenv("MEGATRON_MHC_PATCHES", known)
        turn_on()
    finally:
        registry.undo()
