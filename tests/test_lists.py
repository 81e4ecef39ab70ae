import pytest

from fsdino.data.lists import parse_classes, parse_ids
from fsdino.errors import UserError

IDS = ["a_1", "a_2", "b_1"]
FORMS = {
    "plain": b"a_1\na_2\nb_1\n",
    "without a last line end": b"a_1\na_2\nb_1",
    "Windows' line ends and blank lines": b"a_1\r\na_2\r\n\r\nb_1\r\n\r\n",
    "old line ends": b"a_1\ra_2\rb_1\r",
    "byte-order mark": b"\xef\xbb\xbfa_1\na_2\nb_1\n",
    "UTF-16": "a_1\na_2\nb_1\n".encode("utf-16"),
    "invisible characters around": "\u200ba_1\u00a0\na_2\u200b \n\ufeffb_1\n".encode(),
    "paths": b"JPEGImages/a_1.jpg\nJPEGImages/a_2.png\nJPEGImages/b_1.JPG\n",
    "pairs": b"".join(b"/JPEGImages/%s.jpg /SegmentationClassAug/%s.png\n" % (i, i) for i in (b"a_1", b"a_2", b"b_1")),
    "pairs without a first slash": b"JPEGImages/a_1.jpg SegmentationClassAug/a_1.png\na_2.jpg a_2.png\nb_1.jpg b_1.png",
    "VOC's flags": b"x_0 -1\na_1  1\na_2 0\nb_1 1\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_list_gives_the_same_ids(form):
    assert parse_ids("list.txt", FORMS[form]) == IDS


def test_ids_may_hold_spaces_dots_and_folders():
    assert parse_ids("l", b"my cat\nIMG.2012.3\n2007/a b\n") == ["my cat", "IMG.2012.3", "2007/a b"]
    assert parse_ids("l", "katze-ä\n".encode()) == ["katze-ä"]


WRONG = {
    "an id twice": (b"a\nb\na\n", r"l: line 3: a is in line 1 already"),
    "a flag missing": (b"a 1\nb -1\nc\n", r"l: line 3: expected an id and a flag of -1, 0 or 1, as above, got 'c'"),
    "a label missing its image": (b"a.jpg a.png\nb\n", r"l: line 2: expected an image's path and a label's"),
    "another image's label": (b"a.jpg b.png\n", r"l: line 1: expected a label called a, got b.png"),
    "Latin-1": (b"a\nb\nk\xe4tze\n", r"l: line 3: expected UTF-8, got other bytes"),
    "an absolute path": (b"a\n/etc/passwd\n", r"l: line 2: expected an id, a path to an image, or a pair"),
    "a way out": (b"../../secret\n", r"l: line 1: expected an id"),
    "invisible characters within": ("a\nb\u200bc\n".encode(), r"l: line 2: .* characters that cannot be seen"),
    "a table": (b"a.jpg,a.png\n", "l: line 1: expected an id"),
    "quotes": (b'"a"\n', "l: line 1: expected an id"),
    "a remark": (b"a\n# b\n", "l: line 2: expected an id"),
    "another folder of labels": (b"JPEGImages/a.jpg SegmentationObject/a.png\n", "label in SegmentationClassAug"),
    "one id in two spellings": (b"x/a\nx//a\n", "l: line 2: expected an id below the folder"),
    "nothing": (b"\n \n", "l: expected ids of images, one a line, got none"),
    "flags that are all absent": (b"a -1\nb -1\n", "got none"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_understood_is_named_with_its_line(kind):
    data, message = WRONG[kind]
    with pytest.raises(UserError, match=message):
        parse_ids("l", data)


def test_class_names_come_one_a_line():
    assert parse_classes("c", "\ufefftraffic light\r\nstop sign\u200b\r\n\r\n".encode()) == [
        "traffic light",
        "stop sign",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\n\nb\n", "c: line 2: expected the name of class 2, got a blank line"),
        ("a\n\u200b\nb\n".encode(), "c: line 2: expected the name of class 2, got a blank line"),
        (b"a\nb\na\n", "c: line 3: a is the name of class 1 already"),
        (b"0 background\n1 dog\n2 cat\n", "c: line 1: expected names alone, numbered by their lines"),
        (b"__ignore__\n_background_\ncat\n", "c: line 1: expected a class from 1 up, got __ignore__"),
        (b"1,cat\n", "c: line 1: expected the name of a class and nothing else"),
        (b"".join(b"c%d\n" % i for i in range(255)), "c: expected at most 254 classes"),
        (b"", "c: expected names of classes, one a line, got none"),
    ],
)
def test_class_lists_that_number_wrongly_are_refused(data, message):
    with pytest.raises(UserError, match=message):
        parse_classes("c", data)
