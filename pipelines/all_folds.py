"""Training of all folds: runs below one that sums them up, as many at once as the cluster has room for."""

import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any

from fsdino.errors import first_line
from pipelines import (
    checkpoints,
    cluster,
    episodic_loop,  # noqa: F401  threads that are the first to ask for it at once may get half of it
    stopping,
    tracking,
    train_episodic,
    training,
)
from pipelines.runs import RunFolder, flat

MEASURES = ("loss", "best_val_miou", "seconds_per_step")


def train(settings: train_episodic.Settings, folds: range) -> dict[str, Any]:
    """Train, or resume, every fold; a fold that fails stops no other, and its error is raised at the end."""
    plans = {fold: train_episodic.planned(settings, fold) for fold in folds}
    runs = {fold: run for fold, (run, _) in plans.items()}
    above, uri = parent(settings, runs), settings.places.tracking_uri
    begun = above.begun()
    there = {fold: run.finished(uri) for fold, run in runs.items()} if begun and begun["closed"] else {}
    records = {fold: record for fold, record in there.items() if record is not None}
    if len(records) < len(folds):
        need = training.resources(settings.workers, settings.device)
        cluster.connect(need, "a fold", training.fewer(settings.device))
        obtainable = cluster.obtainable()
        at_once = int(min(len(folds), *(obtainable.get(kind, 0) // amount for kind, amount in need.items())))
        about = replace(above.about, tags={tracking.SUMMARY: "folds"})
        with (
            tracking.running(uri, about, begun["run_id"] if begun else None, above.outbox) as run,
            stopping.graceful(),
        ):
            above.write(run.run_id)
            tracking.nest(run, [begun["run_id"] for begun in (of.begun() for of in runs.values()) if begun])
            nested = {fold: (replace(of, parent=run.run_id), job) for fold, (of, job) in plans.items()}
            records = _at_once(settings, nested, max(1, at_once))
            run.log(0, **summary(records))
        above.write(run.run_id, closed=not run.unsent)
    results = {str(f): train_episodic.result_of(settings, f, runs[f], records[f]) for f in folds}
    return {"run": above.url, "folds": results, **summary(records)}


def parent(settings: train_episodic.Settings, runs: Mapping[int, RunFolder]) -> RunFolder:
    """The run above: what its folds share, and what tells whether they are the same."""
    leaves = [flat(run.identity) for run in runs.values()]
    shared = {key: value for key, value in leaves[0].items() if all(of.get(key) == value for of in leaves)}
    first = runs[0]
    return replace(
        first,
        name=settings.name or first.name.replace("fold0", "all-folds", 1),
        identity={**shared, "folds": [checkpoints.short_digest(run.identity) for run in runs.values()]},
        inputs=(),
    )


def summary(records: Mapping[int, dict[str, Any]]) -> dict[str, float]:
    """Means over folds, and standard deviations, of what every fold reports."""
    reports = [record["training"] for record in records.values()]
    found: dict[str, float] = {}
    for name in MEASURES:
        values = [report[name] for report in reports if name in report]
        if len(values) == len(records) > 1:
            found |= {name: statistics.fmean(values), f"{name}_std": statistics.stdev(values)}
    return found


def _at_once(
    settings: train_episodic.Settings, plans: "Mapping[int, train_episodic.Plan]", at_once: int
) -> dict[int, dict[str, Any]]:
    """Each fold's record. Raises the first error when all have ended, and Stopped."""
    pool = ThreadPoolExecutor(at_once)
    try:
        pending: dict[int, Future[dict[str, Any]]] = {
            fold: pool.submit(train_episodic.trained, settings, plan) for fold, plan in plans.items()
        }
        for fold, of in pending.items():
            of.add_done_callback(partial(_tell, fold))
        while wait(pending.values(), timeout=0.2).not_done and not stopping.asked():
            pass
        pool.shutdown(cancel_futures=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    stopping.check()
    for error in [of.exception() for of in pending.values()]:
        if error is not None:
            raise error
    return {fold: of.result() for fold, of in pending.items()}


def _tell(fold: int, ended: Future[dict[str, Any]]) -> None:
    """Say at once that a fold failed; the others go on for hours."""
    error = None if ended.cancelled() else ended.exception()
    if error is not None and not isinstance(error, stopping.Stopped):
        print(f"fold {fold} failed: {first_line(error)}", file=sys.stderr)
