"""Reads of the feature store against np.memmap, other formats and bare range requests; writes a Markdown table.

    python -m tests.benchmarks.bench_store --folder /scratch/bench --out docs/benchmarks/store.md

Every contender reads the same samples in the same round, in random order; a figure is the median over rounds of
the contender's speed over the baseline's in that round. Needs the extras `dev` and `bench`, and 6 GB.
"""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import safetensors.numpy
import tensorstore
import tyro
import urllib3
import webdataset
import zarr
from obstore.store import HTTPStore, S3Store

from feature_store import CacheSettings, FeatureStore, Fingerprint, Row, create
from feature_store.layout import CRC_BYTES, num_shards, shard_key, shard_rows
from tests.benchmarks.provenance import provenance
from tests.servers import aws, environment, range_server

GRID, CHANNELS = 37, 768
BATCH = 16


@dataclass(frozen=True)
class Settings:
    """Benchmark the store's reads."""

    folder: Path
    """Where the files go; on the disk that is to be measured."""
    samples: int = 512
    """Samples of 37 x 37 x 768 fp16, 2.1 MB each."""
    rounds: int = 15
    """Rounds of each comparison."""
    seed: int = 0
    """Seed of contents and order."""
    out: Path | None = None
    """Markdown file to write."""


Reads = dict[str, Callable[[Sequence[int]], Any]]


def main(settings: Settings) -> None:
    """Write the files if they are not there, compare, print the tables."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    write_files(settings)
    sections = [head(settings)]
    names = [name for name in local_readers(settings) if name != "webdataset"]
    for batch, repeats, title in ((1, 8, "Random single samples, cold"), (BATCH, 2, "Batches of 16, cold")):
        sections.append(table(title, *cold(settings, names, batch, repeats), "np.memmap"))
    local = local_readers(settings)
    without = {name: local[name] for name in names}
    data = np.load(settings.folder / "plain.npy", mmap_mode="r")
    for name, read in without.items():
        assert np.array_equal(np.asarray(read([3, 200]))[1], data[200]), f"{name} reads something else"
    sections.append(table("Random single samples, warm", *compare(settings, without, 1, 40), "np.memmap"))
    sections.append(table("Batches of 16 random samples, warm", *compare(settings, without, BATCH, 4), "np.memmap"))
    sections.append(table("All samples in order, warm", *sequential(settings, local), "reading the file"))
    for latency in (0, 20):
        for kind in ("http", "s3"):
            title = f"Batches of 16 over {kind.upper()}, {latency} ms of added latency"
            sections.append(table(title, *remote(settings, kind, latency), "bare range requests"))
    sections.append(
        table("A first batch of 16 through an empty cache, S3 with 20 ms", *cached(settings), "single samples")
    )
    text = "\n\n".join(sections) + "\n"
    print(text)
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(text)


def write_files(settings: Settings) -> None:
    """The same samples as .npy, as our store, as safetensors and as a tar."""
    npy, store, folder = settings.folder / "plain.npy", settings.folder / "bucket" / "store", settings.folder
    if not (store / "seal.json").exists():
        rng = np.random.default_rng(settings.seed)
        shape = (settings.samples, GRID, GRID, CHANNELS)
        array = np.lib.format.open_memmap(npy, "w+", np.float16, shape)
        for i in range(settings.samples):
            array[i] = rng.standard_normal(shape[1:], np.float32)
        array.flush()
        fingerprint = Fingerprint(
            "late", "bench", "w", "l", "none", 518, GRID, CHANNELS, view_seed=0, preprocessing="p"
        )
        writer = create(str(store), fingerprint, [Row(str(i), 0, "-") for i in range(settings.samples)])
        for shard in writer.missing():
            rows = shard_rows(shard, settings.samples)
            writer.write(shard, array[rows.start : rows.stop], [(518, 518)] * len(rows))
        writer.seal()
        safetensors.numpy.save_file({str(i): np.array(array[i]) for i in range(settings.samples)}, folder / "plain.st")
        with webdataset.TarWriter(str(folder / "plain.tar")) as tar:
            for i in range(settings.samples):
                tar.write({"__key__": f"{i:06d}", "bin": array[i].tobytes()})


def local_readers(settings: Settings) -> Reads:
    """Contenders on the local disk: row numbers in, a list or array of samples out."""
    place, shape = str(settings.folder / "bucket" / "store"), (GRID, GRID, CHANNELS)
    mapped = np.load(settings.folder / "plain.npy", mmap_mode="r")
    store, unchecked = FeatureStore(place), FeatureStore(place, verify=False)
    array = zarr.open_array(place, mode="r")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": place}}
    tensors = tensorstore.open(spec).result()
    safe = safetensors.safe_open(settings.folder / "plain.st", "np")
    out = np.empty((BATCH, *shape), np.float16)

    def from_tar(rows: Sequence[int]) -> list[np.ndarray]:
        reader = webdataset.WebDataset(str(settings.folder / "plain.tar"), shardshuffle=False)
        return [np.frombuffer(sample["bin"], np.float16).reshape(shape) for sample in reader]

    return {
        "np.memmap": lambda rows: np.stack([mapped[i] for i in rows]),
        "this store": lambda rows: store.read(rows),
        "this store, into the caller's buffer": lambda rows: store.read(rows, out=out[: len(rows)]),
        "this store, unchecked": lambda rows: unchecked.read(rows),
        "this store, mapped (`view`, checked)": lambda rows: [store.view(i) for i in rows],
        "safetensors": lambda rows: [safe.get_tensor(str(i)) for i in rows],
        "tensorstore": lambda rows: [f.result() for f in [tensors[i].read() for i in rows]],
        "zarr-python": lambda rows: [array[i] for i in rows],
        "webdataset": from_tar,
    }


def compare(settings: Settings, readers: Reads, batch: int, repeats: int) -> tuple[dict[str, list[float]], int]:
    """Seconds for each round and contender, and the bytes that one call moves."""
    rng = np.random.default_rng(settings.seed)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    names = list(readers)
    for _ in range(settings.rounds):
        wanted = [sorted(rng.choice(settings.samples, batch, replace=False).tolist()) for _ in range(repeats)]
        for name in rng.permutation(names).tolist():
            for rows in wanted:
                readers[name](rows)
            started = time.perf_counter()
            for rows in wanted:
                readers[name](rows)
            seconds[name].append((time.perf_counter() - started) / repeats)
    return seconds, batch * GRID * GRID * CHANNELS * 2


def cold(settings: Settings, names: Sequence[str], batch: int, repeats: int) -> tuple[dict[str, list[float]], int]:
    """As compare, but every turn reads files that were taken out of memory, through readers that were just opened.

    (Pages that any process has mapped stay in memory, so nothing else may have the files open.)
    """
    rng = np.random.default_rng(settings.seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(settings.rounds):
        wanted = [sorted(rng.choice(settings.samples, batch, replace=False).tolist()) for _ in range(repeats)]
        for name in names:
            uncache([p for p in settings.folder.rglob("*") if p.is_file()])
            read = local_readers(settings)[name]
            started = time.perf_counter()
            for rows in wanted:
                read(rows)
            seconds[name].append((time.perf_counter() - started) / repeats)
    return seconds, batch * GRID * GRID * CHANNELS * 2


def uncache(files: Sequence[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def sequential(settings: Settings, readers: Reads) -> tuple[dict[str, list[float]], int]:
    """All samples in order, 32 at a time."""
    buffer = memoryview(bytearray(32 * GRID * GRID * CHANNELS * 2))
    blocks = [list(shard_rows(shard, settings.samples)) for shard in range(num_shards(settings.samples))]

    def whole_file() -> None:
        with open(settings.folder / "plain.npy", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def all_of(read: Callable[[Sequence[int]], Any]) -> Callable[[], None]:
        return lambda: [read(rows) for rows in blocks] and None

    store = FeatureStore(str(settings.folder / "bucket" / "store"))
    out = np.empty((32, GRID, GRID, CHANNELS), np.float16)
    ways: dict[str, Callable[[], None]] = {"reading the file": whole_file}
    ways |= {name: all_of(read) for name, read in readers.items() if name in ("np.memmap", "this store", "tensorstore")}
    ways["this store, into the caller's buffer"] = all_of(lambda rows: store.read(rows, out=out[: len(rows)]))
    ways["webdataset"] = lambda: readers["webdataset"]([])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(max(3, settings.rounds // 3)):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds, settings.samples * GRID * GRID * CHANNELS * 2


def remote(settings: Settings, kind: str, latency: float) -> tuple[dict[str, list[float]], int]:
    """Batches of 16 from a static range server, by this store and by bare requests for the same bytes."""
    chunk = GRID * GRID * CHANNELS * 2 + CRC_BYTES
    with range_server(settings.folder, latency) as address, environment(**aws(address)):
        url = f"{address}/bucket" if kind == "http" else "s3://bucket"
        options: Any = {"allow_http": True}
        bare = HTTPStore(url, client_options=options) if kind == "http" else S3Store("bucket", client_options=options)
        pool, http = ThreadPoolExecutor(BATCH), urllib3.PoolManager(maxsize=BATCH)
        store = FeatureStore(f"{url}/store")
        tensors = tensorstore.open(
            {"driver": "zarr3", "kvstore": f"{address}/bucket/store/"}, context=tensorstore.Context()
        ).result()

        def by_obstore(row: int) -> Any:
            key = f"store/{shard_key(row // 32)}"
            return obstore.get_range(bare, key, start=row % 32 * chunk, length=chunk)

        def by_urllib3(row: int) -> bytes:
            first = row % 32 * chunk
            where = f"{address}/bucket/store/{shard_key(row // 32)}"
            return http.request("GET", where, headers={"Range": f"bytes={first}-{first + chunk - 1}"}).data

        readers: Reads = {
            "bare range requests (obstore, 16 threads)": lambda rows: list(pool.map(by_obstore, rows)),
            "bare range requests (urllib3, 16 threads)": lambda rows: list(pool.map(by_urllib3, rows)),
            "this store": lambda rows: store.read(rows),
            "tensorstore": lambda rows: [f.result() for f in [tensors[i].read() for i in rows]],
        }
        seconds, size = compare(settings, readers, BATCH, 2)
    best = min((n for n in seconds if n.startswith("bare")), key=lambda n: np.median(seconds[n]))
    return {"bare range requests" if name == best else name: values for name, values in seconds.items()}, size


def cached(settings: Settings) -> tuple[dict[str, list[float]], int]:
    """What a miss costs if the cache takes single samples, and if it takes whole shards."""
    rng, seconds = np.random.default_rng(settings.seed), {"single samples": [], "whole shards": []}
    with range_server(settings.folder, 20) as address, environment(**aws(address)):
        for number in range(5):
            rows = rng.choice(settings.samples, BATCH, replace=False).tolist()
            for name in seconds:
                folder = settings.folder / "cache" / f"{name}-{number}"
                store = FeatureStore("s3://bucket/store", cache=CacheSettings(str(folder), 10**11))
                started = time.perf_counter()
                if name == "whole shards":
                    with ThreadPoolExecutor(4) as pool:
                        list(pool.map(store.warm, sorted({row // 32 for row in rows})))
                store.read(rows)
                seconds[name].append(time.perf_counter() - started)
                subprocess.run(["rm", "-rf", str(folder)], check=True)
    return seconds, BATCH * GRID * GRID * CHANNELS * 2


def table(title: str, seconds: dict[str, list[float]], size: int, baseline: str) -> str:
    """Markdown: median time, rate, and median of paired ratios."""
    lines = [f"## {title}", "", f"| | ms | GB/s | speed over {baseline} (quartiles) |", "|---|---|---|---|"]
    base = np.array(seconds[baseline])
    for name, values in sorted(seconds.items(), key=lambda item: np.median(item[1])):
        low, middle, high = np.percentile(base / np.array(values), [25, 50, 75])
        ms = np.median(values) * 1e3
        lines.append(f"| {name} | {ms:.2f} | {size / ms / 1e6:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def head(settings: Settings) -> str:
    """What was run, where and when."""
    return (
        "# Reading features\n\n"
        f"{provenance('python -m tests.benchmarks.bench_store')}: {settings.samples} samples of "
        f"{GRID} x {GRID} x {CHANNELS} fp16 ({GRID * GRID * CHANNELS * 2 / 1e6:.1f} MB), {settings.rounds} rounds, "
        f"seed {settings.seed}.\n\n"
        "Contenders of one table ran in the same rounds, in random order; the ratio is the median over rounds. "
        "Warm: each sample was read just before. Cold: taken out of the page cache before each turn."
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
