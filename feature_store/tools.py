"""What one does with whole stores: list, describe, verify, repair, copy, compare, clean up, warm."""

import glob
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from feature_store import layout, lock, manifest, urls
from feature_store.errors import DamagedFile, OtherFormat, StoreError, StoreFault
from feature_store.reader import FeatureStore
from feature_store.storage import open_folder
from feature_store.writer import IO_THREADS, ShardWriter, create

PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial$")
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
    root = urls.absolute(root)
    fs, path = urls.filesystem(root)
    local = urls.local_path(root) is not None
    try:
        names = sorted(fs.glob(f"{glob.escape(path.rstrip('/'))}/**/{layout.ARRAY}"))
    except Exception as error:  # drivers have errors of their own
        raise StoreFault(f"{root}: cannot be listed ({type(error).__name__}: {error})") from None
    for name in names:
        folder = name.removesuffix(f"/{layout.ARRAY}")
        yield folder if local else fs.unstrip_protocol(folder)


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
    """Counts, bytes, and of the values: range, mean, deviation, NaN
    (as quarantined samples are), and channels that never vary."""
    store = FeatureStore(url)
    channels = store.shape[-1]
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    totals, squares = np.zeros(channels), np.zeros(channels)
    nans = count = 0
    shards = [layout.shard_rows(shard, len(store)) for shard in range(layout.num_shards(len(store)))]
    for rows in tqdm(shards, unit="shard", file=sys.stderr):
        values = store.read(rows, dtype=np.float32).reshape(-1, channels).astype(np.float64)
        finite = np.isfinite(values)
        nans += int((~finite).sum())
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
        "dead_channels": np.flatnonzero(low == high).tolist(),
    }


def verify(url: str) -> tuple[dict[str, Any], list[Damage]]:
    """Every byte of a store against every checksum there is for it: seal, plan, manifest, markers, shards."""
    folder = open_folder(url)
    damages: list[Damage] = []
    there = folder.names("")
    if not {layout.ARRAY, layout.PLAN, layout.SEAL, layout.MANIFEST} & set(there):
        raise StoreError(f"{folder.url}: expected a feature store, found none; extract it first")
    table = None
    if layout.SEAL in there:
        for name in (layout.ARRAY, layout.PLAN, layout.MANIFEST):
            try:
                data = manifest.read_sealed(folder, [name])[name]
                table = manifest.read_table(data) if name == layout.MANIFEST else table
            except DamagedFile as error:
                if error.file not in [damage.file for damage in damages]:
                    damages.append(Damage(error.file, None, str(error)))
    nothing = {"url": folder.url, "sealed": layout.SEAL in there, "samples": 0, "shards": 0}
    if any(damage.file in (layout.ARRAY, layout.PLAN) for damage in damages):  # nothing can be said of the shards
        return nothing, damages
    try:
        for name in (layout.ARRAY, layout.PLAN):
            if name not in there:
                raise DamagedFile(folder.url, name)
        writer = ShardWriter(url)
    except OtherFormat:
        raise
    except StoreError as error:
        file = error.file if isinstance(error, DamagedFile) else layout.ARRAY
        damages.append(Damage(file, None, str(error)))
        return nothing, damages
    checksums = table["checksum"].to_pylist() if table is not None else None
    missing = set(writer.missing())
    total = layout.num_shards(len(writer.rows))
    if layout.SEAL in there:
        damages += [
            Damage(layout.marker_key(s, writer.build_id), s, f"{writer.url}: shard {s} has lost its marker")
            for s in sorted(missing)
        ]
    done = [shard for shard in range(total) if shard not in missing]

    def check(shard: int) -> list[Damage]:
        rows = layout.shard_rows(shard, len(writer.rows))
        return _check_shard(writer, shard, checksums[rows.start : rows.stop] if checksums else None)

    for of_shard in _parallel(check, done, "shard"):
        damages += of_shard
    summary = {"url": writer.url, "sealed": layout.SEAL in there, "samples": len(writer.rows), "shards": len(done)}
    return summary, damages


def _check_shard(writer: ShardWriter, shard: int, listed: Sequence[int] | None) -> list[Damage]:
    """The shard's bytes against its index, its checksums, its marker, and the manifest's checksums."""
    key, name = layout.shard_key(shard), f"{writer.url}: shard {shard}"
    try:
        marker = writer.markers([shard])[shard]
    except FileNotFoundError:
        marker = None
    if marker is None:
        return [Damage(layout.marker_key(shard, writer.build_id), shard, f"{name} has a damaged marker")]
    if listed is not None and list(listed) != marker.checksum:
        return [Damage(layout.marker_key(shard, writer.build_id), shard, f"{name}: marker and manifest differ")]
    try:
        raw = memoryview(writer.folder.read(key))
    except FileNotFoundError:
        return [Damage(key, shard, f"{name} is missing")]
    return [Damage(key, shard, message) for message in _wrong(writer, shard, raw, marker.checksum)]


def _wrong(writer: ShardWriter, shard: int, raw: memoryview, checksums: Sequence[int]) -> list[str]:
    """What is wrong with a shard's bytes, whose samples should have these checksums."""
    name = f"{writer.url}: shard {shard}"
    index = layout.read_index(raw[-layout.INDEX_BYTES :])
    if index is None:
        return [f"{name} has a damaged index (truncated?)"]
    used, wrong = layout.INDEX_BYTES, []
    for slot, row in enumerate(layout.shard_rows(shard, len(writer.rows))):
        offset, length = (int(v) for v in index[slot])
        sample, crc = (
            raw[offset : offset + length][: -layout.CRC_BYTES],
            raw[offset : offset + length][-layout.CRC_BYTES :],
        )
        used += length
        computed = layout.crc32c(sample)
        if computed != int.from_bytes(crc, "little") or computed != checksums[slot]:
            wrong.append(f"{name}, sample {slot} ({writer.rows[row].sample_id}): its checksum is wrong")
    if not wrong and used != len(raw):
        wrong.append(f"{name}: expected {used} bytes, got {len(raw)}")
    return wrong


def repair(url: str, quarantined: bool = False) -> dict[str, Any]:
    """Take damaged shards and small files out, so that a rerun of the extraction writes them; the rest stays.

    `quarantined`: also shards with quarantined images, to try those again.
    """
    folder = open_folder(url)
    with lock.locked(folder):
        summary, damages = verify(url)
        again = {damage.shard for damage in damages if damage.shard is not None}
        if quarantined and summary["shards"]:
            writer = ShardWriter(url)
            done = sorted(set(range(layout.num_shards(len(writer.rows)))) - set(writer.missing()))
            again |= {shard for shard, marker in writer.markers(done).items() if marker is None or marker.quarantine}
        if again:
            writer = ShardWriter(url)
            for shard in sorted(again):
                writer.invalidate(shard)
        if again or damages:  # after the markers: a kill in between leaves a seal whose lost markers `verify` finds
            folder.delete(layout.SEAL)
            folder.delete(layout.MANIFEST)
        for damage in damages:
            if damage.file in (layout.ARRAY, layout.PLAN):
                folder.delete(damage.file)
    return {**summary, "damaged": len(damages), "shards_to_compute": sorted(again)}


def copy(source: str, destination: str) -> dict[str, Any]:
    """Copy a sealed store to another URL, shard by shard and checked; rerun to resume.

    A shard whose marker is already there, and is the source's, is not copied again.
    """
    store, reader = FeatureStore(source), ShardWriter(source)
    create(destination, store.fingerprint, reader.rows)
    with lock.locked(open_folder(destination)) as held:
        writer = create(destination, store.fingerprint, reader.rows)
        total = range(layout.num_shards(len(reader.rows)))
        wanted, missing = reader.markers(total), set(writer.missing())
        there = writer.markers([shard for shard in total if shard not in missing])
        shards = [shard for shard in total if there.get(shard) is None or there[shard] != wanted[shard]]
        if shards and writer.sealed():
            writer.unseal()

        def transfer(shard: int) -> int:
            held.check()
            raw, marker = memoryview(reader.folder.read(layout.shard_key(shard))), wanted[shard]
            wrong = (
                _wrong(reader, shard, raw, marker.checksum) if marker else [f"{source}: shard {shard} lacks a marker"]
            )
            if wrong or marker is None:
                raise StoreError(f"{wrong[0]}; repair {source} first")
            writer.invalidate(shard)
            writer.folder.write(layout.shard_key(shard), [raw])
            if layout.crc32c(memoryview(writer.folder.read(layout.shard_key(shard)))) != layout.crc32c(raw):
                raise StoreError(f"{writer.url}: shard {shard} did not arrive as it was sent; rerun the copy")
            key = layout.marker_key(shard, writer.build_id)
            writer.folder.write(key, [manifest.marker_bytes(shard, marker)])
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


def difference(first: str, second: str) -> dict[str, Any]:
    """Two stores: which fields of their fingerprints differ, and how far the features of common samples do."""
    one, two = FeatureStore(first), FeatureStore(second)
    keys = [sample[:2] for sample in one.samples]
    other = two.samples.find([sample_id for sample_id, _ in keys], [view for _, view in keys])
    shared = [(row, at, key) for row, (at, key) in enumerate(zip(other, keys, strict=True)) if at is not None]
    bad = one.quarantined.keys() | two.quarantined.keys()
    common = [(row, at) for row, at, key in shared if key not in bad]
    differing = one.fingerprint.differences(asdict(two.fingerprint))
    result: dict[str, Any] = {
        "common": len(common),
        "only_first": len(one) - len(shared),
        "only_second": len(two) - len(shared),
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


def garbage(root: str, delete: bool = False, older_than_hours: float = 1) -> dict[str, Any]:
    """What killed jobs left below a path or URL, and its bytes; with `delete`, gone.

    Partial files, locks of dead jobs, markers of another build, shards without a marker in unsealed stores, and on S3
    dangling multipart uploads (of other tools: stores make none). A store on which a job works is left alone, and so
    is what is younger than `older_than_hours`, as it may be the work of an actor whose driver has died.
    """
    root = urls.absolute(root)
    fs, path = urls.filesystem(root)
    busy: list[str] = []
    leftovers: dict[str, int] = {}
    old = time.time() - 3600 * older_than_hours
    for url in find(root):
        folder = open_folder(url)
        try:
            with lock.locked(folder):
                stale = _leftovers(fs, url, urls.local_path(url) or fs._strip_protocol(url), old)
                for name in stale if delete else ():
                    fs.rm_file(name)
        except StoreError as error:
            busy.append(str(error))
            continue
        leftovers |= stale
    uploads = _dangling_uploads(fs, path) if "s3" in fs.protocol else []
    for bucket, key, upload in uploads if delete else ():
        fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
    return {
        "root": root,
        "left_alone": busy,
        "files": sorted(leftovers),
        "bytes": sum(leftovers.values()),
        "uploads": [f"s3://{bucket}/{key}" for bucket, key, _ in uploads],
        "deleted": delete,
    }


def _leftovers(fs: Any, url: str, place: str, old: float) -> dict[str, int]:
    """Path to bytes of what nothing refers to in one store, whose lock we hold."""
    writer = ShardWriter(url)
    shards = range(layout.num_shards(len(writer.rows)))
    missing = set(writer.missing())
    valid = {layout.marker_key(shard, writer.build_id) for shard in shards}
    kept = {layout.shard_key(shard) for shard in shards if shard not in missing or writer.sealed()}
    fs.invalidate_cache()
    stale = {}
    for name, entry in fs.find(place, detail=True).items():
        key = name.removeprefix(f"{place}/")
        garbage = (
            PARTIAL.search(key)
            or (key.startswith("markers/") and key not in valid)
            or (key.startswith("c/") and key not in kept)
        )
        if garbage and _modified(entry) < old:
            stale[name] = entry["size"]
    return stale


def _modified(entry: dict[str, Any]) -> float:
    """When a file was last written, as its file system tells; 0 if it does not."""
    when = entry.get("mtime", entry.get("LastModified", 0))
    return when.timestamp() if hasattr(when, "timestamp") else float(when or 0)


def _dangling_uploads(fs: Any, path: str) -> list[tuple[str, str, str]]:
    """Bucket, key and id of multipart uploads below a path that were begun more than a day ago."""
    bucket, _, prefix = path.strip("/").partition("/")
    listed = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/" if prefix else "")
    old = time.time() - 24 * 3600
    return [
        (bucket, upload["Key"], upload["UploadId"])
        for upload in listed.get("Uploads", [])
        if upload["Initiated"].timestamp() < old
    ]


def warm(store: FeatureStore, shards: Iterable[int] | None = None) -> dict[str, Any]:
    """Bring a remote store's shards into its local cache, whole shards at a time, until the cache is full."""
    wanted = list(range(layout.num_shards(len(store))) if shards is None else shards)
    taken = sum(_parallel(store.warm, wanted, "shard", threads=4))
    return {"url": store.url, "samples": len(store), "taken": taken}


def _parallel(work: Callable[[T], U], items: Sequence[T], unit: str, threads: int = IO_THREADS // 2) -> Iterator[U]:
    """Results in order, with a progress bar."""
    with ThreadPoolExecutor(threads) as pool:
        yield from tqdm(pool.map(work, items), total=len(items), unit=unit, file=sys.stderr)
