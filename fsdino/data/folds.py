"""Which classes a fold tests."""

from fsdino.errors import DataError, UserError


def novel_classes(fold: int, num_classes: int, num_folds: int = 4) -> list[int]:
    """The classes fold f tests: PASCAL-5i's consecutive blocks, 5f+1 ... 5f+5 for 20 classes (ids start at 1).

    Raises UserError if there is no such fold, or if a class would be tested in none.
    """
    if num_classes % num_folds:
        untested = num_classes // num_folds * num_folds + 1
        raise DataError(
            f"{num_classes} classes in {num_folds} folds: class {untested} would never be tested; name a number of "
            f"classes that {num_folds} divides"
        )
    if not 0 <= fold < num_folds:
        raise UserError(f"--fold {fold}: expected 0 to {num_folds - 1}")
    per_fold = num_classes // num_folds
    return list(range(fold * per_fold + 1, (fold + 1) * per_fold + 1))
