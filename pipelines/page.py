"""A report as one HTML page: tables, bar charts with error bars, and a grid of pictures, all in the one file."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence

from PIL import Image

from pipelines.tables import Method, Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1600px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: 3px 6px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.ours { background: #eef5ff; } tr.ours td:first-child { background: #eef5ff; }
img { max-width: 100%; } li { margin: 2px 0; } .note { color: #555; font-size: 13px; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    name, body = html.escape(title), "\n".join(parts)
    head = f'<head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head>'
    return f'<!doctype html>\n<html lang="en">{head}<body>\n<h1>{name}</h1>\n{body}\n</body></html>\n'


def heading(text: str) -> str:
    """A section's title."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A line of text."""
    return f'<p class="note">{html.escape(text)}</p>'


def listed(lines: Sequence[str]) -> str:
    """Lines as a list."""
    return '<ul class="note">' + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def table(cells: Table) -> str:
    """A table; rows whose first cell is bold are ours."""
    head, *rows = cells
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        ours = ' class="ours"' if row[0].startswith("**") else ""
        shown = (html.escape(cell.replace("**", "")) for cell in row)
        lines.append(f"<tr{ours}>" + "".join(f"<td>{cell}</td>" for cell in shown) + "</tr>")
    return "\n".join([*lines, "</table>"])


def picture(image: Image.Image, caption: str) -> str:
    """A picture within the page."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<p><img alt="{html.escape(caption)}" src="data:image/jpeg;base64,{data}"></p>{paragraph(caption)}'


def bars(methods: Mapping[str, Method], measure: str, what: str) -> str:
    """Mean over folds of each method as a bar, with the deviation over seeds, and each fold as a point."""
    from matplotlib.figure import Figure

    names = sorted(methods, key=lambda name: methods[name].mean(measure)[0])
    figure = Figure(figsize=(8, 0.45 * len(names) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for position, name in enumerate(names):
        mean, deviation = methods[name].mean(measure)
        axes.barh(position, 100 * mean, xerr=None if deviation is None else 100 * deviation, color="#7aa6d9", capsize=4)
        folds = [100 * methods[name].cell(fold, measure)[0] for fold in sorted(methods[name].folds)]
        axes.plot(folds, [position] * len(folds), ".", color="#333", markersize=5)
    axes.set_yticks(range(len(names)), [name if len(name) < 60 else f"{name[:57]}..." for name in names])
    axes.set_xlabel(what)
    axes.set_xlim(0, _ceiling(100 * max(methods[name].mean(measure)[0] for name in names)))
    axes.grid(axis="x", alpha=0.3)
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return file.getvalue()[file.getvalue().index("<svg") :]


def _ceiling(value: float) -> float:
    return min(100.0, 10 * math.ceil(value / 10 + 1))
