"""Points, boxes and strokes that become masks, by the model that comes with the project."""

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fsdino.errors import UserError
from fsdino.marks import Frame, Marks, Point, mask_of
from fsdino.predictor import ClassEncoding, Predictor
from pipelines import register
from tests.conftest import run

WIDTH, HEIGHT, CENTRES, RADIUS = 240, 180, ((70, 90), (185, 70)), 34


@pytest.fixture(scope="module")
def predictor():
    return Predictor.load()


@pytest.fixture(scope="module")
def photograph():
    """Two orange balls on a green ground, and the mask of each."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    discs = [(x - cx) ** 2 + (y - cy) ** 2 < RADIUS**2 for cx, cy in CENTRES]
    colour = np.where((discs[0] | discs[1])[..., None], (230, 120, 30), (60, 130, 50)) + rng.normal(
        0, 25, (HEIGHT, WIDTH, 3)
    )
    image = Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    return image, discs


def iou(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


@pytest.mark.parametrize(
    "marks",
    [
        Marks(points=[Point(*CENTRES[0])]),
        Marks(points=[Point(*CENTRES[0])], others=[Point(10, 10), Point(120, 170)]),
        Marks(box=Frame(30, 50, 110, 130)),
        Marks(box=Frame(30, 50, 110, 130), points=[Point(*CENTRES[0])]),
    ],
)
def test_a_marked_object_is_found_and_the_other_like_it_is_not(predictor, photograph, marks):
    image, (first, second) = photograph
    mask = mask_of(predictor, image, marks)
    assert iou(mask, first) > 0.6 and not (mask & second).any()


def test_strokes_over_two_objects_mark_both(predictor, photograph):
    image, (first, second) = photograph
    strokes = np.zeros((HEIGHT, WIDTH), np.uint8)
    for x, y in CENTRES:
        strokes[y - 3 : y + 3, x - 20 : x + 20] = 1
    strokes[160:170] = 2
    mask = mask_of(predictor, image, Marks(scribble=strokes))
    assert iou(mask, first | second) > 0.6 and not mask[160:170].any()


@pytest.mark.parametrize(
    "marks, said",
    [
        (Marks(points=[Point(300, 10)]), "expected a place within 240x180"),
        (Marks(box=Frame(100, 10, 90, 50)), "left < right"),
        (Marks(others=[Point(5, 5)]), "expected a mark on the object"),
        (Marks(scribble=np.ones((5, 5), np.uint8)), "expected"),
        (Marks(scribble=np.ones((HEIGHT, WIDTH), np.uint8)), "beside the object"),
    ],
)
def test_marks_that_say_nothing_are_refused(predictor, photograph, marks, said):
    with pytest.raises(UserError, match=said):
        mask_of(predictor, photograph[0], marks)


@pytest.fixture
def shown(photograph, tmp_path):
    photograph[0].save(tmp_path / "balls.png")
    out = tmp_path / "ball.class"
    return ["--name", "ball", "--support", tmp_path / "balls.png", "--out", out], out


def test_a_class_of_marks_is_registered_once_its_masks_are_agreed_with(shown, photograph, predictor):
    line, out = shown
    with pytest.raises(UserError, match="look at the masks"):
        run("register", *line, "--point", "70,90")
    assert not out.exists() and out.with_suffix(".jpg").exists()
    done = run("register", *line, "--point", "70,90", "--other", "5,5", "--yes")
    mask = np.asarray(Image.open(done["masks"][0])) > 0
    assert iou(mask, photograph[1][0]) > 0.6 and ClassEncoding.load(out).name == "ball"
    predictor.set_image(photograph[0])
    masks, _ = predictor.segment([ClassEncoding.load(out)])
    assert iou(masks[0], photograph[1][0] | photograph[1][1]) > 0.6, "the class is found wherever it is"


def test_the_answer_to_the_question_decides(shown, monkeypatch):
    line, out = shown

    class Terminal:
        def __init__(self, answer):
            self.answer = answer

        def isatty(self):
            return True

        def readline(self):
            return self.answer

    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    with pytest.raises(UserError, match="not registered"):
        run("register", *line, "--box", "30,50,110,130")
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    run("register", *line, "--box", "30,50,110,130")
    assert out.exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--point", "70"], "expected X,Y"),
        (["--point", "2:70,90"], "photograph 1 to 1"),
        (["--box", "1,2,3"], "expected LEFT,TOP"),
        (["--box", "1,2,30,40", "1,2,30,50"], "expected one box"),
        (["--other", "5,5"], "expected a --point"),
        (["--point", "70,90", "--mask", "x.png"], "masks or marks"),
        (["--scribble", "a.png", "b.png"], "one for each of the 1"),
    ],
)
def test_marks_that_cannot_be_read_are_refused_before_anything_is_loaded(shown, monkeypatch, flags, said):
    monkeypatch.setattr(register.checkpoints, "load_predictor", None)
    with pytest.raises(UserError, match=said):
        run("register", *shown[0], *flags)


def test_marks_of_several_photographs_are_told_apart_by_their_numbers(shown):
    found = register._numbered("--point", ["1,2", "2:3,4", "2:5,6"], 2, 2)
    assert json.dumps(found) == "[[[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]]"
