"""HSNet's lists of images and classes, in both their forms."""

import pickle

import pytest

from fsdino.data.episodes import EpisodeSampler
from fsdino.data.pairs import of_pairs, read_pairs
from fsdino.data.protocols import HSNET, ImageClasses
from fsdino.data.voc import VocDataset
from fsdino.errors import UserError
from tests.conftest import run


@pytest.fixture
def dataset(shapes_root):
    return VocDataset(shapes_root)


@pytest.fixture
def lists(tmp_path, dataset):
    """Of every fold the pairs that have a pixel, in HSNet's layout."""
    for split, name in (("train", "trn"), ("val", "val")):
        (tmp_path / name).mkdir()
        pixels = dataset.class_pixels(split)
        for fold in range(4):
            pairs = [(i, c) for i, counts in pixels.items() for c in counts if c in dataset.novel(fold)]
            (tmp_path / name / f"fold{fold}.txt").write_text("".join(f"{i}__{c:02d}\n" for i, c in pairs))
    return tmp_path


def test_text_lists_train_by_the_other_folds_and_test_by_their_own(dataset, lists):
    train, test = (read_pairs(str(lists), dataset, 1, training) for training in (True, False))
    assert {c for _, c in test} == set(dataset.novel(1)) and {c for _, c in train} == {1, 2, 3, *range(7, 13)}
    image_id, class_id = test[0]
    assert dataset.mask(image_id, class_id).any() and image_id in dataset.ids("val")
    assert of_pairs([("a", 2), ("b", 1), ("a", 1)]) == {
        "a": ImageClasses((1, 2), (1, 2)),
        "b": ImageClasses((1,), (1,)),
    }


def test_test_queries_are_the_lists_lines_in_their_order(dataset, lists):
    pairs = read_pairs(str(lists), dataset, 2, training=False)
    sampler = EpisodeSampler(
        of_pairs(pairs), shots=1, fold=2, seed=3, training=False, order=HSNET.order, pairs=pairs, repeats_supports=True
    )
    drawn = [sampler.episode(i) for i in range(2 * len(pairs))]
    assert [(e.query, e.class_id) for e in drawn] == pairs * 2
    assert all(e.supports[0] != e.query for e in drawn)


def test_pickled_lists_are_read_without_running_anything(dataset, tmp_path):
    names = dataset.ids("val")
    (tmp_path / "val").mkdir()
    content = {c: [f"val2014/{name}.jpg" for name in names[c::9]] if c < 3 else [] for c in range(12)}
    (tmp_path / "val" / "fold0.pkl").write_bytes(pickle.dumps(content))
    pairs = read_pairs(str(tmp_path), dataset, 0, training=False)
    assert pairs[:2] == [(names[0], 1), (names[9], 1)] and {c for _, c in pairs} == {1, 2, 3}

    class Evil:
        def __reduce__(self):
            return print, ("it ran",)

    (tmp_path / "val" / "fold0.pkl").write_bytes(pickle.dumps({0: Evil()}))
    with pytest.raises(UserError, match=r"fold0.pkl: expected a dictionary from class to images, got: it would load"):
        read_pairs(str(tmp_path), dataset, 0, training=False)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("image", r"fold0.txt: line 2: expected IMAGE__CLASS, got 'image'"),
        ("strange__01", r"fold0.txt: line 2: expected an image of the data set, got strange"),
        ("{known}__09", r"fold0.txt: line 2: class 9 is none of fold 0's"),
    ],
)
def test_a_line_that_cannot_be_right_is_named(dataset, lists, line, expected):
    known = dataset.ids("val")[0]
    (lists / "val" / "fold0.txt").write_text(f"{known}__01\n{line.format(known=known)}\n")
    with pytest.raises(UserError, match=expected):
        read_pairs(str(lists), dataset, 0, training=False)


def test_an_evaluation_by_lists_asks_for_their_pairs(whole_run, places, lists):
    from tests.conftest import FOLD, flags

    arguments = [*flags(places), "--fold", FOLD, "--method", "prototype", "--protocol", "hsnet", "--pairs", lists]
    score = run("evaluate", *arguments)
    assert (
        score["protocol"] == "hsnet" and score["rules"]["order"] == "pairs" and score["rules"]["scored_at"] == "square"
    )
    assert score["miou"] != whole_run["score prototype"]["miou"]
    assert run("evaluate", *arguments, "--scored-at", "label")["rules"]["scored_at"] == "label"
