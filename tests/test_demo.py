"""The driver of `make demo`, from images to a table."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from pipelines import panels
from pipelines.recipes import demo_recipe
from pipelines.train_episodic import decisive
from tests.conftest import run

SMALL = ["--images", 96, "--steps", 3, "--episodes", 8]


@pytest.mark.slow
def test_the_demo_runs_its_recipe_to_a_table_and_a_rerun_only_prints_it(tmp_path, capsys):
    result = run("demo", "--out", tmp_path, *SMALL)
    printed = capsys.readouterr().out
    for method, title in (("prototype", "training-free prototype"), ("compact", "compact model"), ("4d", "4D model")):
        (row,) = [line for line in printed.splitlines() if line.startswith(title)]
        assert row.split()[-2:] == [f"{result[method][key]:.3f}" for key in ("miou", "fb_iou")]
    assert f"ui --backend-store-uri {result['tracking_uri']}" in printed
    with Image.open(result["panel"]) as panel:
        assert panel.height > 6 * panels.CELL_PX  # six episodes below their captions

    recipe, records = demo_recipe(), {}
    for path in Path(tmp_path, "runs").rglob("segmenter.json"):
        record = json.loads(path.read_text())
        records[record["config"]["variant"]] = record
    for variant in ("compact", "4d"):
        assert records[variant]["config"] == asdict(replace(recipe.model, variant=variant))
        assert records[variant]["episodic"] == decisive(replace(recipe.episodic, steps=3))
        assert records[variant]["train_precision"] == "fp32" and records[variant]["adapter"]["kind"] == "distilled"

    log = (tmp_path / "demo.log").read_text()
    assert "extracting" in log
    again = run("demo", "--out", tmp_path, *SMALL)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}
    assert "extracting" not in (tmp_path / "demo.log").read_text()[len(log) :]
