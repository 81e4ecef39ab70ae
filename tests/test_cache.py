"""The local cache of a remote store: a range server before a folder, and processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from feature_store import CacheSettings, FeatureStore, Fingerprint, Row, StoreError, create
from feature_store.cache import SampleCache
from feature_store.layout import shard_key, shard_rows
from tests.servers import range_server

FINGERPRINT = Fingerprint(
    feature="late",
    model="m",
    weights="w1",
    layer="l",
    norm="none",
    res_px=56,
    grid=4,
    channels=8,
    view_seed=0,
    preprocessing="p",
)
ROWS = [Row(f"image {i}", 0, f"/photos/image {i}.jpg") for i in range(50)]
SAMPLE = 4 * 4 * 8 * 2  # bytes in the cache


def fill(folder, seed=0):
    data = np.random.default_rng(seed).standard_normal((len(ROWS), 4, 4, 8)).astype(np.float16)
    writer = create(str(folder), FINGERPRINT, ROWS)
    for shard in writer.missing():
        rows = shard_rows(shard, len(ROWS))
        writer.write(shard, data[rows.start : rows.stop], [(5, 5)] * len(rows))
    writer.seal()
    return data


@pytest.fixture
def served(tmp_path):
    """A store's folder behind a web server, its data and its URL."""
    folder = tmp_path / "served" / "late@56"
    data = fill(folder)
    with range_server(tmp_path / "served") as address:
        yield folder, data, f"{address}/late@56"


def settings(tmp_path, limit=10**9):
    return CacheSettings(str(tmp_path / "cache"), limit)


def cached(tmp_path):
    return sorted(int(p.name) for p in (tmp_path / "cache").glob("*/*") if p.name.isdigit())


def test_a_sample_that_was_read_once_needs_no_server(served, tmp_path):
    folder, data, url = served
    store = FeatureStore(url, cache=settings(tmp_path))
    assert np.array_equal(store.read([7, 40, 7]), data[[7, 40, 7]])
    assert cached(tmp_path) == [7, 40]
    for shard in (0, 1):
        (folder / shard_key(shard)).unlink()
    assert np.array_equal(store.read([40, 7], dtype=np.float32), data[[40, 7]].astype(np.float32))
    with pytest.raises(StoreError, match="shard 0 is missing"):
        store.read([8])


def test_the_cache_never_grows_beyond_its_limit(served, tmp_path):
    _, data, url = served
    store = FeatureStore(url, cache=settings(tmp_path, 5 * SAMPLE + 3))
    assert np.array_equal(store.read(range(50)), data)
    assert len(cached(tmp_path)) == 5
    assert np.array_equal(store.read(range(50)), data)


def test_samples_of_stores_that_nobody_has_open_make_room(served, tmp_path):
    folder, _, url = served
    limit = settings(tmp_path, 30 * SAMPLE)
    first = FeatureStore(url, cache=limit)
    first.read(range(20))
    second_data = fill(folder.parent / "other@56", seed=1)
    second = FeatureStore(url.replace("late", "other"), cache=limit)
    second.read(range(20))
    assert len(cached(tmp_path)) == 30  # the first is open: it keeps its twenty
    first._cache.close()
    assert np.array_equal(second.read(range(50)), second_data)
    assert len(cached(tmp_path)) == 30 and len(list((tmp_path / "cache").glob("*/in-use"))) == 1


def test_a_damaged_sample_is_fetched_anew(served, tmp_path):
    _, data, url = served
    store = FeatureStore(url, cache=settings(tmp_path))
    store.read([7, 8])
    (path,) = (tmp_path / "cache").glob("*/7")
    raw = bytearray(path.read_bytes())
    raw[100] ^= 2
    path.write_bytes(bytes(raw))
    (tmp_path / "cache" / path.parent.name / "8").write_bytes(b"short")
    assert np.array_equal(store.read([7, 8]), data[[7, 8]])
    assert path.read_bytes() != bytes(raw) and path.with_name("8").stat().st_size == SAMPLE


def test_a_store_that_was_made_anew_brings_back_no_old_sample(served, tmp_path):
    folder, _, url = served
    FeatureStore(url, cache=settings(tmp_path)).read([7])
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    data = fill(folder, seed=2)
    assert np.array_equal(FeatureStore(url, cache=settings(tmp_path)).read([7]), data[[7]])


def test_warming_takes_whole_shards_at_once(served, tmp_path):
    _, _, url = served
    store = FeatureStore(url, cache=settings(tmp_path))
    store.read([3])
    assert [store.warm(0), store.warm(1), store.warm(1)] == [31, 18, 0]
    assert cached(tmp_path) == list(range(50))


def test_several_processes_share_one_cache_within_its_limit(served, tmp_path):
    _, data, url = served
    code = (
        "import sys, numpy as np; from feature_store import CacheSettings, FeatureStore\n"
        "url, folder, seed = sys.argv[1:]\n"
        f"store = FeatureStore(url, cache=CacheSettings(folder, 30 * {SAMPLE}))\n"
        "order = np.random.default_rng(int(seed)).integers(0, 50, 400)\n"
        "print(float(sum(np.abs(store.read(order[i : i + 8]).astype(float)).sum() for i in range(0, 400, 8))))"
    )
    folder = tmp_path / "cache"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, url, str(folder), str(seed)], stdout=subprocess.PIPE)
        for seed in range(4)
    ]
    for seed, process in enumerate(processes):
        order = np.random.default_rng(seed).integers(0, 50, 400)
        assert float(process.communicate()[0]) == pytest.approx(np.abs(data[order].astype(float)).sum())
    assert 0 < len(cached(tmp_path)) <= 30


def test_a_killed_process_leaves_a_cache_that_works(served, tmp_path):
    _, data, url = served
    limit = settings(tmp_path, 20 * SAMPLE)
    FeatureStore(url, cache=limit).read(range(10))
    (root,) = (Path(limit.folder)).glob("*/")
    (root / "11.abc.partial").write_bytes(bytes(SAMPLE))  # what a kill leaves behind
    (Path(limit.folder) / "bytes.fsdino").write_bytes(b"\xff" * 8)  # and a count that means nothing
    store = FeatureStore(url, cache=limit)
    assert np.array_equal(store.read(range(50)), data)
    assert len(cached(tmp_path)) >= 19


def test_a_full_disk_makes_the_cache_idle_and_nothing_else(served, tmp_path, monkeypatch):
    _, data, url = served
    store = FeatureStore(url, cache=settings(tmp_path))
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert np.array_equal(store.read([1, 2]), data[[1, 2]])
    assert cached(tmp_path) == [] and not list((tmp_path / "cache").rglob("*.partial"))
    assert int.from_bytes((tmp_path / "cache" / "bytes.fsdino").read_bytes(), "little") == 0


def test_a_local_store_needs_no_cache(tmp_path):
    fill(tmp_path / "late@56")
    store = FeatureStore(str(tmp_path / "late@56"), cache=settings(tmp_path))
    store.read([0])
    assert not (tmp_path / "cache").exists()
    with pytest.raises(StoreError, match="expected a remote store opened with a cache"):
        store.warm(0)


def test_two_readers_of_one_process_count_as_one_use(tmp_path):
    limit = settings(tmp_path)
    one, two = (SampleCache(limit, "s3://b/x", b"seal") for _ in range(2))
    one.close()
    assert not _removable(limit, two)
    two.close()
    assert _removable(limit, two)


def _removable(limit, cache):
    from feature_store.cache import _unused

    return _unused(cache.folder)


def test_nothing_but_the_caches_own_is_touched(served, tmp_path):
    _, data, url = served
    thesis = tmp_path / "cache" / "thesis"
    thesis.mkdir(parents=True)
    (thesis / "chapter").write_bytes(bytes(10**6))
    store = FeatureStore(url, cache=settings(tmp_path, 5 * SAMPLE))
    assert np.array_equal(store.read(range(50)), data)
    assert (thesis / "chapter").exists() and len(cached(tmp_path)) == 5


def test_a_place_that_cannot_hold_a_cache_is_said_at_once(served):
    with pytest.raises(StoreError, match="/proc/cache: cannot hold a cache"):
        FeatureStore(served[2], cache=CacheSettings("/proc/cache", 10**9))
