"""What is refused before anything runs, and what `doctor` says: releases, hooks, ids of patches."""

from pathlib import Path

import pytest

from megatron_mhc import with_mhc
from megatron_mhc.patches.releases import REFUSED, SUPPORTED, megatron_core_version
from tests.megatron.common.flags import RUN
from tests.megatron.common.launch import cold_python, forked_python
from tests.megatron.model.test_specs import specs

REFUSALS = [
    *((f"{series}.1", f"{series}.1 is not supported: {why}. ") for series, why in REFUSED.items()),
    ("0.21.0", "0.21.0 is not supported. "),
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


def installed(release: str, folder: Path) -> dict[str, str]:
    """The environment in which Python believes that this release of Megatron-Core is installed."""
    (folder / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "real = m.version\n"
        f"m.version = lambda name: {release!r} if name == 'megatron-core' else real(name)\n"
    )
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("release", "message"), REFUSALS, ids=[r for r, _ in REFUSALS])
def test_an_unsupported_megatron_is_refused_by_name(
    release: str, message: str, way: str, tmp_path: Path
) -> None:
    result = forked_python(*WAYS[way], stage="torch", **installed(release, tmp_path))
    assert result.returncode != 0
    assert (
        f"UnsupportedMegatronError: Megatron-Core {message}megatron_mhc works with {SUPPORTED}:"
        f" pip install 'megatron-core{SUPPORTED}'"
    ) in result.stdout


def test_doctor_knows_every_hook_and_patch() -> None:
    """As a user starts it."""
    result = cold_python("-m", "megatron_mhc", "doctor", MEGATRON_MHC_PATCHES="-parameter-groups")
    assert result.returncode == 0, result.stdout
    assert "MISSING" not in result.stdout and "ERROR" not in result.stdout
    assert f"megatron-core              {megatron_core_version()}" in result.stdout
    assert "parameter-groups           off (by MEGATRON_MHC_PATCHES)" in result.stdout
    for applied in ("arguments", "validation", "built-model"):
        assert f"  {applied:26} applied" in result.stdout


def test_doctor_fails_with_a_release_that_is_refused(tmp_path: Path) -> None:
    result = forked_python("-m", "megatron_mhc", "doctor", **installed("0.21.0", tmp_path))
    assert result.returncode == 1, result.stdout
    assert "  ERROR Megatron-Core 0.21.0 is not supported. " in result.stdout
    assert "Traceback" not in result.stdout


def test_doctor_fails_where_a_hook_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mhc.tools import doctor

    assert doctor.page()[1]
    monkeypatch.setattr(doctor, "HOOKS", (("megatron.core:no_such_hook", "of this test"),))
    page, is_well = doctor.page()
    assert "  MISSING (" in page and not is_well


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
        with pytest.raises(PatchError, match=r"off muon_layout, .* known are .*, muon-layout, "):
            turn_on()
        monkeypatch.setenv("MEGATRON_MHC_PATCHES", known)
        turn_on()
    finally:
        registry.undo()
