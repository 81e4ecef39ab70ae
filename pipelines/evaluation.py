"""A seed of an evaluation: run, written, then logged with pictures and a table of the episodes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from fsdino.data.protocols import protocol_of
from pipelines import datasets, scoring, tracking, video_scoring
from pipelines.recipes import departures
from pipelines.runs import About, ScoreFile, flat
from pipelines.scoring_plan import ScoringPlan


def episodes(
    plan: ScoringPlan, seed: int, scores: ScoreFile, about: dict[str, Any], parent: str | None
) -> dict[str, Any]:
    """`about` with the measures of a seed's episodes (see scoring.result_of); `parent` is the run of several seeds."""
    with _logged(plan, scores, f"-seed{seed}", parent) as run:
        found = scoring.score(plan, seed)
        result = {**about, **scoring.result_of(plan, found)}
        table = scoring.parquet(found, plan.dataset.class_names)
        run.file(table, "episodes.parquet")
        _log(run, result)
        scores.write(result, table)
        with tracking.optional(run, "the pictures of episodes"):
            scorer = scoring.scorer_of(plan)
            if plan.ways == 1:  # a panel shows one class
                first = scorer.picture(seed, range(min(scoring.PANEL_ROWS, plan.episodes)))
                run.picture(first, "panels/test.png")
                if plan.panel:
                    first.save(plan.panel)
            if plan.lacking is None and plan.ways == 1:
                for name, indices in zip(("best", "worst"), scoring.extremes(found), strict=True):
                    run.picture(scorer.picture(seed, indices), f"panels/{name}.png")
    return result


def videos(
    plan: ScoringPlan, seed: int, scores: ScoreFile, about: dict[str, Any], parent: str | None
) -> dict[str, Any]:
    """`about` with J and F of every object (see video_scoring.score)."""
    with _logged(plan, scores, "", parent) as run:
        result = {**about, **video_scoring.score(plan)}
        _log(run, result)
        scores.write(result)
    return result


@contextmanager
def summary(plan: ScoringPlan, scores: ScoreFile) -> Iterator[tracking.Run]:
    """The run of several seeds, above theirs; a rerun after a kill continues it."""
    with _logged(plan, scores, "", None, scores.begun(), {tracking.SUMMARY: "seeds"}) as run:
        scores.begin(run.run_id)
        yield run


def summarise(run: tracking.Run, scores: ScoreFile, result: dict[str, Any]) -> None:
    """Log the means and deviations of several seeds, and write them."""
    numbers = {key: value for key, value in result.items() if isinstance(value, float)}
    run.log(0, **numbers, **{f"{key}_std": value for key, value in result["std"].items()})
    run.keep("FINISHED")
    scores.write(result)


def _logged(
    plan: ScoringPlan,
    scores: ScoreFile,
    suffix: str,
    parent: str | None,
    run_id: str | None = None,
    tags: dict[str, str] | None = None,
) -> AbstractContextManager[tracking.Run]:
    """The MLflow run of a score."""
    about = About(
        pipeline="evaluate",
        dataset=plan.dataset.name,
        name=f"fold{plan.fold}-{scores.title}-{_test(plan, scores)}{suffix}",
        params=flat(scores.identity),
        inputs=plan.inputs,
        tags={
            **(tags or {}),
            tracking.TEST: f"{plan.dataset.name} {_test(plan, scores)} {_size(plan, scores)}",
        },
        parent=parent,
        trained_by=plan.trained_by,
    )
    return tracking.running(plan.tracking_uri, about, run_id, scores.outbox)


def _test(plan: ScoringPlan, scores: ScoreFile) -> str:
    """What kind of test it is, in words; whatever makes another kind of score of a model has one."""
    words = ["absent"] if plan.lacking is not None else []
    words += [f"{plan.ways}way"] if plan.ways > 1 else []
    words += ["vote"] if plan.vote and scores.identity["shots"] > 1 else []
    words += ["masks-kept"] if scores.identity.get("empties") is False else []
    words += ["pairs"] if scores.identity["lists"][1] else []
    own = protocol_of(plan.rules.name).of(plan.dataset)
    words += departures(replace(own, **{name: getattr(plan.rules, name) for name in datasets.OF_SCORING}), own)
    return "-".join([f"{scores.identity['shots']}shot", plan.rules.name, *words])


def _size(plan: ScoringPlan, scores: ScoreFile) -> str:
    """Episodes of a seed, and seeds."""
    seeds = scores.identity["test_seed"]
    return f"{plan.episodes}x{len(seeds) if isinstance(seeds, list) else 1}"


def _log(run: tracking.Run, result: dict[str, Any]) -> None:
    """The measures, kept before the result is written."""
    numbers = {key: value for key, value in result.items() if isinstance(value, float) and np.isfinite(value)}
    per_class = {f"iou_{name}": value for name, value in result.get("per_class", {}).items()}
    run.log(0, **numbers, **per_class)
    run.keep("FINISHED")
