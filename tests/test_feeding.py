"""Tiers of memory in front of a store: the same features whatever they keep, each read once where it fits."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from feature_store import FeatureStore, Fingerprint, Row, create
from pipelines.feeding import Feed, Kept, feeds, unpacked

CPU, GRID, CHANNELS, ROWS = torch.device("cpu"), 3, 70, 40


def stored(folder, dtype, channels=CHANNELS):
    fingerprint = Fingerprint(
        "late",
        "m",
        "w",
        "l",
        "none",
        res_px=42,
        grid=GRID,
        channels=channels,
        view_seed=0,
        preprocessing="p",
        dtype=dtype,
    )
    writer = create(str(folder / dtype), fingerprint, [Row(str(i), 0, "-") for i in range(ROWS)])
    features = np.random.default_rng(0).normal(size=(ROWS, GRID, GRID, channels)).astype(np.float32)
    for shard in writer.missing():
        part = features[shard * 32 : (shard + 1) * 32]
        writer.write(shard, part, [(42, 42)] * len(part))
    writer.seal()
    return FeatureStore(str(folder / dtype))


@pytest.fixture(scope="module", params=["float16", "float32", "int8"])
def store(request, tmp_path_factory):
    return stored(tmp_path_factory.mktemp("stores"), request.param)


class Counting:
    """A read that says what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, keys):
        self.asked += keys
        return torch.tensor([[key, key * 10] for key in keys])


@pytest.mark.parametrize("room", [0, 1, 3, 100])
def test_kept_tensors_are_those_that_were_read_in_any_order_and_with_repeats(room):
    read = Counting()
    kept = Kept(room * 16)
    generator = np.random.default_rng(room)
    for _ in range(30):
        keys = generator.integers(0, 6, 5).tolist()
        assert torch.equal(kept.get(keys, read), torch.tensor([[key, key * 10] for key in keys]))
    once = [key for key in range(6) if read.asked.count(key) == 1]
    assert len(once) == min(room, 6)


def test_what_is_returned_may_be_written_in_without_changing_what_is_kept():
    kept, read = Kept(1000), Counting()
    for _ in range(2):
        kept.get([1, 2], read).zero_()
    assert kept.get([2], read).tolist() == [[2, 20]] and read.asked == [1, 2]


def test_threads_that_ask_at_once_get_the_same_as_one():
    kept, barrier = Kept(1600), threading.Barrier(4)

    def read(keys):
        return torch.tensor([[key, key * 10] for key in keys])

    def ask(seed):
        generator = np.random.default_rng(seed)
        barrier.wait()
        for _ in range(300):
            keys = generator.integers(0, 150, 8).tolist()
            assert kept.get(keys, read).tolist() == [[key, key * 10] for key in keys]

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(ask, seed) for seed in range(4)]:
            done.result()


def test_packed_features_unpack_to_what_the_store_reads(tmp_path):
    store = stored(tmp_path, "int8")
    packed = torch.from_numpy(store.read(range(ROWS), packed=True))
    assert packed.shape == (ROWS, GRID, GRID, CHANNELS + 4) and packed.dtype == torch.int8
    assert np.array_equal(unpacked(packed, CHANNELS).half().numpy(), store.read(range(ROWS)))


@pytest.mark.parametrize("memory, device", [(0, 0), (2000, 0), (0, 2000), (3000, 2000), (10**6, 10**6)])
def test_a_feed_brings_the_stores_features_whatever_its_tiers_hold(store, memory, device):
    feed = Feed(store, CPU, memory, device)
    generator = np.random.default_rng(1)
    for _ in range(6):
        rows = generator.integers(0, ROWS, 9).tolist()
        found = feed.rows([str(row) for row in rows], [0] * 9)
        found = found.movedim(1, -1).numpy()
        assert np.array_equal(found.astype(store.dtype), store.read(rows))


def test_stores_that_just_fit_are_read_once_as_the_memory_is_shared_by_size(tmp_path, monkeypatch):
    two = [stored(tmp_path / str(channels), "float16", channels) for channels in (8, 64)]
    every = [str(row) for row in range(ROWS)]
    for gb in (ROWS * (8 + 64) * GRID * GRID * 2 / 1e9, 1000):  # no more is reserved than they hold
        for feed, store in zip(feeds(two, CPU, memory_gb=gb), two, strict=True):
            before = feed.rows(every, [0] * ROWS)
            with monkeypatch.context() as patched:
                patched.setattr(store, "read", None)
                assert torch.equal(feed.rows(every, [0] * ROWS), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("memory, device", [(0, 0), (3000, 2000), (10**6, 0), (0, 10**6)])
def test_on_a_gpu_threads_get_the_stores_features_whatever_its_tiers_hold(store, memory, device):
    feed = Feed(store, torch.device("cuda"), memory, device)

    def differences(seed):
        rows = np.random.default_rng(seed).integers(0, ROWS, 9).tolist()
        found = feed.rows([str(row) for row in rows], [0] * 9)
        assert found.device.type == "cuda"
        return np.abs(found.movedim(1, -1).cpu().numpy().astype(store.dtype) - store.read(rows)).max()

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(differences, range(40))) == 0
