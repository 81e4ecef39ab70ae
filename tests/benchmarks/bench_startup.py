"""How long whole commands take, in pairs with another checkout; a Markdown table.

    python -m tests.benchmarks.bench_startup pairs.json --out docs/benchmarks/startup.md

`pairs.json` maps a title to `{"before": [FOLDER, COMMAND], "after": [FOLDER, COMMAND]}`: a shell command and the folder
to run it in. Both run in turn, in random order, as whole processes; `limit_s` beside them is the time allowed.
"""

import json
import random
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from tests.benchmarks.provenance import provenance


@dataclass(frozen=True)
class Settings:
    """Time pairs of commands."""

    pairs: tyro.conf.Positional[Path]
    """JSON file of the pairs."""
    runs: int = 5
    """Runs of each."""
    out: Path | None = None
    """Markdown file to write."""


def seconds(folder: str, command: str) -> float:
    """Of one run."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, shell=True, check=True, capture_output=True)
    return time.perf_counter() - started


def measure(pair: dict[str, Any], runs: int) -> dict[str, list[float]]:
    """Seconds of each side, run by run, after one run of each that does not count."""
    sides = ("before", "after")
    for side in sides:
        seconds(*pair[side])
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(runs):
        for side in random.sample(sides, 2):
            times[side].append(seconds(*pair[side]))
    return times


def main(settings: Settings) -> None:
    """All pairs in turn."""
    lines = [
        "# Starting up",
        "",
        f"{provenance('python -m tests.benchmarks.bench_startup')}: whole processes on an idle machine,",
        f"{settings.runs} runs of each in random order, after one that does not count. Seconds: median (min to max).",
        "",
        "| command | before | after | ratio of medians | allowed |",
        "|---|---|---|---|---|",
    ]
    for title, pair in json.loads(settings.pairs.read_text()).items():
        times = measure(pair, settings.runs)
        before, after = (statistics.median(times[side]) for side in ("before", "after"))
        cells = [f"{statistics.median(t):.2f} ({min(t):.2f} to {max(t):.2f})" for t in times.values()]
        lines.append(f"| {title} | {' | '.join(cells)} | {before / after:.1f} | {pair.get('limit_s', '-')} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if settings.out:
        settings.out.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Settings))
