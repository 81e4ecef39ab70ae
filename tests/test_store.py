"""One suite over a local folder, fsspec's memory and a real S3 server process."""

import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import uuid

import fsspec
import numpy as np
import pytest
import zarr

from feature_store import FeatureStore, Fingerprint, Row, ShardWriter, StoreError, create
from feature_store.layout import ROWS_PER_SHARD, num_shards, shard_key, shard_rows

FINGERPRINT = Fingerprint(
    feature="late", model="m", weights="w1", layers="l", res_px=56, grid=4, channels=8, view_seed=0, preprocessing="p"
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


@pytest.fixture(scope="module")
def s3_endpoint():
    """moto's server, a process of its own on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    saved = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    fsspec.filesystem("s3").mkdir("features")
    yield
    server.terminate()
    server.wait()
    os.environ.clear()
    os.environ.update(saved)


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
    with pytest.raises(StoreError, match="not sealed; run its extraction again"):
        FeatureStore(url)


def test_sealing_names_the_missing_shards(url):
    writer = create(url, FINGERPRINT, ROWS)
    with pytest.raises(StoreError, match=r"2 of 2 shards missing \(first: 0\)"):
        writer.seal()


def test_a_store_of_another_making_is_refused_with_both_sides(url):
    fill(url, features())
    with pytest.raises(StoreError, match="weights: expected w2, got w1"):
        FeatureStore(url, expect={"weights": "w2"})
    other = Fingerprint(**{**FINGERPRINT.record()["fingerprint"], "weights": "w2"})
    with pytest.raises(StoreError, match=r"in the way \(weights: expected w2, got w1\)"):
        create(url, other, ROWS)


def test_rows_of_other_images_are_refused(url):
    create(url, FINGERPRINT, ROWS)
    with pytest.raises(StoreError, match=r"other images is in the way \(expected 49 rows, got 50"):
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


@pytest.mark.parametrize("num_rows", [1, 31, 32, 33, 64, 1000])
def test_shards_hold_every_row_once(num_rows):
    rows = [row for shard in range(num_shards(num_rows)) for row in shard_rows(shard, num_rows)]
    assert rows == list(range(num_rows))


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
