"""Which classes a fold tests, and which it trains."""

from dataclasses import dataclass

from fsdino.data.lists import class_lists
from fsdino.errors import DataError, UserError


@dataclass(frozen=True)
class Folds:
    """A split of classes. Every class is tested in exactly one fold, unless `base` names classes that only train."""

    rule: str
    """Its name in results."""
    tested: tuple[tuple[int, ...], ...]
    """Class ids that each fold tests."""
    trained: tuple[int, ...] | None = None
    """Class ids that every fold trains; none: all that it does not test."""

    def novel(self, fold: int | None) -> list[int]:
        """Class ids that a fold tests; without a fold, none. Raises UserError if there is no such fold."""
        if fold is None:
            return []
        if not 0 <= fold < len(self.tested):
            raise UserError(f"--fold {fold}: expected 0 to {len(self.tested) - 1}")
        return list(self.tested[fold])

    def base(self, fold: int | None) -> list[int]:
        """Class ids that a fold may train; without a fold, all that folds test."""
        if self.trained is not None:
            if fold is None:
                raise UserError("--fold none: the data set says which classes train; use --fold 0")
            return list(self.trained)
        novel = self.novel(fold)
        return sorted(c for classes in self.tested for c in classes if c not in novel)

    def __len__(self) -> int:
        return len(self.tested)


def in_words(fold: int | None) -> str:
    """A fold, or none, as sentences have it."""
    return "all classes" if fold is None else f"fold {fold}"


def blocks(num_classes: int, num_folds: int = 4) -> Folds:
    """PASCAL-5i's folds: fold f tests consecutive classes, 5f+1 ... 5f+5 of 20.

    Raises DataError if a class would be tested in none.
    """
    per_fold = _per_fold(num_classes, num_folds)
    return Folds("blocks", tuple(tuple(range(f * per_fold + 1, (f + 1) * per_fold + 1)) for f in range(num_folds)))


def interleaved(num_classes: int, num_folds: int = 4) -> Folds:
    """COCO-20i's folds: fold f tests classes f+1, f+5, f+9, ... Raises DataError if a class would be tested in none."""
    _per_fold(num_classes, num_folds)
    return Folds("f+4v", tuple(tuple(range(f + 1, num_classes + 1, num_folds)) for f in range(num_folds)))


def parse_folds(place: str, data: bytes, class_names: list[str]) -> Folds:
    """Folds of one's own: one a line, the names of the classes that it tests with commas between them.

    Raises DataError with the line's number for an unknown class or one that comes twice, and for classes that no fold
    tests.
    """
    known = {name: number for number, name in enumerate(class_names, start=1)}
    tested: list[tuple[int, ...]] = []
    seen: dict[str, int] = {}
    for number, names in class_lists(place, data):
        for name in names:
            if name not in known:
                raise DataError(f"{place}: line {number}: expected classes of the data set, got {name!r}")
            if name in seen:
                raise DataError(f"{place}: line {number}: {name} is tested by line {seen[name]} already; remove one")
            seen[name] = number
        tested.append(tuple(known[name] for name in names))
    missing = [name for name in class_names if name not in seen]
    if missing:
        raise DataError(
            f"{place}: expected each class in one fold, got none for {', '.join(missing[:8])}; add them to a line"
        )
    return Folds("folds.txt", tuple(tested))


def _per_fold(num_classes: int, num_folds: int) -> int:
    if num_classes % num_folds:
        untested = num_classes // num_folds * num_folds + 1
        raise DataError(
            f"{num_classes} classes in {num_folds} folds: class {untested} would never be tested; name a number of "
            f"classes that {num_folds} divides, or write the folds into folds.txt, one a line"
        )
    return num_classes // num_folds
