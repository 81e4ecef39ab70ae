"""Commands load what they run and no more: help and refusals need no torch, a prediction no Ray."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import FOLD, ROOT, flags

COMMANDS = sorted(
    path.stem for path in (ROOT / "pipelines").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
)
HEAVY = ("torch", "ray", "mlflow", "pyarrow", "zarr", "timm", "matplotlib", "obstore", "botocore")

PROBE = """
import runpy, sys
from contextlib import suppress
name, sys.argv = sys.argv[1], sys.argv[1:]
with suppress(SystemExit):
    runpy.run_module(f"pipelines.{name}", run_name="__main__", alter_sys=True)
print("LOADED", *[m for m in %r if m in sys.modules])
"""


def loaded_by(name: str, *arguments: object) -> set[str]:
    """Which of the heavy packages a command has loaded when it ends."""
    line = [sys.executable, "-c", PROBE % (HEAVY,), name, *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    (last,) = [text for text in done.stdout.splitlines() if text.startswith("LOADED")]
    return set(last.split()[1:])


def test_every_command_is_known():
    assert len(COMMANDS) == 18 and {"reproduce", "predict", "train_episodic"} < set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_loads_nothing_heavy(name):
    assert loaded_by(name, "--help") == set()


def test_a_mistake_in_a_flag_or_a_path_is_found_without_torch_or_ray(tmp_path, shapes_root):
    for name, arguments in (
        ("extract_features", ["--data", tmp_path]),
        ("extract_features", ["--data", shapes_root, "--res", 75]),
        ("train_episodic", ["--data", shapes_root, "--fold", 9]),
        ("evaluate", ["--data", shapes_root, "--fold", 0, "--store", tmp_path]),
        ("distill", ["--data", shapes_root, "--store", tmp_path]),
    ):
        assert not {"torch", "ray", "mlflow"} & loaded_by(name, "--recipe", "tiny", *arguments), (name, arguments)


def test_a_finished_command_needs_neither_torch_nor_ray_nor_mlflow(whole_run, places):
    two = ["--workers", 2, "--worker-cpus", 0.5]
    for name, arguments in (
        ("extract_teacher", []),
        ("extract_features", ["--coarse-res", 28]),
        ("distill", two),
        ("bake_embeddings", []),
        ("train_episodic", ["--fold", FOLD]),
        ("evaluate", ["--fold", FOLD]),
    ):
        assert not {"torch", "ray", "mlflow"} & loaded_by(name, *flags(places), *arguments), name


def test_a_prediction_loads_neither_ray_nor_mlflow_nor_pyarrow(whole_run, shapes_root, tmp_path):
    photo = shapes_root / "JPEGImages" / "shapes_000000.jpg"
    label = Path(shapes_root) / "SegmentationClassAug" / "shapes_000000.png"
    arguments = ["--checkpoint", whole_run["4d"]["checkpoint"], "--support", photo, "--mask", label, "--query", photo]
    arguments += ["--mask-value", int(np.unique(np.array(Image.open(label)))[1])]
    loaded = loaded_by("predict", *arguments, "--out", tmp_path)
    assert "torch" in loaded and not {"ray", "mlflow", "pyarrow", "zarr", "matplotlib"} & loaded
    assert (tmp_path / "shapes_000000.png").exists()
