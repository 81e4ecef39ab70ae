"""Bad input ends with exit code 2 and one clear line; flags come from settings and recipes."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from feature_store import Fingerprint, Row, create
from pipelines import evaluate, extract_features, extract_teacher, outputs, predict, train_episodic
from pipelines.cli import main, parse
from pipelines.recipes import RECIPES
from tests.conftest import ROOT


def mistake(capsys, module, *arguments):
    """The one line that a command says on stderr before it exits with 2."""
    with pytest.raises(SystemExit) as stopped:
        main(module.Settings, module.job, [str(a) for a in arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [text for text in captured.err.splitlines() if text.startswith("error: ")]
    assert captured.err.splitlines()[-1] == line
    return line


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path)
    return path


def mask_file(tmp_path, array):
    path = tmp_path / "mask.png"
    Image.fromarray(array).save(path)
    return path


def prediction(photo, mask, query=None):
    return ["--checkpoint", "nowhere", "--support", photo, "--mask", mask, "--query", query or photo]


def test_a_wrong_recipe_name(capsys):
    line = mistake(capsys, evaluate, "--recipe", "papre")
    assert line == "error: --recipe papre: no such recipe; known are paper, offline, demo, tiny"


def test_a_missing_photograph(capsys, photo, tmp_path):
    line = mistake(capsys, predict, *prediction(tmp_path / "gone.jpg", photo))
    assert "gone.jpg: expected an image file, found nothing there" in line


def test_a_mask_of_another_size(capsys, photo, tmp_path):
    line = mistake(capsys, predict, *prediction(photo, mask_file(tmp_path, np.ones((4, 4), np.uint8))))
    assert "expected a mask of the photograph's size 30x20, got 4x4" in line


def test_an_empty_mask(capsys, photo, tmp_path):
    line = mistake(capsys, predict, *prediction(photo, mask_file(tmp_path, np.zeros((20, 30), np.uint8))))
    assert "expected at least one foreground pixel, got none" in line


def test_a_missing_mask(capsys, photo):
    line = mistake(capsys, predict, "--checkpoint", "x", "--support", photo, photo, "--mask", photo, "--query", photo)
    assert "expected one mask for each of the 2 supports, got 1" in line


def test_a_missing_checkpoint(capsys, photo, tmp_path):
    line = mistake(capsys, predict, *prediction(photo, mask_file(tmp_path, np.eye(20, 30, dtype=np.uint8))))
    assert "nowhere: expected a checkpoint with segmenter.json, found none" in line


def test_an_unknown_class_in_a_label(capsys, tmp_path, shapes_root):
    import shutil

    root = shutil.copytree(shapes_root, tmp_path / "copy")
    first = sorted((root / "SegmentationClassAug").iterdir())[1]
    Image.fromarray(np.full((224, 224), 77, np.uint8)).save(first)
    line = mistake(capsys, train_episodic, "--recipe", "tiny", "--data", root, "--fold", 0)
    assert "expected classes 0 to 12 and 255, got 77" in line


def test_a_fold_that_does_not_exist(capsys, shapes_root):
    line = mistake(capsys, evaluate, "--recipe", "tiny", "--data", shapes_root, "--fold", 9)
    assert line == "error: --fold 9: expected 0 to 3"


def test_a_missing_data_set(capsys, tmp_path):
    line = mistake(capsys, extract_features, "--recipe", "tiny", "--data", tmp_path / "none")
    assert "expected a data set, found none of these layouts: voc: JPEGImages" in line


def test_a_missing_store(capsys, shapes_root, tmp_path):
    line = mistake(capsys, evaluate, "--recipe", "tiny", "--data", shapes_root, "--fold", 0, "--store", tmp_path)
    assert "late@70: expected a feature store, found none; extract it first" in line


def test_a_store_of_other_weights(capsys, shapes_root, tmp_path):
    fingerprint = Fingerprint("late", "tiny_vit", "abc", "block3", "final", 70, 5, 48, view_seed=0, preprocessing="v1")
    create(str(tmp_path / "shapes" / "tiny_vit" / "late@70"), fingerprint, [Row("a", 0, "a.jpg")])
    arguments = ["--recipe", "tiny", "--data", shapes_root, "--store", tmp_path, "--features", "late"]
    line = mistake(capsys, extract_features, *arguments)
    assert "holds a store with another fingerprint (weights: expected" in line


def test_a_resolution_that_the_encoder_cannot_take(capsys, shapes_root, tmp_path):
    line = mistake(
        capsys, extract_features, "--recipe", "tiny", "--data", shapes_root, "--store", tmp_path, "--res", 75
    )
    assert line == "error: --res 75: tiny_vit needs a multiple of 14; 70 is one"


def test_a_flag_that_does_not_exist_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(predict.Settings, predict.job, ["--supprt", "x"])
    assert stopped.value.code == 2


def test_a_flag_overrides_its_recipe_and_leaves_the_rest():
    settings = parse(train_episodic.Settings, ["--recipe", "offline", "--fold", "2", "--lr", "0.5"])
    recipe = RECIPES["offline"]()
    assert settings.episodic.lr == 0.5 and settings.fold == 2
    assert settings.episodic.batch == recipe.episodic.batch and settings.backbone == recipe.backbone


def test_the_paper_is_the_default_recipe_and_states_its_numbers():
    settings = parse(train_episodic.Settings, ["--fold", "1"])
    assert (settings.backbone.encoder, settings.backbone.res) == ("dinov2_vitb14", 518)
    assert (settings.episodic.epochs, settings.episodic.batch, settings.episodic.lr) == (100, 8, 1e-3)
    assert RECIPES["paper"]().distillation.distill_res == (126, 252, 518)
    assert RECIPES["paper"]().teaching.teacher == "sam_vit_h"


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(evaluate.Settings, ["--recipe", "offline", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for flag in ("--recipe", "--data", "--store", "--res", "--fold", "--shots", "--method", "--episodes"):
        assert flag in text
    assert "default: 400" in text and "default: hdmnet" in text


def test_a_mask_never_replaces_an_input(capsys, photo, tmp_path):
    mask = mask_file(tmp_path, np.eye(20, 30, dtype=np.uint8))
    query = tmp_path / "mask.jpg"
    query.write_bytes(photo.read_bytes())
    line = mistake(capsys, predict, *prediction(photo, mask, query), "--out", tmp_path)
    assert f"what is written for {query} would overwrite the input {mask}" in line


def test_masks_of_equal_names_are_numbered_and_spare_the_panel(tmp_path):
    made = outputs.writers(["mask", "labels", "yolo"], tmp_path, ["cat"], False)
    queries = ["a.jpg", "b/a.png", "a-2.jpg", "panel.jpg", "a_labels.jpg", "classes.jpg"]
    names = outputs.stems(queries, made, [tmp_path / "panel.png"], [])
    assert names == ["a", "a-2", "a-2-2", "panel-2", "a_labels-2", "classes-2"]


def test_no_query_at_all(capsys, photo, tmp_path):
    mask = mask_file(tmp_path, np.eye(20, 30, dtype=np.uint8))
    arguments = ["--checkpoint", "x", "--support", photo, "--mask", mask, "--query"]
    assert "--query: expected at least one photograph" in mistake(capsys, predict, *arguments)


def test_an_unknown_kind_of_url(capsys, shapes_root):
    line = mistake(capsys, extract_features, "--recipe", "tiny", "--data", shapes_root, "--store", "nosuch://x")
    assert "expected a path or an fsspec URL, got: Protocol not known: nosuch" in line


def test_a_damaged_checkpoint(capsys, photo, tmp_path):
    (tmp_path / "segmenter.json").write_text("{")
    mask = mask_file(tmp_path, np.eye(20, 30, dtype=np.uint8))
    arguments = ["--checkpoint", tmp_path, "--support", photo, "--mask", mask, "--query", photo]
    assert "expected a whole checkpoint, got a damaged one" in mistake(capsys, predict, *arguments)


def test_training_on_the_store_of_another_encoder(capsys, shapes_root, tmp_path):
    fingerprint = Fingerprint("late", "dinov2_vitb14", "abc", "l", "none", 70, 5, 48, view_seed=0, preprocessing="p")
    create(str(tmp_path / "shapes" / "tiny_vit" / "late@70"), fingerprint, [Row("a", 0, "a.jpg")])
    line = mistake(capsys, train_episodic, "--recipe", "tiny", "--data", shapes_root, "--store", tmp_path, "--fold", 0)
    assert (
        "fingerprint mismatch (model: expected tiny_vit, got dinov2_vitb14; layer: expected block3, got l; norm:"
        in line
    )


def test_no_step_at_all(capsys, shapes_root):
    line = mistake(capsys, train_episodic, "--recipe", "tiny", "--data", shapes_root, "--fold", 0, "--steps", 0)
    assert line == "error: --steps 0: expected 1 to 1e+09"


def test_relative_weight_files_are_found_by_workers_in_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = ["--teacher-weights", "sam.pth", "--encoder-weights", "hf:someone/net"]
    settings = parse(extract_teacher.Settings, ["--recipe", "tiny", *weights])
    assert settings.teaching.teacher_weights == str(tmp_path / "sam.pth")
    assert settings.backbone.encoder_weights == "hf:someone/net"


def test_help_may_be_cut_short_by_its_reader():
    line = [sys.executable, "-m", "pipelines.evaluate", "--help"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        command.stdout.close()
        assert command.stderr.read() == b""
    assert command.returncode == 0


@pytest.mark.parametrize("name", ["a?b.db", "a%20b.db"])
def test_a_database_whose_name_sqlalchemy_would_change(capsys, name):
    line = mistake(capsys, evaluate, "--fold", 0, "--tracking-uri", f"sqlite:///{name}")
    assert "expected a path without ? and %" in line
