import pytest

from fsdino.data.folds import novel_classes
from fsdino.errors import UserError


def test_pascal_folds_are_consecutive_blocks_of_five():
    assert [novel_classes(f, 20) for f in range(4)] == [list(range(5 * f + 1, 5 * f + 6)) for f in range(4)]


@pytest.mark.parametrize(("number", "untested"), [(9, 9), (3, 1), (2, 1), (81, 81)])
def test_a_class_that_no_fold_would_test_is_named(number, untested):
    with pytest.raises(UserError, match=f"{number} classes in 4 folds: class {untested} would never be tested"):
        novel_classes(0, number)


def test_a_fold_that_does_not_exist_is_a_users_mistake():
    with pytest.raises(UserError, match="--fold 4: expected 0 to 3"):
        novel_classes(4, 20)
