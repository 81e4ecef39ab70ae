"""One suite over a local folder, fsspec's memory and a real S3 server process."""

import json
import multiprocessing
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import tensorstore
import zarr

from feature_store import FeatureStore, Fingerprint, Row, ShardWriter, StoreError, create
from feature_store.layout import ROWS_PER_SHARD, shard_key, shard_rows
from feature_store.lock import locked
from feature_store.storage import open_folder
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
ROWS = [Row(f"image {i}", view, f"/photos/image {i}.jpg") for i in range(25) for view in range(2)]
SIZES = [(500, 375)] * ROWS_PER_SHARD


def features():
    return np.random.default_rng(0).standard_normal((len(ROWS), 4, 4, 8)).astype(np.float16)


def fill(url, data, seal=True):
    writer = create(url, FINGERPRINT, ROWS)
    for shard in writer.missing():
        rows = shard_rows(shard, len(ROWS))
        writer.write(shard, data[rows.start : rows.stop], SIZES[: len(rows)])
    if seal:
        writer.seal()
    return writer


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "late@56")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/late@56"
    request.getfixturevalue("s3_endpoint")
    return f"s3://features/{uuid.uuid4().hex}/late@56"


def test_samples_come_back_as_they_were_written_in_any_order(url):
    data = features()
    fill(url, data)
    store = FeatureStore(url, expect={"feature": "late"})
    wanted = [49, 0, 31, 32, 0, 7]
    assert np.array_equal(store.read(wanted), data[wanted])
    assert store.row_numbers(["image 3", "image 3"], [0, 1]) == [6, 7]


def test_only_shards_without_a_marker_are_missing(url):
    writer = create(url, FINGERPRINT, ROWS)
    assert writer.missing() == [0, 1]
    writer.write(1, features()[32:], SIZES[:18])
    assert create(url, FINGERPRINT, ROWS).missing() == [0]


def test_an_unsealed_store_is_not_readable(url):
    fill(url, features(), seal=False)
    with pytest.raises(StoreError, match="not sealed; rerun its extraction"):
        FeatureStore(url)


def test_sealing_names_the_missing_shards(url):
    writer = create(url, FINGERPRINT, ROWS)
    with pytest.raises(StoreError, match=r"2 of 2 shards missing \(first: 0\)"):
        writer.seal()


def test_a_store_of_another_fingerprint_is_refused_with_both_sides(url):
    fill(url, features())
    with pytest.raises(StoreError, match="weights: expected w2, got w1"):
        FeatureStore(url, expect={"weights": "w2"})
    other = Fingerprint(**{**FINGERPRINT.record()["fingerprint"], "weights": "w2"})
    with pytest.raises(StoreError, match=r"another fingerprint \(weights: expected w2, got w1\)"):
        create(url, other, ROWS)


def test_rows_of_other_images_are_refused(url):
    create(url, FINGERPRINT, ROWS)
    with pytest.raises(StoreError, match=r"holds a store of other images \(expected 49 rows, got 50"):
        create(url, FINGERPRINT, ROWS[1:])


def test_an_absent_store_says_so(url):
    with pytest.raises(StoreError, match="found none; extract it first"):
        FeatureStore(url)


def test_an_unknown_sample_names_itself(url):
    fill(url, features())
    with pytest.raises(StoreError, match="no sample 'image 3' view 2 among 50"):
        FeatureStore(url).row_numbers(["image 3"], [2])


def test_a_flipped_bit_is_found_by_the_read_of_that_sample(url):
    data = features()
    fill(url, data)
    fs, root = fsspec.url_to_fs(url)
    raw = bytearray(fs.cat_file(f"{root}/{shard_key(0)}"))
    raw[5 * (data[0].nbytes + 4) + 17] ^= 4
    fs.pipe_file(f"{root}/{shard_key(0)}", bytes(raw))
    store = FeatureStore(url)
    assert np.array_equal(store.read([4, 6]), data[[4, 6]])
    with pytest.raises(StoreError, match=r"shard 0, sample 5 \(image 2\): its checksum is wrong"):
        store.read([5])


def test_a_truncated_shard_is_found(url):
    fill(url, features())
    fs, root = fsspec.url_to_fs(url)
    raw = fs.cat_file(f"{root}/{shard_key(1)}")
    fs.pipe_file(f"{root}/{shard_key(1)}", raw[: len(raw) // 2])
    with pytest.raises(StoreError, match="shard 1 has a damaged index"):
        FeatureStore(url).read([40])


def test_plain_zarr_reads_the_same_numbers(tmp_path):
    data = features()
    fill(str(tmp_path), data)
    assert np.array_equal(zarr.open_array(str(tmp_path), mode="r")[:], data)


def test_writing_a_shard_again_gives_the_same_bytes(tmp_path):
    data = features()
    writer = fill(str(tmp_path), data)
    before = (tmp_path / shard_key(0)).read_bytes()
    writer.write(0, data[:32], SIZES)
    assert (tmp_path / shard_key(0)).read_bytes() == before


def test_a_feature_that_overflows_its_dtype_is_refused_with_its_image(tmp_path):
    writer = create(str(tmp_path), FINGERPRINT, ROWS)
    data = features().astype(np.float32)
    data[3, 0, 0, 0] = 1e6
    with pytest.raises(StoreError, match=r"image 1\.jpg are not finite in float16"):
        writer.write(0, data[:32], SIZES)
    assert writer.missing() == [0, 1]


def test_an_opened_store_travels_to_another_process(tmp_path):
    data = features()
    fill(str(tmp_path), data)
    store = pickle.loads(pickle.dumps(FeatureStore(str(tmp_path), {"feature": "late"})))
    assert np.array_equal(store.read([9]), data[[9]])


def test_a_shard_lost_after_sealing_is_named(tmp_path):
    fill(str(tmp_path), features())
    shutil.rmtree(tmp_path / "c" / "1")
    with pytest.raises(StoreError, match="shard 1 is missing"):
        FeatureStore(str(tmp_path)).read([40])


def test_a_writer_opens_from_the_url_alone(tmp_path):
    create(str(tmp_path), FINGERPRINT, ROWS)
    writer = ShardWriter(str(tmp_path))
    assert writer.rows == ROWS and writer.fingerprint == FINGERPRINT


def test_the_store_opens_without_torch(tmp_path):
    fill(str(tmp_path), features())
    code = (
        f"import sys; from feature_store import FeatureStore; FeatureStore({str(tmp_path)!r}).read([0]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_local_path_may_hold_any_character(tmp_path):
    data = features()
    fill(str(tmp_path / "run#1?x"), data)
    assert np.array_equal(FeatureStore(str(tmp_path / "run#1?x")).read([3]), data[[3]])


def test_a_moved_data_set_is_the_same_data_set(tmp_path):
    create(str(tmp_path), FINGERPRINT, ROWS)
    assert create(str(tmp_path), FINGERPRINT, [row._replace(source="/elsewhere") for row in ROWS]).missing() == [0, 1]


def test_duplicates_come_back_at_every_place(url):
    data = features()
    fill(url, data)
    wanted = [3, 3, 40, 3, 40]
    assert np.array_equal(FeatureStore(url).read(wanted), data[wanted])


def test_neighbours_are_one_request_and_duplicates_none_more(s3_endpoint, monkeypatch):
    place = f"s3://features/{uuid.uuid4().hex}/late@56"
    data = features()
    fill(place, data)
    store = FeatureStore(place)
    store.read([0, 40])  # both shards' indexes
    spans = []

    read = store.folder.span

    def spied(key, start, length):
        spans.append((key, start, length))
        return read(key, start, length)

    monkeypatch.setattr(store.folder, "span", spied)
    wanted = [4, 5, 6, 5, 9, 33, 32]
    assert np.array_equal(store.read(wanted), data[wanted])
    chunk = data[0].nbytes + 4
    expected = [(shard_key(0), 4 * chunk, 3 * chunk), (shard_key(0), 9 * chunk, chunk), (shard_key(1), 0, 2 * chunk)]
    assert sorted(spans) == expected


def test_a_buffer_of_the_callers_is_filled_and_returned(url):
    data = features()
    fill(url, data)
    for dtype in (np.float16, np.float32):
        out = np.full((3, 4, 4, 8), -1, dtype)
        assert FeatureStore(url).read([8, 40, 2], out=out) is out
        assert np.array_equal(out, data[[8, 40, 2]].astype(dtype))


@pytest.mark.parametrize("out", [np.empty((2, 4, 4, 8)), np.empty((3, 4, 8, 4)).swapaxes(2, 3), np.empty((3, 4, 4, 9))])
def test_a_buffer_that_does_not_fit_is_refused(tmp_path, out):
    fill(str(tmp_path), features())
    with pytest.raises(StoreError, match=r"expected a writable C-contiguous buffer of shape \(3, 4, 4, 8\)"):
        FeatureStore(str(tmp_path)).read([0, 1, 2], out=out)


def test_features_come_in_the_dtype_that_is_asked_for(url):
    data = features()
    fill(url, data)
    got = FeatureStore(url).rows(["image 2", "image 0"], [1, 0], dtype=np.float32)
    assert got.dtype == np.float32 and np.array_equal(got, data[[5, 0]].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_zarr_and_tensorstore_read_the_same_numbers(tmp_path, dtype):
    data = features()
    writer = create(str(tmp_path), replace(FINGERPRINT, dtype=dtype), ROWS)
    for shard in writer.missing():
        rows = shard_rows(shard, len(ROWS))
        writer.write(shard, data[rows.start : rows.stop], SIZES[: len(rows)])
    writer.seal()
    ours = FeatureStore(str(tmp_path)).read(range(50), dtype=np.float32)
    theirs = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path)}}).result()
    for stored in (zarr.open_array(str(tmp_path), mode="r")[:], theirs[:].read().result()):
        if dtype == "int8":
            assert stored.shape == (50, 4, 4, 8 + 2)
            scales = np.ascontiguousarray(stored[..., 8:]).view(np.float16).astype(np.float32)
            assert np.array_equal(stored[..., :8] * scales, ours)
        else:
            assert np.array_equal(stored.astype(np.float32), ours)


def test_int8_takes_half_the_bytes_and_stays_close(url):
    data = np.random.default_rng(1).standard_normal((len(ROWS), 4, 4, 128)).astype(np.float16)
    writer = create(url, replace(FINGERPRINT, dtype="int8", channels=128), ROWS)
    for shard in writer.missing():
        rows = shard_rows(shard, len(ROWS))
        writer.write(shard, data[rows.start : rows.stop], SIZES[: len(rows)])
    writer.seal()
    store = FeatureStore(url)
    got = store.read(range(50))
    assert store.sample_bytes == 4 * 4 * (128 + 4) and got.dtype == np.float16
    assert np.linalg.norm(got.astype(float) - data) / np.linalg.norm(data.astype(float)) < 0.01


def test_a_view_is_the_files_own_memory_and_is_checked(tmp_path):
    data = features()
    fill(str(tmp_path), data)
    store = FeatureStore(str(tmp_path))
    view = store.view(37)
    assert np.array_equal(view, data[37]) and not view.flags.writeable and not view.flags.owndata
    path = tmp_path / shard_key(1)
    raw = bytearray(path.read_bytes())
    raw[6 * (data[0].nbytes + 4)] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(StoreError, match=r"shard 1, sample 6 \(image 19\): its checksum is wrong"):
        FeatureStore(str(tmp_path)).view(38)


def test_checks_can_be_turned_off(tmp_path):
    data = features()
    fill(str(tmp_path), data)
    path = tmp_path / shard_key(0)
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(bytes(raw))
    got = FeatureStore(str(tmp_path), verify=False).read([0])
    assert (got != data[[0]]).sum() == 1


def in_a_fork(work):
    """What `work` returns in a forked child, or its error's text; within 20 seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except BaseException as error:
            answer = str(error)
        os.write(write, pickle.dumps(answer))
        os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], 20)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ready, "the forked process hangs"
    with os.fdopen(read, "rb") as pipe:
        return pickle.loads(pipe.read())


def test_a_local_store_goes_on_in_a_forked_process(tmp_path):
    data = features()
    fill(str(tmp_path), data)
    store = FeatureStore(str(tmp_path))
    store.read(range(50))
    assert np.array_equal(in_a_fork(lambda: store.read([3, 40, 7])), data[[3, 40, 7]])


def test_a_remote_store_says_in_a_forked_process_that_it_must_be_spawned(s3_endpoint):
    place = f"s3://features/{uuid.uuid4().hex}/late@56"
    fill(place, features())
    store = FeatureStore(place)
    assert "start workers by spawn" in in_a_fork(lambda: store.read([3]))
    assert "start workers by spawn" in in_a_fork(lambda: FeatureStore(place))


def test_a_remote_store_reads_in_a_spawned_process(s3_endpoint):
    place = f"s3://features/{uuid.uuid4().hex}/late@56"
    data = features()
    fill(place, data)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(FeatureStore(place).read, ([3, 40],)), data[[3, 40]])


def test_a_store_is_read_from_a_web_server(tmp_path):
    data = features()
    fill(str(tmp_path / "late@56"), data)
    with range_server(tmp_path) as address:
        store = FeatureStore(f"{address}/late@56")
        assert np.array_equal(store.read([49, 0, 33]), data[[49, 0, 33]])
        with pytest.raises(StoreError, match="found none; extract it first"):
            FeatureStore(f"{address}/none")


def test_a_quarantined_sample_is_nan_in_the_array_and_refused_by_name(url):
    data = features()
    writer = create(url, FINGERPRINT, ROWS)
    writer.write(0, data[:32], SIZES, {4: "not an image"})
    writer.write(1, data[32:], SIZES[:18])
    assert writer.seal() == {4: "not an image"}
    store = FeatureStore(url)
    assert store.quarantined == {("image 2", 0): "not an image"}
    assert np.isnan(store.read([4])).all() and np.array_equal(store.read([5]), data[[5]])
    with pytest.raises(StoreError, match="'image 2' has no features: not an image"):
        store.rows(["image 2"], [0])


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(StoreError, match="expected a URL without credentials") as caught:
        FeatureStore("s3://AKIA123:verysecret@bucket/late@56")
    assert "verysecret" not in str(caught.value) and "AKIA123" not in str(caught.value)


def test_signed_sources_lose_their_signature_in_the_plan(tmp_path):
    rows = [Row("a", 0, "https://user:pw@example.org/a.jpg?X-Amz-Signature=secret"), Row("b", 0, "/photos/b?c#d.jpg")]
    assert [row.source for row in create(str(tmp_path), FINGERPRINT, rows).rows] == [
        "https://example.org/a.jpg",
        "/photos/b?c#d.jpg",
    ]


def test_the_second_job_on_a_store_is_told_of_the_first(url):
    writer = create(url, FINGERPRINT, ROWS)
    with locked(writer.folder):
        with pytest.raises(StoreError, match=rf"the job of process {os.getpid()} on .* is working there"):
            with locked(ShardWriter(url).folder):
                pass
    with locked(writer.folder):
        pass


def test_the_lock_of_a_killed_job_is_taken_over_at_once(tmp_path):
    create(str(tmp_path), FINGERPRINT, ROWS)
    code = (
        "import os, signal; from feature_store.storage import open_folder; from feature_store.lock import locked\n"
        f"with locked(open_folder({str(tmp_path)!r})): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code])
    assert (tmp_path / "lock.json").exists()
    with locked(open_folder(str(tmp_path))) as lock:
        lock.check()
    assert not (tmp_path / "lock.json").exists()


def test_a_job_that_lost_its_lock_is_told_so(tmp_path):
    create(str(tmp_path), FINGERPRINT, ROWS)
    folder = open_folder(str(tmp_path))
    with locked(folder) as lock:
        folder.write("lock.json", [b'{"owner": "x", "host": "elsewhere", "pid": 7, "started": "1", "beat": 0}'])
        lock.beat()
        with pytest.raises(StoreError, match="the job of process 7 on elsewhere took over this folder"):
            lock.check()
    assert (tmp_path / "lock.json").exists()  # the other's


def test_a_silent_job_elsewhere_counts_as_gone_after_a_minute(tmp_path):
    create(str(tmp_path), FINGERPRINT, ROWS)
    folder = open_folder(str(tmp_path))
    holder = {"owner": "x", "host": "elsewhere", "pid": 7, "started": "1", "beat": time.time() - 30}
    folder.write("lock.json", [json.dumps(holder).encode()])
    with pytest.raises(StoreError, match="process 7 on elsewhere is working there"):
        with locked(folder):
            pass
    folder.write("lock.json", [json.dumps(holder | {"beat": time.time() - 61}).encode()])
    with locked(folder):
        pass


def test_markers_of_another_build_do_not_count(tmp_path):
    """As when the array's description was lost and the store is made anew with other weights."""
    fill(str(tmp_path), features(), seal=False)
    (tmp_path / "zarr.json").unlink()
    assert create(str(tmp_path), replace(FINGERPRINT, weights="w2"), ROWS).missing() == [0, 1]
    (tmp_path / "zarr.json").unlink()
    assert create(str(tmp_path), FINGERPRINT, ROWS).missing() == []


def test_a_marker_in_the_place_of_another_shards_counts_as_damaged(tmp_path):
    data = np.concatenate([features()[:32], features()[:32]])
    rows = [Row(f"image {i}", 0, "-") for i in range(64)]
    writer = create(str(tmp_path), FINGERPRINT, rows)
    for shard in range(2):
        writer.write(shard, data[32 * shard : 32 * shard + 32], [(1, 1)] * 32)
    first, second = sorted((tmp_path / "markers").iterdir())
    second.write_bytes(first.read_bytes())
    assert writer.markers([0, 1])[0] is not None and writer.markers([0, 1])[1] is None


def test_a_store_of_an_older_format_is_refused_and_the_command_named(tmp_path):
    create(str(tmp_path), FINGERPRINT, ROWS)
    record = json.loads((tmp_path / "zarr.json").read_text())
    record["attributes"]["fingerprint"]["format_version"] = 2
    (tmp_path / "zarr.json").write_text(json.dumps(record))
    with pytest.raises(
        StoreError, match=r"format 3, got 2; run `python -m pipelines\.extract_features` to write a new one"
    ):
        FeatureStore(str(tmp_path))
