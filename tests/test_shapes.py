import numpy as np
import pytest
from PIL import Image

from fsdino.data.episodes import EpisodeSampler
from fsdino.data.masks import binary_label
from fsdino.data.protocols import HDMNET
from fsdino.data.shapes import CLASSES, draw_image, write_shapes
from fsdino.data.voc import VocDataset
from fsdino.errors import UserError
from fsdino.metrics import FewShotScore, count


def test_an_image_depends_on_seed_and_index_alone(tmp_path, shapes_root):
    write_shapes(tmp_path / "few", 3, seed=1, side_px=224)
    for path in (tmp_path / "few" / "JPEGImages").iterdir():
        assert path.read_bytes() == (shapes_root / "JPEGImages" / path.name).read_bytes()


def test_twelve_classes_make_four_folds_that_each_have_test_and_training_images(shapes_root):
    dataset = VocDataset(shapes_root)
    assert len(CLASSES) == len(set(CLASSES)) == 12
    assert sorted(c for fold in range(4) for c in dataset.novel(fold)) == list(range(1, 13))
    for fold in range(4):
        assert len(HDMNET.test_images(dataset, fold)) >= 10 and len(HDMNET.training_images(dataset, fold)) >= 10


def test_images_hold_several_classes_at_very_different_sizes_with_void_borders():
    areas, classes = [], []
    for index in range(60):
        _, label = draw_image(5, index, 224)
        counts = {c: int(n) for c, n in zip(*np.unique(label, return_counts=True), strict=True) if c not in (0, 255)}
        areas += counts.values()
        classes.append(len(counts))
        assert (label == 255).any()
    assert np.mean(classes) > 2.5
    assert np.percentile(areas, 90) > 5 * np.percentile(areas, 10)


def test_colour_alone_scores_like_chance(shapes_root):
    """A prototype of colours, thresholded at best in hindsight per image set, is no better than marking everything."""
    dataset = VocDataset(shapes_root)
    by_colour, by_everything = FewShotScore(list(range(1, 13))), FewShotScore(list(range(1, 13)))
    for fold in range(4):
        sampler = EpisodeSampler(HDMNET.test_images(dataset, fold), shots=1, fold=fold, seed=0, training=False)
        for index in range(40):
            episode = sampler.episode(index)
            support = np.asarray(dataset.image(episode.supports[0]), np.float32)
            mask = binary_label(dataset.label(episode.supports[0]), episode.class_id) == 1
            query = np.asarray(dataset.image(episode.query), np.float32)
            label = binary_label(dataset.label(episode.query), episode.class_id)
            inside, outside = support[mask].mean(0), support[~mask].mean(0)
            nearer = np.linalg.norm(query - inside, axis=2) < np.linalg.norm(query - outside, axis=2)
            by_colour.add(count(nearer, label, boundary=False), episode.class_id)
            by_everything.add(count(np.ones_like(nearer), label, boundary=False), episode.class_id)
    chance = by_everything.result()["miou"]
    assert by_colour.result()["miou"] < 1.3 * chance < 0.25


def test_what_is_complete_is_not_drawn_again_and_other_images_are_left_alone(tmp_path):
    write_shapes(tmp_path, 3, seed=1, side_px=64)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")}
    write_shapes(tmp_path, 3, seed=1, side_px=64)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")} == times
    with pytest.raises(UserError, match=r"expected images of seed 2, side 64, got others .*choose another folder"):
        write_shapes(tmp_path, 3, seed=2, side_px=64)
    write_shapes(tmp_path, 5, seed=1, side_px=64)
    assert len(list((tmp_path / "JPEGImages").iterdir())) == 5


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="expected an empty folder"):
        write_shapes(tmp_path, 3, seed=0)
    (tmp_path / "classes.txt").write_text("mine\n")
    with pytest.raises(UserError, match="expected an empty folder"):
        write_shapes(tmp_path, 3, seed=0)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "thesis.txt": "years of work",
        "classes.txt": "mine\n",
    }


def test_labels_fit_their_images(shapes_root):
    dataset = VocDataset(shapes_root)
    for image_id in dataset.ids("val")[:5]:
        with Image.open(dataset.source(image_id)) as image:
            assert image.size == dataset.label(image_id).shape[::-1] == (224, 224)
