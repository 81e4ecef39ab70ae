"""A seed of an evaluation: run, written, then logged with pictures and a table of the episodes."""

from typing import Any

import numpy as np

from pipelines import scoring, tracking, video_scoring
from pipelines.runs import ScoreFile, flat
from pipelines.scoring_plan import ScoringPlan


def episodes(plan: ScoringPlan, seed: int, scores: ScoreFile, about: dict[str, Any]) -> dict[str, Any]:
    """`about` with the measures of a seed's episodes (see scoring.result_of)."""
    with _logged(plan, scores) as run:
        found = scoring.score(plan, seed)
        result = {**about, **scoring.result_of(plan, found)}
        table = scoring.parquet(found, plan.dataset.class_names)
        run.file(table, "episodes.parquet")
        _log(run, result)
        scores.write(result, table)
        with tracking.optional(run, "the pictures of episodes"):
            scorer = scoring.scorer_of(plan)
            first = scorer.picture(seed, range(min(scoring.PANEL_ROWS, plan.episodes)))
            run.picture(first, "panels/test.png")
            if plan.panel:
                first.save(plan.panel)
            if plan.lacking is None:
                for name, indices in zip(("best", "worst"), scoring.extremes(found), strict=True):
                    run.picture(scorer.picture(seed, indices), f"panels/{name}.png")
    return result


def videos(plan: ScoringPlan, seed: int, scores: ScoreFile, about: dict[str, Any]) -> dict[str, Any]:
    """`about` with J and F of every object (see video_scoring.score)."""
    with _logged(plan, scores) as run:
        result = {**about, **video_scoring.score(plan)}
        _log(run, result)
        scores.write(result)
    return result


def _logged(plan: ScoringPlan, scores: ScoreFile) -> Any:
    """The MLflow run of a seed."""
    name, tags = f"fold{plan.fold}-{scores.title}", {"dataset": plan.dataset.name}
    return tracking.running(plan.tracking_uri, "evaluate", name, flat(scores.identity), tags, outbox=scores.outbox)


def _log(run: tracking.Run, result: dict[str, Any]) -> None:
    """The measures, kept before the result is written."""
    numbers = {key: value for key, value in result.items() if isinstance(value, float) and np.isfinite(value)}
    per_class = {f"iou_{name}": value for name, value in result.get("per_class", {}).items()}
    run.log(0, **numbers, **per_class)
    run.keep("FINISHED")
