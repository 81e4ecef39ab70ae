"""What one does with whole stores: list, describe, verify, repair, copy, compare, clean up, warm."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

import fsspec
import numpy as np
from tqdm import tqdm

from feature_store import files, layout, lock, manifest
from feature_store.errors import StoreError
from feature_store.reader import FeatureStore
from feature_store.writer import IO_THREADS, ShardWriter, create

T = TypeVar("T")
U = TypeVar("U")


class Damage(NamedTuple):
    """Something in a store that is not what it was written as."""

    file: str
    shard: int | None
    """The shard that has to be computed again; none if only small files are concerned."""
    message: str


def find(root: str) -> Iterator[str]:
    """URLs of the stores below a path or URL."""
    root = files.absolute(root)
    fs, path = fsspec.url_to_fs(root)
    local = files.local_path(root) is not None
    for found in sorted(fs.glob(f"{path.rstrip('/')}/**/{layout.ARRAY}")):
        place = found.removesuffix(f"/{layout.ARRAY}")
        yield place if local else fs.unstrip_protocol(place)


def describe(url: str) -> dict[str, Any]:
    """What a store is and how far it has come."""
    writer = ShardWriter(url)
    shards, missing = layout.num_shards(len(writer.rows)), writer.missing()
    return {
        "url": writer.url,
        "samples": len(writer.rows),
        "shards": shards,
        "done": shards - len(missing),
        "bytes": writer.nbytes,
        "model": writer.fingerprint.model,
        "dtype": writer.fingerprint.dtype,
        "sealed": writer.sealed(),
    }


def statistics(url: str) -> dict[str, Any]:
    """Counts, bytes, and of the values: range, mean, deviation, NaN, infinities, and channels that never vary."""
    store = FeatureStore(url)
    channels = store.shape[-1]
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    totals, squares = np.zeros(channels), np.zeros(channels)
    nans = infinite = count = 0
    shards = [layout.shard_rows(shard, len(store)) for shard in range(layout.num_shards(len(store)))]
    for rows in tqdm(shards, unit="shard", file=sys.stderr):
        kept = [row for row in rows if store.samples[row][:2] not in store.quarantined]
        if not kept:
            continue
        values = store.read(kept, dtype=np.float32).reshape(-1, channels).astype(np.float64)
        finite = np.isfinite(values)
        nans, infinite = nans + int(np.isnan(values).sum()), infinite + int(np.isinf(values).sum())
        count += int(finite.sum())
        low = np.minimum(low, np.where(finite, values, np.inf).min(0))
        high = np.maximum(high, np.where(finite, values, -np.inf).max(0))
        values[~finite] = 0
        totals, squares = totals + values.sum(0), squares + (values**2).sum(0)
    mean = totals.sum() / max(count, 1)
    return {
        "url": store.url,
        "samples": len(store),
        "quarantined": len(store.quarantined),
        "bytes": len(store) * store.sample_bytes,
        "min": float(low.min()),
        "max": float(high.max()),
        "mean": float(mean),
        "std": float(np.sqrt(max(squares.sum() / max(count, 1) - mean**2, 0))),
        "nan": nans,
        "infinite": infinite,
        "dead_channels": np.flatnonzero(low == high).tolist(),
    }


def verify(url: str) -> tuple[dict[str, Any], list[Damage]]:
    """Every byte of a store against every checksum there is for it: seal, plan, manifest, markers, shards."""
    folder = files.open_folder(url)
    found: list[Damage] = []
    there = folder.names("")
    if not {layout.ARRAY, layout.PLAN, layout.SEAL, layout.MANIFEST} & set(there):
        raise StoreError(f"{folder.url}: expected a feature store, found none; extract it first")
    table = None
    if layout.SEAL in there:
        for name in (layout.ARRAY, layout.PLAN, layout.MANIFEST):
            try:
                data = manifest.read_sealed(folder, [name])[name]
                table = manifest.read_table(data) if name == layout.MANIFEST else table
            except StoreError as error:
                file = layout.SEAL if f"/{layout.SEAL}:" in str(error) else name
                if file not in [damage.file for damage in found]:
                    found.append(Damage(file, None, str(error)))
    try:
        writer = ShardWriter(url)
    except StoreError as error:
        if not found:
            file = layout.PLAN if layout.PLAN in str(error) or layout.PLAN not in there else layout.ARRAY
            found.append(Damage(file, None, str(error)))
    if any(damage.file in (layout.ARRAY, layout.PLAN) for damage in found):  # nothing can be said of the shards
        return {"url": folder.url, "sealed": layout.SEAL in there, "samples": 0, "shards": 0}, found
    checksums = table["checksum"].to_pylist() if table is not None else None
    missing = set(writer.missing())
    total = layout.num_shards(len(writer.rows))
    if layout.SEAL in there:
        found += [
            Damage(layout.marker_key(s, writer.making), s, f"{writer.url}: shard {s} has lost its marker")
            for s in sorted(missing)
        ]
    done = [shard for shard in range(total) if shard not in missing]

    def check(shard: int) -> list[Damage]:
        rows = layout.shard_rows(shard, len(writer.rows))
        return _check_shard(writer, shard, checksums[rows.start : rows.stop] if checksums else None)

    for damages in _parallel(check, done, "shard"):
        found += damages
    summary = {"url": writer.url, "sealed": layout.SEAL in there, "samples": len(writer.rows), "shards": len(done)}
    return summary, found


def _check_shard(writer: ShardWriter, shard: int, listed: Sequence[int] | None) -> list[Damage]:
    """The shard's bytes against its index, its checksums, its marker, and the manifest's checksums."""
    key, name = layout.shard_key(shard), f"{writer.url}: shard {shard}"
    try:
        marker = writer.markers([shard])[shard]
    except FileNotFoundError:
        marker = None
    if marker is None:
        return [Damage(layout.marker_key(shard, writer.making), shard, f"{name} has a damaged marker")]
    try:
        raw = memoryview(writer.folder.read(key))
    except FileNotFoundError:
        return [Damage(key, shard, f"{name} is missing")]
    index = layout.read_index(raw[-layout.INDEX_BYTES :])
    if index is None:
        return [Damage(key, shard, f"{name} has a damaged index (truncated?)")]
    rows = layout.shard_rows(shard, len(writer.rows))
    used, found = layout.INDEX_BYTES, []
    for slot, row in enumerate(rows):
        offset, length = (int(v) for v in index[slot])
        sample = raw[offset : offset + length]
        used += length
        where = f"{name}, sample {slot} ({writer.rows[row].sample_id})"
        if layout.crc_bytes(sample[: -layout.CRC_BYTES]) != bytes(sample[-layout.CRC_BYTES :]):
            found.append(Damage(key, shard, f"{where}: its checksum is wrong"))
            continue
        crc = layout.crc32c(sample[: -layout.CRC_BYTES])
        if crc != marker.checksum[slot] or (listed is not None and crc != listed[slot]):
            found.append(Damage(key, shard, f"{where}: it is not the one that marker and manifest list"))
    if not found and used != len(raw):
        found.append(Damage(key, shard, f"{name}: expected {used} bytes, got {len(raw)}"))
    return found


def repair(url: str, quarantined: bool = False) -> dict[str, Any]:
    """Take damaged shards and small files out, so that the next extraction makes them anew; the rest stays.

    `quarantined`: also shards with quarantined images, to try those again.
    """
    folder = files.open_folder(url)
    with lock.locked(folder):
        summary, found = verify(url)
        again = {damage.shard for damage in found if damage.shard is not None}
        if quarantined and summary["shards"]:
            writer = ShardWriter(url)
            done = sorted(set(range(layout.num_shards(len(writer.rows)))) - set(writer.missing()))
            again |= {shard for shard, marker in writer.markers(done).items() if marker is None or marker.quarantine}
        if again:
            writer = ShardWriter(url)
            for shard in sorted(again):
                writer.forget(shard)
        if again or found:  # after the markers: a kill in between leaves a seal whose lost markers `verify` finds
            folder.delete(layout.SEAL)
            folder.delete(layout.MANIFEST)
        for damage in found:
            if damage.file in (layout.ARRAY, layout.PLAN):
                folder.delete(damage.file)
    return {**summary, "damaged": len(found), "shards_to_compute": sorted(again)}


def copy(source: str, destination: str) -> dict[str, Any]:
    """Copy a sealed store to another URL, shard by shard and checked; run again, it goes on where it was stopped."""
    store, reader = FeatureStore(source), ShardWriter(source)
    writer = create(destination, store.fingerprint, reader.rows)
    shards = writer.missing()
    with lock.locked(writer.folder):

        def transfer(shard: int) -> int:
            damage = _check_shard(reader, shard, None)
            if damage:
                raise StoreError(f"{damage[0].message}; repair {source} first")
            raw = reader.folder.read(layout.shard_key(shard))
            writer.folder.write(layout.shard_key(shard), [raw])
            arrived = _check_bytes(writer, shard, raw)
            if not arrived:
                raise StoreError(f"{writer.url}: shard {shard} did not arrive as it was sent; run the copy again")
            marker = reader.folder.read(layout.marker_key(shard, reader.making))
            writer.folder.write(layout.marker_key(shard, writer.making), [marker])
            return len(raw)

        copied = sum(_parallel(transfer, shards, "shard", threads=4))
        writer.seal()
    return {
        "source": store.url,
        "destination": writer.url,
        "samples": len(store),
        "shards": len(shards),
        "bytes": copied,
    }


def _check_bytes(writer: ShardWriter, shard: int, sent: files.Bytes) -> bool:
    return layout.crc32c(memoryview(writer.folder.read(layout.shard_key(shard)))) == layout.crc32c(memoryview(sent))


def difference(first: str, second: str) -> dict[str, Any]:
    """Two stores: which fields of their fingerprints differ, and how far the features of common samples do."""
    one, two = FeatureStore(first), FeatureStore(second)
    other = {(sample.sample_id, sample.view): row for row, sample in enumerate(two.samples)}
    usable = one.quarantined.keys() | two.quarantined.keys()
    common = [(row, other[s[:2]]) for row, s in enumerate(one.samples) if s[:2] in other and s[:2] not in usable]
    differing = one.fingerprint.differences(asdict(two.fingerprint))
    result: dict[str, Any] = {
        "common": len(common),
        "only_first": len(one) - sum(s[:2] in other for s in one.samples),
        "only_second": len(two) - sum(s[:2] in other for s in one.samples),
        "fingerprint": differing,
        "quarantined": sorted(
            f"{sample_id} view {view}" for sample_id, view in one.quarantined.keys() ^ two.quarantined.keys()
        ),
        "max_difference": None,
    }
    if common and one.shape == two.shape:
        largest = 0.0
        for start in tqdm(range(0, len(common), layout.ROWS_PER_SHARD), unit="shard", file=sys.stderr):
            part = common[start : start + layout.ROWS_PER_SHARD]
            apart = one.read([a for a, _ in part], dtype=np.float32) - two.read([b for _, b in part], dtype=np.float32)
            largest = max(largest, float(np.abs(apart).max()))
        result["max_difference"] = largest
    result["equal"] = (
        result["max_difference"] == 0
        and not result["only_first"]
        and not result["only_second"]
        and not differing
        and not result["quarantined"]
    )
    return result


def garbage(root: str, delete: bool = False) -> dict[str, Any]:
    """What killed jobs left below a path or URL, and its bytes; with `delete`, gone.

    Partial files, locks of dead jobs, markers of another making, shards without a marker in unsealed stores, and on S3
    dangling multipart uploads. A store on which a job works is left alone.
    """
    root = files.absolute(root)
    fs, path = fsspec.url_to_fs(root)
    local = files.local_path(root) is not None
    busy: list[str] = []
    leftovers: dict[str, int] = {}
    for url in find(root):
        folder = files.open_folder(url)
        if lock.holder_alive(folder):
            busy.append(url)
            continue
        place = files.local_path(url) or fs._strip_protocol(url)
        leftovers |= _leftovers(fs, url, place)
    if local:
        leftovers |= {
            name: entry["size"]
            for name, entry in fs.find(path, detail=True).items()
            if name.endswith(".partial") and not any(name.startswith(f"{url}/") for url in busy)
        }
    uploads = _dangling_uploads(fs, path) if "s3" in fs.protocol else []
    if delete:
        for name in leftovers:
            fs.rm_file(name)
        for upload in uploads:
            fs.call_s3("abort_multipart_upload", Bucket=upload[0], Key=upload[1], UploadId=upload[2])
    return {
        "root": root,
        "busy": busy,
        "files": sorted(leftovers),
        "bytes": sum(leftovers.values()),
        "uploads": [f"s3://{bucket}/{key}" for bucket, key, _ in uploads],
        "deleted": delete,
    }


def _leftovers(fs: Any, url: str, place: str) -> dict[str, int]:
    """Path to bytes of what nothing refers to in one store."""
    writer = ShardWriter(url)
    entries = fs.find(place, detail=True)
    keys = {name.removeprefix(f"{place}/"): (name, entry["size"]) for name, entry in entries.items()}
    shards = range(layout.num_shards(len(writer.rows)))
    missing = set(writer.missing())
    valid = {layout.marker_key(shard, writer.making) for shard in shards}
    kept = {layout.shard_key(shard) for shard in shards if shard not in missing or writer.sealed()}
    return dict(
        value
        for key, value in keys.items()
        if key == layout.LOCK
        or (key.startswith("markers/") and key not in valid)
        or (key.startswith("c/") and key not in kept)
    )


def _dangling_uploads(fs: Any, path: str) -> list[tuple[str, str, str]]:
    """Bucket, key and id of multipart uploads below a path that were begun more than a day ago."""
    bucket, _, prefix = path.partition("/")
    listed = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix).get("Uploads", [])
    old = time.time() - 24 * 3600
    return [(bucket, u["Key"], u["UploadId"]) for u in listed if u["Initiated"].timestamp() < old]


def warm(store: FeatureStore, shards: Iterable[int] | None = None) -> dict[str, Any]:
    """Bring a remote store's shards into its local cache, whole shards at a time, until the cache is full."""
    wanted = list(range(layout.num_shards(len(store))) if shards is None else shards)
    taken = sum(_parallel(store.warm, wanted, "shard", threads=4))
    return {"url": store.url, "samples": len(store), "taken": taken}


def _parallel(work: Callable[[T], U], items: Sequence[T], unit: str, threads: int = IO_THREADS // 2) -> Iterator[U]:
    """Results in order, with a progress bar."""
    with ThreadPoolExecutor(threads) as pool:
        yield from tqdm(pool.map(work, items), total=len(items), unit=unit, file=sys.stderr)
