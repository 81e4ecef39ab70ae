"""The samples of an opened store, as columns of its manifest: Python objects of ten million would fill a machine."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np

from feature_store.schema import Row

if TYPE_CHECKING:  # as in manifest.py
    import pyarrow as pa

REMEMBERED = 1 << 18  # places of samples that were searched for, 200 bytes each
FIELDS = ("sample_id", "view", "source")


class Samples(Sequence[Row]):
    """The rows of a plan or manifest. Each is made as it is asked for."""

    def __init__(self, table: "pa.Table"):
        self._table = table.select(FIELDS)
        self._ids = table["sample_id"].combine_chunks()
        self._views = table["view"].to_numpy()
        self._found: dict[tuple[str, int], int] = {}

    def __len__(self) -> int:
        return len(self._views)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return Row(*(self._table[name][int(at)].as_py() for name in FIELDS))

    def __iter__(self) -> Iterator[Row]:
        for batch in self._table.to_batches(max_chunksize=65536):
            yield from map(Row, *(column.to_pylist() for column in batch.columns))

    def find(self, sample_ids: Sequence[str], views: Sequence[int]) -> list[int | None]:
        """Row numbers of samples, None for those that are not here."""
        keys = zip(sample_ids, views, strict=True)
        return [found if (found := self._found.get(key)) is not None else self._find(key) for key in keys]

    def of_images(self, sample_ids: Iterable[str]) -> list[int]:
        """Row numbers of images under all their views, ascending."""
        import pyarrow as pa
        import pyarrow.compute as pc

        return np.flatnonzero(pc.is_in(self._ids, value_set=pa.array(set(sample_ids), pa.string()))).tolist()

    def _find(self, key: tuple[str, int]) -> int | None:
        at = bisect_left(range(len(self)), key, key=self._nth)
        if at == len(self) or self._nth(at) != key:
            return None
        row = int(self._order[at])
        if len(self._found) < REMEMBERED:
            self._found[key] = row
        return row

    def _nth(self, at: int) -> tuple[str, int]:
        """The sample that is at a place in their order."""
        row = int(self._order[at])
        return self._ids[row].as_py(), int(self._views[row])

    @cached_property
    def _order(self) -> np.ndarray:
        """Row numbers by sample and view."""
        import pyarrow.compute as pc

        by = [("sample_id", "ascending"), ("view", "ascending")]
        return pc.sort_indices(self._table, sort_keys=by).to_numpy()
