"""What all commands share: flags from a settings type and a recipe, exit codes, JSON on the last line."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from typing import Any, TypeVar

import tyro

from feature_store.errors import StoreError, StoreFault
from feature_store.urls import absolute
from fsdino.errors import UserError
from pipelines.outcome import ClusterFault
from pipelines.recipes import RECIPES

PATHS = {
    "places": ("data", "store", "out", "cache"),
    "backbone": ("encoder_weights",),
    "teaching": ("teacher_weights",),
}
"""Settings that are paths, by their section."""
S = TypeVar("S")


ENVIRONMENT = {
    # Neither library may try to reach the internet from a cluster.
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # ray.train.report waits for the next health check: 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
"""Defaults that a user's own environment overrides."""


def main(settings_type: type[S], job: Callable[[S], dict[str, Any]], argv: list[str] | None = None) -> None:
    """Parse the flags, do the job, print its result as one JSON line, and exit.

    Exit codes: 0 done, 2 wrong usage or input (one line on stderr), 1 a fault (a full disk or a dead object store in
    one line, others with their traceback).
    """
    try:
        result = call(settings_type, job, sys.argv[1:] if argv is None else argv)
    except (UserError, StoreError, ClusterFault) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, (StoreFault, ClusterFault)) else 2)
    except KeyboardInterrupt:
        print("stopped; rerun the command to resume", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(result), flush=True)


def call(settings_type: type[S], job: Callable[[S], dict[str, Any]], argv: list[str]) -> dict[str, Any]:
    """What the command does with these arguments, within this process; its errors are raised."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return job(parse(settings_type, argv))


def parse(settings_type: type[S], argv: list[str]) -> S:
    """Settings from the recipe that `--recipe` names, single ones overridden by further flags."""
    name = "paper"
    for position, argument in enumerate(argv):
        if argument == "--recipe" and position + 1 < len(argv):
            name = argv[position + 1]
        elif argument.startswith("--recipe="):
            name = argument.removeprefix("--recipe=")
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: no such recipe; known are {', '.join(RECIPES)}")
    recipe = RECIPES[name]()
    known = {f.name: getattr(recipe, f.name) for f in fields(recipe)} | {"recipe": name}
    given = {f.name: known[f.name] for f in fields(settings_type) if f.name in known}  # type: ignore[arg-type]
    missing = {
        f.name: tyro.MISSING
        for f in fields(settings_type)  # type: ignore[arg-type]
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING
    }
    default = settings_type(**given, **missing)
    settings = tyro.cli(settings_type, args=argv, default=default, config=(tyro.conf.OmitArgPrefixes,))
    # Ray's workers have working folders of their own, so a relative path would name another place there.
    for section, names in PATHS.items():
        values = getattr(settings, section, None)
        if values is not None:
            given = {name: getattr(values, name) for name in names}
            same = {n: absolute(v) for n, v in given.items() if v is not None and not v.startswith("hf:")}
            settings = replace(settings, **{section: replace(values, **same)})  # type: ignore[type-var]
    return settings
