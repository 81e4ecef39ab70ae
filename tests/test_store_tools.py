"""`python -m feature_store` on real stores, by the real command."""

import json
import os
import subprocess
import sys
import time
import uuid
from dataclasses import replace

import fsspec
import numpy as np
import pytest

from feature_store import FeatureStore, Fingerprint, Row, StoreError, create, tools
from feature_store.layout import shard_key, shard_rows
from feature_store.lock import locked
from tests.servers import range_server

FINGERPRINT = Fingerprint("late", "m", "w", "l", "none", 28, 2, 2, view_seed=0, preprocessing="p")
ROWS = [Row(f"image{i}", 0, f"image{i}.jpg") for i in range(40)]
DATA = np.full((40, 2, 2, 2), 3, np.float16)
DATA[..., 0] = np.arange(40)[:, None, None]


@pytest.fixture
def store(tmp_path):
    """40 samples of 2 channels; the second never varies."""
    url = tmp_path / "stores" / "set" / "late@28"
    writer = create(str(url), FINGERPRINT, ROWS)
    for shard in writer.missing():
        rows = shard_rows(shard, 40)
        writer.write(shard, DATA[rows.start : rows.stop], [(5, 5)] * len(rows))
    writer.seal()
    return url


def tool(*arguments):
    line = [sys.executable, "-m", "feature_store", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    return done, json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def test_ls_lists_sealed_and_unfinished_stores(store, tmp_path):
    fingerprint = Fingerprint("early", "m2", "w", "l", "none", 28, 2, 2, view_seed=0, preprocessing="p")
    create(str(tmp_path / "stores" / "set" / "early@28"), fingerprint, ROWS)
    done, result = tool("ls", tmp_path / "stores")
    assert done.returncode == 0
    listed = {
        entry["url"].rsplit("/", 1)[1]: (entry["model"], entry["done"], entry["sealed"]) for entry in result["stores"]
    }
    assert listed == {"early@28": ("m2", 0, False), "late@28": ("m", 2, True)}


def test_stats_are_those_of_the_values(store):
    _, result = tool("stats", store)
    values = np.stack([np.arange(40), np.full(40, 3)])
    assert (result["samples"], result["bytes"], result["nan"]) == (40, 640, 0)
    assert (result["min"], result["max"], result["dead_channels"]) == (0, 39, [1])
    assert result["mean"] == pytest.approx(values.mean()) and result["std"] == pytest.approx(values.std())


def test_verify_finds_nothing_in_a_whole_store(store):
    done, result = tool("verify", store)
    assert done.returncode == 0 and result["damaged"] == 0


def test_verify_exits_with_1_and_names_what_is_damaged(store):
    path = store / shard_key(0)
    raw = bytearray(path.read_bytes())
    raw[7 * (16 + 4)] ^= 1
    path.write_bytes(bytes(raw))
    (store / shard_key(1)).unlink()
    done, result = tool("verify", store)
    assert done.returncode == 1 and result["shards_damaged"] == [0, 1]
    assert "shard 0, sample 7 (image7): its checksum is wrong" in done.stdout


def test_a_missing_store_exits_with_2(tmp_path):
    done, _ = tool("verify", tmp_path / "none")
    assert done.returncode == 2 and "expected a feature store, found none" in done.stderr


def flip(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(raw))


def extraction(url, data):
    """What an extraction does to a store: only what is missing, then the seal."""
    writer = create(str(url), FINGERPRINT, ROWS)
    missing = writer.missing()
    if missing and writer.sealed():
        writer.unseal()
    for shard in missing:
        rows = shard_rows(shard, 40)
        writer.write(shard, data[rows.start : rows.stop], [(5, 5)] * len(rows))
    writer.seal()
    return missing


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_flipped_bit_anywhere_is_found_by_verify_and_by_a_read_and_is_healed(store):
    """200 places: half in proportion to the bytes, half spread over the files."""
    before, rng = snapshot(store), np.random.default_rng(0)
    names, sizes = list(before), np.array([len(raw) for raw in before.values()])
    for number in range(200):
        name = names[rng.choice(len(names), p=sizes / sizes.sum() if number % 2 else None)]
        flip(store / name, int(rng.integers(8 * len(before[name]))))
        _, found = tools.verify(str(store))
        assert found, f"verify does not see a flipped bit in {name}"
        if name.startswith("c/"):
            shard = int(name.split("/")[1])
            rows = shard_rows(shard, 40)
            with pytest.raises(StoreError, match="repair"):
                FeatureStore(str(store)).read(list(rows))
        elif name in ("zarr.json", "manifest.parquet", "seal.json"):
            with pytest.raises(StoreError, match="repair"):
                FeatureStore(str(store)).read([0])
        else:  # nothing that a reader looks at
            assert np.array_equal(FeatureStore(str(store)).read(range(40)), DATA)
        again = tools.repair(str(store))["shards_to_compute"]
        assert len(again) == (1 if name.startswith(("c/", "markers/")) else 0)
        assert extraction(store, DATA) == again
        assert snapshot(store) == before


def test_a_lost_file_is_found_and_healed(store):
    before = snapshot(store)
    for name in before:
        if name == "seal.json":
            continue  # without it the store is merely not sealed
        (store / name).unlink()
        _, found = tools.verify(str(store))
        assert found, f"verify does not miss {name}"
        tools.repair(str(store))
        extraction(store, DATA)
        assert snapshot(store) == before


def test_repair_of_a_whole_store_changes_nothing(store):
    before = snapshot(store)
    done, result = tool("repair", store)
    assert done.returncode == 0 and result["damaged"] == 0 and snapshot(store) == before


def test_repair_can_give_quarantined_images_another_chance(tmp_path):
    writer = create(str(tmp_path), FINGERPRINT, ROWS)
    writer.write(0, DATA[:32], [(5, 5)] * 32, {3: "not an image"})
    writer.write(1, DATA[32:], [(5, 5)] * 8)
    writer.seal()
    assert tool("repair", tmp_path)[1]["shards_to_compute"] == []
    assert tool("repair", tmp_path, "--quarantined")[1]["shards_to_compute"] == [0]
    assert extraction(tmp_path, DATA) == [0] and not FeatureStore(str(tmp_path)).quarantined


def test_a_copy_is_the_same_byte_for_byte_and_goes_on_after_a_stop(store, tmp_path):
    done, result = tool("copy", store, tmp_path / "copy")
    assert done.returncode == 0 and result["shards"] == 2
    assert snapshot(tmp_path / "copy") == snapshot(store)
    for name in ("seal.json", "manifest.parquet"):
        (tmp_path / "copy" / name).unlink()
    next((tmp_path / "copy" / "markers").glob("000001*")).unlink()
    assert tool("copy", store, tmp_path / "copy")[1]["shards"] == 1
    assert snapshot(tmp_path / "copy") == snapshot(store)


def test_a_copy_to_s3_and_back_is_the_same(store, tmp_path, s3_endpoint):
    remote = f"s3://features/{uuid.uuid4().hex}/late@28"
    tool("copy", store, remote)
    tool("copy", remote, tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(store)
    assert tool("ls", remote)[1]["stores"][0]["url"] == remote
    assert tool("verify", remote)[0].returncode == 0


def test_a_copy_follows_a_source_that_was_mended(store, tmp_path):
    tool("copy", store, tmp_path / "copy")
    tools.repair(str(store))
    for marker in (store / "markers").glob("000001*"):
        marker.unlink()
    (store / "seal.json").unlink()
    (store / "manifest.parquet").unlink()
    extraction(store, DATA + 1)
    assert tool("copy", store, tmp_path / "copy")[1]["shards"] == 1
    assert snapshot(tmp_path / "copy") == snapshot(store)


def test_two_damaged_small_files_are_both_named(store):
    (store / "seal.json").write_bytes(b"{}")
    (store / "zarr.json").write_bytes(b"{}")
    assert {damage.file for damage in tools.verify(str(store))[1]} == {"seal.json", "zarr.json"}
    tools.repair(str(store))
    extraction(store, DATA)
    assert tools.verify(str(store))[1] == []


def test_a_shard_of_another_store_in_the_place_of_ours_is_noticed(store, tmp_path):
    other = create(str(tmp_path / "other"), replace(FINGERPRINT, weights="w2"), ROWS)
    other.write(0, DATA[:32] + 1, [(5, 5)] * 32)
    (store / shard_key(0)).write_bytes((tmp_path / "other" / shard_key(0)).read_bytes())
    for read in (FeatureStore(str(store)).read, lambda rows: FeatureStore(str(store)).view(rows[0])):
        with pytest.raises(StoreError, match="shard 0, sample 0"):
            read([0])
    assert {damage.shard for damage in tools.verify(str(store))[1]} == {0}


def test_ls_goes_on_past_what_is_no_store(store, tmp_path):
    (tmp_path / "stores" / "a").mkdir()
    (tmp_path / "stores" / "a" / "zarr.json").write_text('{"zarr_format": 3}')
    done, result = tool("ls", tmp_path / "stores")
    assert done.returncode == 0 and len(result["stores"]) == 1 and "expected a feature store" in done.stdout


def test_a_damaged_source_is_not_copied(store, tmp_path):
    flip(store / shard_key(1), 99)
    done, _ = tool("copy", store, tmp_path / "copy")
    assert done.returncode == 2 and "shard 1, sample 0 (image32): its checksum is wrong" in done.stderr
    assert not (tmp_path / "copy" / "seal.json").exists()


def test_diff_tells_fingerprints_and_values_apart(store, tmp_path):
    assert tool("diff", store, store)[0].returncode == 0
    other = create(str(tmp_path / "other"), replace(FINGERPRINT, weights="w2"), ROWS[:39])
    for shard in (0, 1):
        rows = shard_rows(shard, 39)
        other.write(shard, DATA[rows.start : rows.stop] + (0.5 if shard else 0), [(5, 5)] * len(rows))
    other.seal()
    done, result = tool("diff", store, tmp_path / "other")
    assert done.returncode == 1
    assert result["fingerprint"] == ["weights: expected w2, got w"] and result["max_difference"] == 0.5
    assert (result["common"], result["only_first"], result["only_second"]) == (39, 1, 0)


def test_gc_lists_what_killed_jobs_left_and_deletes_only_when_told(store, tmp_path):
    before = snapshot(store)
    half = tmp_path / "stores" / "half"
    writer = create(str(half), FINGERPRINT, ROWS)
    writer.write(0, DATA[:32], [(5, 5)] * 32)
    (half / "c/1/0/0").mkdir(parents=True)
    left = [half / shard_key(1), half / "markers/000001.00000000.json", store / f"c/0/0/0/0.{'a' * 32}.partial"]
    foreign = [tmp_path / "stores" / f"x.{'b' * 32}.partial", store / "film.mkv.partial"]
    for path in left + foreign:
        path.write_bytes(b"123")
        if path != left[2]:
            os.utime(path, (0, 0))
    (half / "lock.json").write_bytes(b"123")  # of a job that was killed
    result = tool("gc", tmp_path / "stores")[1]
    assert sorted(result["files"]) == sorted(map(str, left[:2])) and not result["deleted"]  # the third is too young
    result = tool("gc", tmp_path / "stores", "--older-than-hours", 0)[1]
    assert sorted(result["files"]) == sorted(map(str, left)) and result["bytes"] == 9
    assert all(path.exists() for path in left)
    assert tool("gc", tmp_path / "stores", "--older-than-hours", 0, "--delete")[1]["deleted"]
    assert not any(path.exists() for path in left) and all(path.exists() for path in foreign)
    foreign[1].unlink()
    assert snapshot(store) == before and not (half / "lock.json").exists()
    assert writer.missing() == [1]


def test_gc_leaves_a_store_alone_on_which_a_job_works(tmp_path):
    writer = create(str(tmp_path / "late@28"), FINGERPRINT, ROWS)
    partial = tmp_path / "late@28" / f"c.{'a' * 32}.partial"
    partial.write_bytes(b"123")
    with locked(writer.folder):
        result = tools.garbage(str(tmp_path), delete=True, older_than_hours=0.0)
    assert result["files"] == [] and "is working there" in result["left_alone"][0]
    assert partial.exists()


def test_gc_aborts_old_multipart_uploads(s3_endpoint, monkeypatch):
    fs = fsspec.filesystem("s3")
    folder = uuid.uuid4().hex
    fs.call_s3("create_multipart_upload", Bucket="features", Key=f"{folder}/late@28/c/0/0/0/0")
    begun = fs.call_s3("list_multipart_uploads", Bucket="features", Prefix=folder)["Uploads"][0][
        "Initiated"
    ].timestamp()
    now = time.time()
    monkeypatch.setattr(tools.time, "time", lambda: begun + 3600)
    assert tools.garbage(f"s3://features/{folder}")["uploads"] == []  # it may be at work
    monkeypatch.setattr(tools.time, "time", lambda: now)
    found = [f"s3://features/{folder}/late@28/c/0/0/0/0"]
    assert tools.garbage(f"s3://features/{folder}")["uploads"] == found
    assert tools.garbage(f"s3://features/{folder}", delete=True)["uploads"] == found
    assert tools.garbage(f"s3://features/{folder}")["uploads"] == []


def test_warm_fills_the_cache_that_training_names(store, tmp_path):
    with range_server(store.parent) as address:
        done, result = tool("warm", f"{address}/late@28", "--cache", tmp_path / "cache", "--cache-gb", 1)
        assert done.returncode == 0 and result["taken"] == 40
        assert len([p for p in (tmp_path / "cache").glob("*/*") if p.name.isdigit()]) == 40


def test_stats_count_the_nan_of_quarantined_samples_and_leave_them_out(tmp_path):
    writer = create(str(tmp_path), replace(FINGERPRINT, dtype="float32"), ROWS)
    writer.write(0, DATA[:32], [(5, 5)] * 32, {3: "not an image"})
    writer.write(1, DATA[32:], [(5, 5)] * 8)
    writer.seal()
    result = tools.statistics(str(tmp_path))
    assert (result["nan"], result["quarantined"]) == (2 * 2 * 2, 1)
    assert result["max"] == 39 and result["mean"] == pytest.approx((np.delete(np.arange(40), 3).mean() + 3) / 2)


def test_help_tells_what_each_command_does():
    def help_of(*names):
        return subprocess.run([sys.executable, "-m", "feature_store", *names, "--help"], capture_output=True, text=True)

    for name in ("ls", "stats", "verify", "repair", "copy", "diff", "gc", "warm"):
        assert name in help_of().stdout
    assert "--quarantined" in help_of("repair").stdout
