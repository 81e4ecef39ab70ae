"""Every evaluation that MLflow holds, beside the published ones: one Markdown and one HTML page.

    python -m pipelines.report --out outputs/report

The paper's Tables 1 to 4 with the runs found, bar charts with the deviation over seeds, and a grid of predictions. A
row holds runs that differ in nothing but fold, seed and checkpoint; what differs otherwise has a row of its own, which
says in what. Cells that no run fills are shown as missing; `reproduce --table` runs what they lack.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdino.errors import UserError
from pipelines.checks import Folder, TrackingUri
from pipelines.cli import main
from pipelines.tables import Group, Method


@dataclass(frozen=True)
class Settings:
    """Write a report of all evaluations."""

    tracking_uri: TrackingUri = "sqlite:///outputs/mlflow.db"
    """MLflow: sqlite:///FILE or the http address of a server."""
    out: Folder = "outputs/report"
    """Folder for report.md and report.html."""
    dataset: str | None = None
    """Evaluations of this data set alone."""


def job(settings: Settings) -> dict[str, Any]:
    """Gather, write both pages, print the Markdown before the JSON line."""
    groups = gathered(settings)
    if not groups:
        of = f" of {settings.dataset}" if settings.dataset else ""
        raise UserError(f"{settings.tracking_uri}: expected evaluations{of}, found none; run evaluate first")
    from pipelines import report_pages

    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    text = report_pages.markdown(groups)
    (folder / "report.md").write_text(text)
    (folder / "report.html").write_text(report_pages.html(groups, settings.tracking_uri))
    print(text)
    return {
        "markdown": str(folder / "report.md"),
        "html": str(folder / "report.html"),
        "methods": {group.title: shown(group.methods) for group in groups if not group.absent},
        "absent": {group.title: shown(group.methods) for group in groups if group.absent},
    }


def gathered(settings: Settings) -> list[Group]:
    """All evaluations, those together that are comparable."""
    file = Path(settings.tracking_uri.removeprefix("sqlite:///"))
    if settings.tracking_uri.startswith("sqlite:///") and not file.exists():
        return []
    from pipelines import tables

    asked = {} if settings.dataset is None else {"dataset": settings.dataset}
    found: dict[tuple[str, str, str, str, str, str, str], dict[str, Method]] = {}
    for name, method in tables.gather(settings.tracking_uri, **asked).items():
        of = method.identity
        ways, sizes = of.get("ways", "1"), (of["shots"], of["fusion"], of["episodes"])
        key = (of["dataset"], of["rules.name"], ways, *sizes, of["absent"])
        found.setdefault(key, {})[name] = method
    return [
        Group(dataset, protocol, ways, shots, fusion, episodes, absent == "True", tables.named(list(methods.values())))
        for (dataset, protocol, ways, shots, fusion, episodes, absent), methods in sorted(found.items())
    ]


def shown(methods: Mapping[str, Method]) -> dict[str, Any]:
    """Scores of each method by fold and seed, as JSON."""
    return {name: method.folds for name, method in methods.items()}


if __name__ == "__main__":
    main(Settings, job)
