"""Every flag of every command at values that nobody means: one line, no traceback, no secret, within seconds."""

import importlib
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pipelines import cli
from pipelines.checks import Location, Range, Tracking
from pipelines.recipes import RECIPES

COMMANDS = (
    "extract_teacher extract_features distill bake_embeddings train_episodic evaluate predict report analyze_layers "
    "generate_shapes reproduce demo check_data register annotate export"
).split()
SECRET = "hunter2"
NUMBERS = ("0", "-1", "1" + "0" * 30, "nan", "inf", "1e400")
NEEDED = {
    "train_episodic": ["--fold", "0"],
    "evaluate": ["--fold", "0"],
    "predict": ["--checkpoint", "c", "--support", "a.jpg", "--mask", "a.png", "--query", "b.jpg"],
    "annotate": "--images photos --class c.class --to there".split(),
    "export": "--checkpoint c --to there".split(),
    "register": "--checkpoint c --name n --support a.jpg --mask a.png --out c.class".split(),
}


def settings_of(name):
    module = importlib.import_module(f"pipelines.{name}")
    return module.Settings, module.job


def flags_of(kind):
    """Flag to the type of its setting, sections flattened."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner = next((t for t in (hint, *get_args(hint)) if isinstance(t, type) and is_dataclass(t)), None)
        if inner is not None:
            found |= flags_of(inner)
        else:
            found[f"--{name.replace('_', '-')}"] = hint
    return found


def rule_of(hint):
    for part in (hint, *get_args(hint)):
        for rule in getattr(part, "__metadata__", ()):
            if isinstance(rule, (Range, Location, Tracking)):
                return rule
    return next((r for p in get_args(hint) if not isinstance(p, str) if (r := rule_of(p))), None)


def said(capsys, name, arguments):
    """Exit code and the lines of a command that ends in an error."""
    kind, job = settings_of(name)
    started = time.perf_counter()
    with pytest.raises(SystemExit) as stopped:
        cli.main(kind, job, [*NEEDED.get(name, []), *map(str, arguments)])
    seconds = time.perf_counter() - started
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and captured.err.splitlines()[-1] == lines[0], captured.err
    assert "Traceback" not in captured.err and SECRET not in captured.err + captured.out
    assert stopped.value.code in (1, 2) and seconds < 4, (stopped.value.code, seconds)
    return stopped.value.code, lines[0]


def is_number(hint):
    return any(t in (int, float) for t in _leaves(hint))


def _leaves(hint):
    inner = [a for a in get_args(hint) if isinstance(a, type) or get_args(a)]
    return [leaf for a in inner for leaf in _leaves(a)] if inner else [hint]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_range_that_is_checked_first(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for flag, hint in flags_of(settings_of(name)[0]).items():
        if not is_number(hint):
            continue
        rule = rule_of(hint)
        assert isinstance(rule, Range), f"{name} {flag}: a number without a range"
        for value in NUMBERS:
            try:
                inside = rule.low <= float(value) <= rule.high and (rule.closed or float(value) > rule.low)
            except ValueError:
                inside = False
            if not inside or value == "nan":
                code, line = said(capsys, name, [f"{flag}={value}"])
                assert code == 2 and flag in line, line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_place_refuses_what_it_cannot_be_and_tells_no_secret(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    for flag, hint in flags_of(settings_of(name)[0]).items():
        rule = rule_of(hint)
        if not isinstance(rule, (Location, Tracking)):
            assert str not in _leaves(hint) or flag in NO_PLACES, f"{name} {flag}: a string that is no place?"
            continue
        scheme = "http" if isinstance(rule, Tracking) else "s3"
        code, line = said(capsys, name, [f"{flag}={scheme}://user:{SECRET}@host/x"])
        assert code == 2 and "without credentials" in line and flag in line
        if isinstance(rule, Tracking) or rule.written:
            inside = "sqlite:///" if isinstance(rule, Tracking) else ""
            for place in (file / "inner", "/proc/inner"):
                code, line = said(capsys, name, [f"{flag}={inside}{place}/x"])
                assert code == 2 and flag in line and "expected a folder" in line
    assert sorted(tmp_path.iterdir()) == [file]


NO_PLACES = {
    *("--recipe", "--encoder", "--teacher", "--protocol", "--name", "--model-name", "--dataset", "--sam-decoder"),
    *("--support", "--mask", "--query", "--panel", "--plot", "--classes", "--out"),
    *("--first", "--point", "--other", "--box", "--scribble"),
}
"""Strings that are names, and files whose own checks are below: photographs may be at signed addresses."""

NO_RECIPE = ("predict", "annotate", "export", "report", "generate_shapes", "demo", "check_data")
MISSING = [
    ("extract_teacher", ["--data", "nowhere"], "expected a data set"),
    ("extract_features", ["--images", "nowhere"], "expected photographs, found none"),
    ("distill", ["--data", "nowhere"], "expected a data set"),
    ("bake_embeddings", ["--data", "nowhere"], "expected a data set"),
    ("train_episodic", ["--data", "nowhere"], "expected a data set"),
    ("evaluate", ["--data", "file"], "expected a data set"),
    ("evaluate", ["--data", "nosuch://x/y"], "expected a path or an fsspec URL"),
    ("predict", [], "a.jpg: expected an image file, found nothing there"),
    ("predict", [f"--support=https://user:{SECRET}@127.0.0.1:9/a.jpg?token={SECRET}"], "127.0.0.1:9/a.jpg"),
    ("annotate", ["--class", "c.class"], "or a class file"),
    ("export", [], "expected a checkpoint"),
    ("report", [], "expected evaluations, found none"),
    ("analyze_layers", ["--data", "nowhere"], "expected a data set"),
    ("generate_shapes", ["--data", "file"], "expected a folder"),
    ("reproduce", ["--data", "nowhere"], "expected a data set"),
    ("demo", ["--fold", "7"], "expected 0 to 3"),
    ("check_data", ["--data", "nowhere"], "expected a data set"),
    ("evaluate", ["--encoder", "dinov9"], "dinov9"),
    ("evaluate", ["--checkpoint", "nowhere"], "expected"),
    ("evaluate", ["--recipe", "none"], "no such recipe"),
    ("evaluate", ["--protocol", "none"], "no such protocol"),
]


@pytest.mark.parametrize(("name", "arguments", "expected"), MISSING, ids=[f"{n} {a}" for n, a, _ in MISSING])
def test_what_is_not_there_is_named(capsys, tmp_path, monkeypatch, shapes_root, name, arguments, expected):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    data = ["--data", shapes_root] if "--data" in flags_of(settings_of(name)[0]) and name != "generate_shapes" else []
    recipe = ["--recipe", "tiny"] if name not in NO_RECIPE else []
    _, line = said(capsys, name, [*recipe, *data, *arguments])
    assert expected in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--name", "a" * 181], "at most 180 bytes"),
        (["--name", "a/b"], "without /"),
        (["--name", "scores"], "a folder of its own"),
        (["--model-name", "a:b"], "--model-name a:b: expected a name without"),
    ],
)
def test_names_that_no_disk_or_registry_takes_are_refused(capsys, shapes_root, arguments, expected):
    code, line = said(capsys, "train_episodic", ["--recipe", "tiny", "--data", shapes_root, *arguments])
    assert code == 2 and expected in line


def test_recipes_are_within_their_own_ranges():
    from pipelines.checks import checked

    for recipe in RECIPES.values():
        for section in fields(recipe()):
            checked(getattr(recipe(), section.name))


def test_the_last_line_is_json_or_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(settings_of("report")[0], lambda settings: {"loss": float("nan")}, [])
    captured = capsys.readouterr()
    assert stopped.value.code == 1 and captured.out == "" and "not JSON" in captured.err
