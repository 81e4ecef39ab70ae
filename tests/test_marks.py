"""Points, boxes and strokes that become masks, by the model that comes with the project."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fsdino.errors import UserError
from fsdino.marks import Frame, Marks, Point, mask_of
from fsdino.predictor import ClassEncoding, Predictor
from pipelines import register
from tests.conftest import ROOT, run

WIDTH = HEIGHT = 512
ASTRONAUT = ROOT / "examples" / "astronaut.jpg"
OUTLINE = [(215, 15), (280, 15), (305, 60), (295, 130), (310, 170), (345, 250), (360, 320), (320, 370), (300, 430)]
OUTLINE += [(300, 511), (15, 511), (30, 420), (60, 330), (105, 240), (120, 170), (165, 140), (155, 70)]
FLAG, SHUTTLE = (20, 150), (410, 120)


@pytest.fixture(scope="module")
def predictor():
    return Predictor.load()


@pytest.fixture(scope="module")
def photograph():
    """An astronaut between a flag and a model of a shuttle, and her outline as drawn by hand."""
    drawn = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(drawn).polygon(OUTLINE, fill=1)
    return Image.open(ASTRONAUT), np.asarray(drawn)


def iou(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


@pytest.mark.parametrize(
    "marks",
    [
        Marks(points=[Point(150, 330), Point(230, 90), Point(250, 420)], others=[Point(*FLAG), Point(*SHUTTLE)]),
        Marks(box=Frame(10, 10, 420, 512)),
        Marks(box=Frame(10, 10, 420, 512), points=[Point(200, 330)]),
    ],
)
def test_a_marked_object_is_found_and_what_is_beside_it_is_not(predictor, photograph, marks):
    image, truth = photograph
    mask = mask_of(predictor, image, marks)
    assert iou(mask, truth) > (0.5 if marks.points else 0.65)
    assert not mask[FLAG[1], FLAG[0]] and not mask[SHUTTLE[1], SHUTTLE[0]]


@pytest.mark.parametrize("box", [Frame(100, 100, 101, 101), Frame(100, 100, 130, 130)])
def test_nothing_outside_a_box_is_the_object(predictor, photograph, box):
    left, top, right, bottom = map(int, box)
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[top:bottom, left:right] = True
    for points in ([], [Point(left, top)]):
        mask = mask_of(predictor, photograph[0], Marks(points=points, box=box))
        assert mask.any() and not (mask & ~inside).any()


def test_marks_are_on_the_photograph_as_it_is_shown(predictor, photograph, tmp_path):
    """A photograph that is stored on its side has the mask of one that is not."""
    turned, exif = photograph[0].rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    marks = Marks(box=Frame(10, 10, 420, 512))
    upright, stored = (
        mask_of(predictor, photograph[0], marks),
        mask_of(predictor, Image.open(tmp_path / "turned.jpg"), marks),
    )
    assert iou(upright, stored) > 0.9


def test_a_single_point_marks_at_least_its_surroundings(predictor, photograph):
    image, truth = photograph
    mask = mask_of(predictor, image, Marks(points=[Point(150, 330)]))
    assert mask[330, 150] and (mask & truth).sum() > 0.8 * mask.sum() > 0.2 * truth.sum()


def test_strokes_mark_the_object_and_what_is_beside_it(predictor, photograph):
    image, truth = photograph
    strokes = np.zeros((HEIGHT, WIDTH), np.uint8)
    strokes[300:500, 170:180] = strokes[60:110, 200:260] = 1
    strokes[20:200, 380:440] = strokes[60:300, 10:30] = 2
    mask = mask_of(predictor, image, Marks(scribble=strokes))
    assert iou(mask, truth) > 0.65 and mask[strokes == 1].all() and not mask[strokes == 2].any()


@pytest.mark.parametrize(
    "marks, said",
    [
        (Marks(points=[Point(300, 300)], box=Frame(10, 10, 60, 60)), "expected a place within the box"),
        (Marks(points=[Point(600, 10)]), "expected a place within 512x512"),
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
def shown(tmp_path):
    out = tmp_path / "person.class"
    return ["--name", "person", "--support", ASTRONAUT, "--out", out], out


def test_a_class_of_marks_is_registered_once_its_masks_are_agreed_with(shown, photograph, predictor):
    line, out = shown
    with pytest.raises(UserError, match="look at the masks"):
        run("register", *line, "--point", "200,330")
    assert not out.exists() and Path(f"{out}.jpg").exists()
    done = run("register", *line, "--box", "10,10,420,512", "--yes")
    mask = np.asarray(Image.open(done["masks"][0])) > 0
    assert iou(mask, photograph[1]) > 0.65 and ClassEncoding.load(out).name == "person"
    predictor.set_image(Image.open(ROOT / "examples" / "camera.jpg"))
    (man,), _ = predictor.segment([ClassEncoding.load(out)])
    assert man[250, 100] and man[120, 200] and not man[400, 450] and not man[50, 400], "another person, and no more"


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
        run("register", *line, "--box", "10,10,420,512")
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    run("register", *line, "--box", "10,10,420,512")
    assert out.exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--point", "70"], "expected X,Y"),
        (["--point", "2:70,90"], "photograph 1 to 1"),
        (["--box", "1,2,3"], "expected LEFT,TOP"),
        (["--box", "1,2,30,40", "1,2,30,50"], "expected one box"),
        (["--other", "5,5"], "expected a --point"),
        (["--point", "200,330", "--mask", "x.png"], "masks or marks"),
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
