"""Progress where there is no terminal: plain lines, not more often than asked."""

import pytest

from megatron_mhc.tools.progress import progress


def shown(capsys: pytest.CaptureFixture[str], seconds: float, unit: str = "files") -> list[str]:
    with progress("tool: doing", 4096, unit, seconds) as bar:
        for _ in range(4):
            bar.update(1024)
    printed, lines = capsys.readouterr()
    assert printed == "" and "\r" not in lines
    return [line.split(" [")[0] for line in lines.splitlines()]


def test_there_is_a_line_at_the_start_one_at_the_end_and_some_between(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ends = ["tool: doing: 0 of 4096 files", "tool: doing: 4096 of 4096 files"]
    assert shown(capsys, seconds=1000) == ends
    every = shown(capsys, seconds=0)
    assert every[:4] == [f"tool: doing: {done} of 4096 files" for done in (0, 1024, 2048, 3072)]
    assert set(every[4:]) == {ends[-1]}


def test_bytes_are_counted_in_units_that_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, 1000, "B") == [
        "tool: doing: 0.00 of 4.00kB",
        "tool: doing: 4.00k of 4.00kB",
    ]


def test_what_fails_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), progress("tool: doing", 2, "files") as bar:
        bar.update()
        raise ValueError("broken")
    assert "tool: doing: 1 of 2 files [" in capsys.readouterr().err.splitlines()[-1]
