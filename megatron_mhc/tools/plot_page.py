"""`python -m megatron_mhc plot`: pictures of one or several runs, and a page that shows them."""

import base64
import html
from pathlib import Path

from .plot_pictures import Picture, pictures
from .plot_runs import Run, largest, read_run
from .progress import progress


def _table(runs: list[Run]) -> str:
    """The last numbers of every run, as rows of an HTML table."""
    rows = []
    for run in runs:
        cells = [run.label, f"{run.loss.steps[-1]}", f"{run.loss.values[-1]:.4f}"]
        if run.logged:
            for name in ("gain_forward_mean", "gain_forward_max", "gain_backward_mean"):
                cells.append(f"{run.over_steps(name).values[-1]:.4g}")
            errors = run.logged[-1]["site"]["row_error"]
            cells.append(f"{largest(errors):.1e}" if run.logged[-1]["variant"] == "mhc" else "–")
        cells += ["–"] * (7 - len(cells))
        rows.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    return "\n".join(rows)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>mHC runs</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
figure {{ margin: 2em 0; }}
img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.3em 0.8em; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
</head>
<body>
<h1>mHC runs</h1>
<p>The last logged values. Gains are Amax gains of the composite H_res over the whole depth.
A &ndash; stands where a run logged none: gains and errors want --mhc-log-interval and mHC.</p>
<table>
<tr><th>run</th><th>step</th><th>loss (nats a token)</th><th>gain forward, mean</th>
<th>gain forward, largest token</th><th>gain backward, mean</th><th>row error of H_res</th></tr>
{table}
</table>
{figures}
</body>
</html>
"""


def _drawn(pictures: list[Picture], output: Path) -> tuple[list[Path], list[str]]:
    """Write a PNG a picture; their files, and for each a figure of the page."""
    written, figures = [], []
    names: set[str] = set()
    with progress("plot: drawing", len(pictures), "pictures") as bar:
        for picture in pictures:
            # labels that differ in punctuation alone share a file name
            name = picture.name
            while name in names:
                name += "_"
            names.add(name)
            file = output / f"{name}.png"
            picture.figure.savefig(file, dpi=120)
            written.append(file)
            encoded = base64.b64encode(file.read_bytes()).decode()
            figures.append(
                f'<figure><img alt="{html.escape(picture.name)}"'
                f' src="data:image/png;base64,{encoded}">'
                f"<figcaption>{html.escape(picture.explanation)}</figcaption></figure>"
            )
            bar.update()
    return written, figures


def write_plots(texts: list[str], output: Path) -> list[Path]:
    """Read runs, write one PNG a picture and `index.html`, which holds them all.

    Shows its progress.

    Args:
        texts: `FOLDER` or `LABEL=FOLDER`, one a run.
        output: a folder, made if it is not there.

    Returns:
        The files that were written, the page last.

    Raises:
        SystemExit: a package is missing, two runs have one label, or a run cannot be read.
    """
    try:
        import matplotlib  # noqa: F401
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"plot: {error.name} is not installed: pip install matplotlib tensorboard"
        ) from error
    runs = []
    with progress("plot: reading", len(texts), "runs") as bar:
        for number, text in enumerate(texts):
            runs.append(read_run(text, f"C{number}"))
            bar.update()
    labels = [run.label for run in runs]
    if doubled := {label for label in labels if labels.count(label) > 1}:
        raise SystemExit(
            f"plot: several runs are called {', '.join(sorted(doubled))}: give them names,"
            " LABEL=FOLDER"
        )
    output.mkdir(parents=True, exist_ok=True)
    written, figures = _drawn(pictures(runs), output)
    page = output / "index.html"
    page.write_text(PAGE.format(table=_table(runs), figures="\n".join(figures)))
    return [*written, page]
