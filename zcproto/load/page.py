"""The report of a run as one HTML file, with its plot and without anything to load."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH: Final = 110
_TEMPLATE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>zcproto bench</title>
<style>
body {{ margin: 2rem auto; max-width: 70rem; padding: 0 1rem; font-family: system-ui, sans-serif; color: #1f2933 }}
pre {{ white-space: pre-wrap; font: 0.9rem/1.4 ui-monospace, monospace }}
img {{ max-width: 100% }}
</style>
<body>
<h1>zcproto bench</h1>
<img src="data:image/svg+xml;base64,PLOT" alt="Plot of the figures below">
<pre>{code}</pre>
</body>
</html>
"""


def write_page(path: Path, show: Callable[[Console], None], figure: Figure) -> None:
    """Write what `show` prints, below a plot."""
    plot = io.BytesIO()
    figure.savefig(plot, format="svg")
    console = Console(file=io.StringIO(), record=True, width=WIDTH, force_terminal=True, highlight=False)
    show(console)
    template = _TEMPLATE.replace("PLOT", base64.b64encode(plot.getvalue()).decode())
    path.write_text(console.export_html(code_format=template, inline_styles=True), encoding="utf-8")
