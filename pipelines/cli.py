"""What all commands share: flags from a settings type and a recipe, exit codes, JSON on the last line."""

import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import MISSING, fields
from typing import Any, NoReturn, TextIO, TypeVar

import tyro

from feature_store.errors import StoreError, StoreFault
from feature_store.urls import redacted_text
from fsdino.errors import DataWarning, Fault, UserError, first_line
from pipelines import ray_messages, stopping
from pipelines.checks import checked
from pipelines.recipes import RECIPES

S = TypeVar("S")


ENVIRONMENT = {
    # Neither library may try to reach the internet from a cluster, and progress bars are ours.
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # ray.train.report waits for the next health check: 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
"""Defaults that a user's own environment overrides."""


def main(
    settings_type: type[S],
    job: Callable[[S], dict[str, Any]],
    argv: list[str] | None = None,
    failed: Callable[[dict[str, Any]], bool] = lambda result: False,
) -> None:
    """Parse the flags, do the job, print its result as one JSON line, and exit.

    Exit codes: 0 done, 2 wrong usage or input, 1 a fault (a full disk, a dead server, a training that diverged), each
    in one line on stderr; 130 and 143 stopped by Ctrl-C or SIGTERM; a fault of our own code comes with its traceback.
    Credentials in URLs are printed nowhere.
    """
    ray_messages.keep_terminal()
    warnings.showwarning = _note
    warnings.simplefilter("always", DataWarning)
    try:
        _main(settings_type, job, argv, failed)
    finally:
        ray_messages.end()


def _main(
    settings_type: type[S],
    job: Callable[[S], dict[str, Any]],
    argv: list[str] | None,
    failed: Callable[[dict[str, Any]], bool],
) -> None:
    try:
        with stopping.raised_on_terminate():
            result = call(settings_type, job, sys.argv[1:] if argv is None else argv)
    except (UserError, StoreError, Fault) as error:
        _fail(error, 1 if isinstance(error, (StoreFault, Fault)) else 2)
    except (OSError, MemoryError) as error:  # a disk, a network, a memory that failed where nobody expected it
        _fail(f"{type(error).__name__}: {first_line(error)}; fix this and rerun to resume", 1)
    except KeyboardInterrupt as stopped:
        print("stopped; rerun the command to resume", file=sys.stderr)
        sys.exit(getattr(stopped, "exit_code", 130))
    try:
        line = json.dumps(result, allow_nan=False)
    except ValueError as error:
        _fail(f"the result holds a number that is not finite, which is not JSON ({error})", 1)
    print(redacted_text(line), flush=True)
    if failed(result):
        sys.exit(1)


def _fail(error: Exception | str, code: int) -> NoReturn:
    line = " ".join(str(error).split("\n"))
    print(f"error: {redacted_text(line)}", file=sys.stderr, flush=True)
    sys.exit(code)


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A DataWarning as a note in one line; other warnings as Python prints them."""
    if issubclass(category, DataWarning):
        print(f"note: {redacted_text(str(message))}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


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
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            settings = tyro.cli(settings_type, args=argv, default=default, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stopped:
        if stopped.code:
            raise UserError(_unboxed(said.getvalue())) from None
        raise
    except BrokenPipeError:  # the reader of --help, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    return checked(settings)


def _unboxed(text: str) -> str:
    """What tyro says in a box of several lines, in one."""
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()]
    cut = next((i for i, line in enumerate(lines) if line.startswith(("Argument helptext", "For full helptext"))), None)
    title, *rest = [line for line in lines[:cut] if line] or [""]
    return f"{title}: {' '.join(rest)}; see --help"
