import pytest

from fsdino.data.folds import blocks, interleaved, parse_folds
from fsdino.errors import UserError


def test_pascal_folds_are_consecutive_blocks_of_five():
    folds = blocks(20)
    assert [folds.novel(f) for f in range(4)] == [list(range(5 * f + 1, 5 * f + 6)) for f in range(4)]
    assert folds.base(1) == [*range(1, 6), *range(11, 21)] and (len(folds), folds.rule) == (4, "blocks")


def test_coco_folds_take_every_fourth_class():
    folds = interleaved(80)
    assert folds.novel(0)[:4] == [1, 5, 9, 13] and folds.novel(3)[-1] == 80
    assert sorted(c for f in range(4) for c in folds.novel(f)) == list(range(1, 81))


@pytest.mark.parametrize("rule", [blocks, interleaved])
@pytest.mark.parametrize(("number", "untested"), [(9, 9), (3, 1), (2, 1), (81, 81)])
def test_a_class_that_no_fold_would_test_is_named(number, untested, rule):
    with pytest.raises(UserError, match=f"{number} classes in 4 folds: class {untested} would never be tested"):
        rule(number)


def test_a_fold_that_does_not_exist_is_a_users_mistake():
    with pytest.raises(UserError, match="--fold 4: expected 0 to 3"):
        blocks(20).novel(4)


NAMES = ["cat", "dog", "traffic light", "cow", "hen"]


def test_folds_of_ones_own_may_differ_in_size():
    folds = parse_folds("folds.txt", b"dog, traffic light\r\ncat\n\ncow,hen\n", NAMES)
    assert folds.tested == ((2, 3), (1,), (4, 5)) and folds.base(1) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat,dog\ncow,hen\n", "expected each class in one fold, got none for traffic light"),
        ("cat,dog,cow\nhen,bird\n", "line 2: expected classes of the data set, got 'bird'"),
        ("cat,dog,cow\nhen,cat\n", "line 2: cat is tested by line 1 already"),
        ("cat,,dog\n", "line 1: expected names of classes with commas between them"),
    ],
)
def test_folds_that_leave_a_class_out_or_in_doubt_are_refused(text, expected):
    with pytest.raises(UserError, match=expected):
        parse_folds("folds.txt", text.encode(), NAMES)
