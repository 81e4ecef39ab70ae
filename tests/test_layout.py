"""The shard arithmetic: properties, and Zarr's own bytes."""

import itertools

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from feature_store import layout


def test_crc32c_is_the_one_of_rfc_3720():
    assert layout.crc32c(bytes(32)) == 0x8A9136AA
    assert layout.crc32c(b"123456789") == 0xE3069283


@given(st.binary(max_size=300), st.integers(0, 300))
def test_a_checksum_of_parts_is_that_of_the_whole(data, cut):
    assert layout.crc32c(data[cut:], layout.crc32c(data[:cut])) == layout.crc32c(data)


@given(st.integers(1, 100_000))
def test_shards_hold_every_row_once_in_order(num_rows):
    shards = [layout.shard_rows(shard, num_rows) for shard in range(layout.num_shards(num_rows))]
    assert [row for rows in shards for row in rows] == list(range(num_rows))
    assert all(len(rows) == layout.ROWS_PER_SHARD for rows in shards[:-1]) and len(shards[-1]) >= 1


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=layout.ROWS_PER_SHARD))
def test_a_shards_index_leads_to_each_sample_and_its_checksum(samples):
    raw = b"".join(bytes(part) for part in layout.shard_parts([memoryview(s) for s in samples]))
    index = layout.read_index(raw[-layout.INDEX_BYTES :])
    for slot, sample in enumerate(samples):
        offset, length = (int(v) for v in index[slot])
        assert raw[offset : offset + length] == sample + layout.crc_bytes(sample)
    assert (index[len(samples) :] == layout.MISSING).all()


@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=4), st.data())
def test_a_flipped_bit_of_an_index_is_noticed(samples, data):
    raw = bytearray(b"".join(bytes(part) for part in layout.shard_parts([memoryview(s) for s in samples])))
    bit = data.draw(st.integers(0, 8 * layout.INDEX_BYTES - 1))
    raw[len(raw) - layout.INDEX_BYTES + bit // 8] ^= 1 << bit % 8
    assert layout.read_index(bytes(raw[-layout.INDEX_BYTES :])) is None


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=40), st.integers(1, 100))
def test_runs_are_gapless_within_the_limit_and_as_long_as_can_be(gaps, limit):
    spans, at = [], 0
    for gap, length in gaps:
        spans.append((at + gap, length))
        at += gap + length
    groups = layout.runs(spans, limit)
    assert [position for group in groups for position in group] == list(range(len(spans)))
    for group in groups:
        inside = [spans[i] for i in group]
        assert all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(inside))
        assert len(group) == 1 or sum(length for _, length in inside) <= limit
    for one, two in itertools.pairwise(groups):
        (start, length), (following, more) = spans[one[-1]], spans[two[0]]
        joined = sum(spans[i][1] for i in one) + more
        assert start + length != following or joined > limit


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.sampled_from(["float16", "float32", "int8"]))
def test_zarr_writes_the_same_bytes(num_rows, dtype):
    values = np.random.default_rng(num_rows).integers(-9, 9, (num_rows, 2, 2, 3)).astype(dtype)
    held = {}
    array = zarr.create_array(
        store=zarr.storage.MemoryStore(held),
        shape=values.shape,
        chunks=(1, 2, 2, 3),
        shards=(layout.ROWS_PER_SHARD, 2, 2, 3),
        dtype=dtype,
        compressors=[Crc32cCodec()],
        fill_value=-100 if dtype == "int8" else np.nan,
    )
    array[:] = values
    for shard in range(layout.num_shards(num_rows)):
        rows = layout.shard_rows(shard, num_rows)
        samples = [memoryview(values[row].reshape(-1).view(np.uint8)) for row in rows]
        ours = b"".join(bytes(part) for part in layout.shard_parts(samples))
        assert ours == held[layout.shard_key(shard)].to_bytes()


@pytest.mark.parametrize("raw", [b"", bytes(10), bytes(layout.INDEX_BYTES)])
def test_what_is_no_index_is_refused(raw):
    assert layout.read_index(raw) is None
