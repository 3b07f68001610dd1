"""`--yaml-cfg`, where Megatron forgets the command line: mHC is refused, not dropped."""

from pathlib import Path

import pytest

from tests.megatron.common.flags import SCRIPT
from tests.megatron.common.launch import forked_run


@pytest.mark.parametrize(
    ("yaml", "flags", "message"),
    [
        ("", ["--mhc", "--mhc-num-streams", "2"], "--mhc, --mhc-num-streams beside --yaml-cfg"),
        ("mhc: true", [], "mhc in the file beside --yaml-cfg"),
        ("spec: [megatron_mhc.spec, gpt_layer_spec]", [], "spec in the file beside --yaml-cfg"),
    ],
)
def test_mhc_beside_yaml_is_refused(
    yaml: str, flags: list[str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"use_checkpoint_args: false\n{yaml}\n")
    status, printed = forked_run(1, SCRIPT, "--yaml-cfg", str(file), *flags)
    assert status == 1 and f"megatron_mhc.run: {message}" in printed, printed[-2000:]
