"""Samples of a store as columns: the same as Python's own list and dictionary of them."""

import random

import pyarrow as pa
import pytest

from feature_store.samples import Samples
from feature_store.schema import Row

NAMES = ["b", "a", "a1", "a 1", "ä", "é\u0301", "z/9", "z/10", "", "\U0001f600", "\uffff", "2007_000032"]


@pytest.fixture(scope="module")
def rows():
    listed = [Row(name, view, f"/photos/{name}.jpg") for name in NAMES for view in (0, 1, 10)]
    random.Random(0).shuffle(listed)
    return listed


@pytest.fixture(scope="module")
def samples(rows):
    ids, views, sources = zip(*rows, strict=True)
    half = len(rows) // 2
    parts = [
        pa.table({"sample_id": ids[at], "view": pa.array(views[at], pa.int32()), "source": sources[at]})
        for at in (slice(0, half), slice(half, None))
    ]
    return Samples(pa.concat_tables(parts))  # chunks, as a large file has them


def test_rows_are_those_of_the_list_by_number_by_slice_and_one_after_another(rows, samples):
    assert len(samples) == len(rows) and list(samples) == rows and samples[3:9:2] == rows[3:9:2]
    assert [samples[at] for at in range(len(rows))] == rows and samples[-1] == rows[-1]
    with pytest.raises(IndexError):
        samples[len(rows)]


def test_samples_are_found_as_in_a_dictionary_the_second_time_too(rows, samples):
    known = {row[:2]: number for number, row in enumerate(rows)}
    asked = [(name, view) for name in [*NAMES, "c", "\x00", "\U0001f601"] for view in (0, 1, 2, 10, 11)]
    for _ in range(2):
        found = samples.find([name for name, _ in asked], [view for _, view in asked])
        assert found == [known.get(key) for key in asked]


def test_all_views_of_images_are_found_in_the_order_of_the_rows(rows, samples):
    wanted = ["a", "ä", "not there"]
    assert samples.of_images(wanted) == [number for number, row in enumerate(rows) if row.sample_id in wanted]
    assert samples.of_images([]) == []
