"""`python -m feature_store` on real stores, by the real command."""

import json
import subprocess
import sys

import numpy as np
import pytest

from feature_store import Fingerprint, Row, create
from feature_store.layout import shard_key, shard_rows

ROWS = [Row(f"image{i}", 0, f"image{i}.jpg") for i in range(40)]


@pytest.fixture
def store(tmp_path):
    """40 samples of 2 channels; the second never varies."""
    url = tmp_path / "stores" / "set" / "late@28"
    fingerprint = Fingerprint("late", "m", "w", "l", 28, 2, 2, view_seed=0, preprocessing="p")
    writer = create(str(url), fingerprint, ROWS)
    data = np.full((40, 2, 2, 2), 3, np.float16)
    data[..., 0] = np.arange(40)[:, None, None]
    for shard in writer.missing():
        rows = shard_rows(shard, 40)
        writer.write(shard, data[rows.start : rows.stop], [(5, 5)] * len(rows))
    writer.seal()
    return url


def tool(*arguments):
    line = [sys.executable, "-m", "feature_store", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    return done, json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def test_ls_lists_sealed_and_unfinished_stores(store, tmp_path):
    fingerprint = Fingerprint("early", "m2", "w", "l", 28, 2, 2, view_seed=0, preprocessing="p")
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
