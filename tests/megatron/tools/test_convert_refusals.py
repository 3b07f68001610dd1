"""What `convert` refuses: in a sentence that says which file, why, and what to do."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.converting import command, ordinary, with_mhc


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's checkpoints are."""
    return tmp_path_factory.mktemp("convert")


def test_convert_refuses_in_a_sentence_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = ordinary("dense", folder), folder / "target"
    (folder / "there").mkdir()
    cut = shutil.copytree(source, folder / "cut")
    data = cut / "iter_0000003" / "__1_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])
    before = {with_mhc(folder), *folder.iterdir()}
    for arguments, message in (
        ((source, folder / "there"), "is there already"),
        ((folder, target), "is no torch_dist checkpoint"),
        ((with_mhc(folder), target), "with mHC already"),
        ((cut, target), "ends in the middle of"),
        ((source, target, "--mhc-num-streams", "0"), "num_streams is 0"),
    ):
        with pytest.raises(SystemExit, match=f"^convert: .*{message}"):
            command(monkeypatch, *arguments)
        assert set(folder.iterdir()) == before


def _cut(file: Path) -> None:
    """Cut a file short, as a full disk does; what convert leaves out is behind the first 1000."""
    file.write_bytes(file.read_bytes()[: min(1000, file.stat().st_size // 2)])


LAST = "latest_checkpointed_iteration.txt"
WHAT_TO_DO = "copy it again from where it was saved, or give the folder of an earlier iteration"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "tracker empty": (
        lambda source: (source / LAST).write_text("\n"),
        f"SOURCE/{LAST} is empty, not the number of an iteration (or 'release'): write the last"
        " saved iteration's number into it, or give that iteration's folder",
    ),
    "tracker no number": (
        lambda source: (source / LAST).write_text("iter_0000003"),
        f"SOURCE/{LAST} says 'iter_0000003', not the number of an iteration (or 'release'): write"
        " the last saved iteration's number into it, or give that iteration's folder",
    ),
    "tracker no text": (
        lambda source: (source / LAST).write_bytes(b"\xff\x80"),
        f"SOURCE/{LAST} says '\ufffd\ufffd', not the number of an iteration (or 'release'): write"
        " the last saved iteration's number into it, or give that iteration's folder",
    ),
    "iteration missing": (
        lambda source: (source / LAST).write_text("12"),
        f"SOURCE/{LAST} says 12, and there is no folder SOURCE/iter_0000012: bring it back, or give"
        " the folder of an iteration that is there",
    ),
    "source missing": (
        shutil.rmtree,
        "there is no folder SOURCE: give one that --save wrote to",
    ),
    "metadata missing": (
        lambda source: (source / "iter_0000003" / ".metadata").unlink(),
        f"SOURCE/iter_0000003/.metadata is missing, so the folder is not whole: {WHAT_TO_DO}",
    ),
    "metadata empty": (
        lambda source: (source / "iter_0000003" / ".metadata").write_bytes(b""),
        "SOURCE/iter_0000003/.metadata cannot be read (Ran out of input), so it is cut off or"
        f" damaged: {WHAT_TO_DO}",
    ),
    "metadata cut": (
        lambda source: _cut(source / "iter_0000003" / ".metadata"),
        "SOURCE/iter_0000003/.metadata cannot be read (pickle data was truncated), so it is cut off"
        f" or damaged: {WHAT_TO_DO}",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_checkpoint_is_refused_in_a_sentence(
    broken: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which file, why, and what to do; and the target's parents are not left behind either."""
    source = shutil.copytree(ordinary("dense", folder), tmp_path / "source")
    spoil, message = BROKEN[broken]
    spoil(source)
    before = {file: file.stat().st_size for file in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as refused:
        command(monkeypatch, source, tmp_path / "new" / "target")
    assert refused.value.code == f"convert: {message}".replace("SOURCE", str(source))
    assert {file: file.stat().st_size for file in tmp_path.rglob("*")} == before


FILES = ["__0_0.distcp", "__1_0.distcp", "metadata.json"]
if is_installed("<0.19"):
    FILES.append("common.pt")


@pytest.mark.parametrize("harm", [_cut, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_any_other_broken_file_is_refused_in_a_sentence(
    name: str,
    harm: Callable[[Path], None],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch, pickle and Megatron raise of it differs; none of it reaches the user whole."""
    source = shutil.copytree(ordinary("dense", folder), tmp_path / "source")
    file = source / "iter_0000003" / name
    harm(file)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as refused:
        command(monkeypatch, source, tmp_path / "new" / "target")
    message = str(refused.value.code)
    assert message.startswith("convert: ") and str(file.parent) in message
    assert "\n" not in message, message
    assert message.endswith(WHAT_TO_DO), message
    assert set(tmp_path.rglob("*")) == before
