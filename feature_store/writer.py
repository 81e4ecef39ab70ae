"""Create a store, fill it shard by shard from any number of processes, and seal it.

One shard is written whole by one process, then its marker. A shard without a marker was never finished: extraction
writes it again. Sealing checks every marker and writes manifest and seal last, so the seal means the store is whole.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from feature_store import layout, manifest, packing
from feature_store.errors import DamagedFile, OtherArray, OtherFormat, StoreError
from feature_store.schema import COMMANDS, Fingerprint, Row, build_id, text
from feature_store.storage import open_folder
from feature_store.urls import absolute

IO_THREADS = 16


def create(url: str, fingerprint: Fingerprint, rows: Sequence[Row], grown: bool = False) -> "ShardWriter":
    """Create the store, or open the one that an earlier run left there if it is the same build.

    `grown`: one that shares most of its rows will do as well; its own rows are the writer's, and `extend` adds to them.
    Raises StoreError if a store of another fingerprint or of other rows is in the way, or the URL is of no known kind.
    """
    url = absolute(url)
    if not rows:
        raise StoreError(f"{url}: expected at least one row to store, got none")
    _check_unique(url, rows)
    folder = open_folder(url)
    there = set(folder.names(""))
    if layout.ARRAY in there:
        existing = Fingerprint.of_record(read_array(url, folder.read(layout.ARRAY))["attributes"]["fingerprint"])
        differing = existing.differences(fingerprint.record()["fingerprint"])
        if differing:
            raise StoreError(
                f"{url}: holds a store with another fingerprint ({'; '.join(differing)}); choose another --store"
            )
    planned = list(rows)
    if layout.PLAN in there:
        planned = _read_plan(url, folder.read(layout.PLAN))
        # Sources may differ: the data lie elsewhere now.
        same = build_id(fingerprint, rows) == build_id(fingerprint, planned)
        if not same and not (grown and _akin(planned, rows)):
            raise StoreError(
                f"{url}: holds a store of other images (expected {len(rows)} rows, got {len(planned)}, "
                "or in another order); choose another --store"
            )
    else:
        folder.write(layout.PLAN, [manifest.plan_bytes(rows)])
    array = _array_bytes(fingerprint, len(planned))
    if layout.ARRAY not in there:  # after the plan: its presence means "created"
        folder.write(layout.ARRAY, [array])
    elif (kept := _without_versions(folder.read(layout.ARRAY))) != _without_versions(array):
        # An extension was killed, or is at work, between plan and array.
        if not grown or kept | {"shape": None} != _without_versions(array) | {"shape": None}:
            raise DamagedFile(url, layout.ARRAY)
    writer = ShardWriter(url)
    if writer.build_id != build_id(fingerprint, planned):
        raise StoreError(f"{url}: another job created a different store there just now; rerun the command")
    return writer


def extend(writer: "ShardWriter", rows: Sequence[Row]) -> "ShardWriter":
    """The store with the rows that it lacks behind its own; its full shards stay done, and only its last one, if it was
    part full, becomes missing. The caller holds the store's lock; killed, it may be called again."""
    absent = writer.lacks(rows)
    grown = [*writer.rows, *absent]
    _check_unique(writer.url, grown)
    array = _array_bytes(writer.fingerprint, len(grown))
    if not absent:
        if writer.shape[0] != len(grown):  # killed between plan and array
            writer.folder.write(layout.ARRAY, [array])
        return ShardWriter(writer.url)
    build, folder = build_id(writer.fingerprint, grown), writer.folder
    missing = set(writer.missing())
    full = [shard for shard in range(len(writer.rows) // layout.ROWS_PER_SHARD) if shard not in missing]
    writer.unseal()

    def keep(shard: int) -> None:
        folder.write(layout.marker_key(shard, build), [folder.read(layout.marker_key(shard, writer.build_id))])

    with ThreadPoolExecutor(IO_THREADS) as pool:
        list(pool.map(keep, full))
    folder.write(layout.PLAN, [manifest.plan_bytes(grown)])
    folder.write(layout.ARRAY, [array])
    return ShardWriter(writer.url)


def _check_unique(url: str, rows: Sequence[Row]) -> None:
    """Raise StoreError if two rows are one sample under one view, as the store writes their names."""
    if len({(text(row.sample_id), row.view) for row in rows}) != len(rows):
        raise StoreError(f"{url}: expected every sample and view once, got some of them twice")


def _akin(planned: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Whether two lists of rows are the same set as it grew or shrank, rather than two sets."""
    one, other = ({(text(row.sample_id), row.view) for row in of} for of in (planned, rows))
    return 2 * len(one & other) >= min(len(one), len(other))


class ShardWriter:
    """Writes to a created store; cheap to make, so every process opens its own.

    `shape` is the array's, with int8's scales; `fingerprint.channels` are the features'.
    """

    def __init__(self, url: str):
        self.url = absolute(url)
        self.folder = open_folder(self.url)
        try:
            record = read_array(self.url, self.folder.read(layout.ARRAY))
            plan = self.folder.read(layout.PLAN)
        except FileNotFoundError:
            raise StoreError(f"{self.url}: expected a feature store, found none; extract it first") from None
        self.shape: tuple[int, ...] = tuple(record["shape"])
        self.fingerprint = Fingerprint.of_record(record["attributes"]["fingerprint"])
        self.rows = _read_plan(self.url, plan)
        self.build_id = build_id(self.fingerprint, self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape)) * np.dtype(self.fingerprint.dtype).itemsize

    def lacks(self, rows: Sequence[Row]) -> list[Row]:
        """Those of the rows that are not in the store's plan."""
        planned = {row[:2] for row in self.rows}
        return [row for row in rows if (text(row.sample_id), row.view) not in planned]

    def missing(self) -> list[int]:
        """Shards without a marker of this build: the work that is left."""
        done = set(self.folder.names("markers"))
        shards = range(layout.num_shards(len(self.rows)))
        return [s for s in shards if layout.marker_key(s, self.build_id).removeprefix("markers/") not in done]

    def markers(self, shards: Sequence[int]) -> dict[int, manifest.Marker | None]:
        """Markers of shards; None for a damaged one. Raises FileNotFoundError for one that is not there."""

        def marker(shard: int) -> manifest.Marker | None:
            read = manifest.read_marker(self.folder.read(layout.marker_key(shard, self.build_id)), shard)
            rows = len(layout.shard_rows(shard, len(self.rows)))
            return read if read and len(read.width) == rows else None

        with ThreadPoolExecutor(IO_THREADS) as pool:
            return dict(zip(shards, pool.map(marker, shards), strict=True))

    def invalidate(self, shard: int) -> None:
        """Mark a shard as missing, so that it is written again."""
        self.folder.delete(layout.marker_key(shard, self.build_id))

    def write(
        self,
        shard: int,
        features: np.ndarray,
        sizes: Sequence[tuple[int, int]],
        quarantine: Mapping[int, str] | None = None,
        stamps: Sequence[str] = (),
    ) -> int:
        """Write a whole shard, features of shape (rows, grid, grid, channels), then its marker. Returns the bytes.

        `sizes` are the original images' (width, height). `quarantine` maps the position of an image that could not be
        used to the reason; whatever `features` hold for it, NaN is stored (int8: zeros). `stamps` tell of each row
        whether its source has changed since. Writing a shard again gives the same bytes. Raises StoreError if the shape
        is wrong or a value is not finite in the stored dtype.
        """
        quarantine = {slot: text(reason) for slot, reason in (quarantine or {}).items()}
        rows = layout.shard_rows(shard, len(self.rows))
        expected = (len(rows), *self.shape[1:-1], self.fingerprint.channels)
        if features.shape != expected or len(sizes) != len(rows) or len(stamps) not in (0, len(rows)):
            raise StoreError(f"{self.url}: shard {shard}: expected features of shape {expected}, got {features.shape}")
        stored = np.stack([self._stored(rows[i], sample, i in quarantine) for i, sample in enumerate(features)])
        samples = [memoryview(sample.reshape(-1).view(np.uint8)) for sample in stored]
        self.folder.write(layout.shard_key(shard), layout.shard_parts(samples))
        marker = manifest.Marker(
            width=[int(w) for w, _ in sizes],
            height=[int(h) for _, h in sizes],
            checksum=[layout.crc32c(sample) for sample in samples],
            quarantine=quarantine,
            stamp=list(stamps),
        )
        self.folder.write(layout.marker_key(shard, self.build_id), [manifest.marker_bytes(shard, marker)])
        return stored.nbytes

    def _stored(self, row: int, sample: np.ndarray, quarantined: bool) -> np.ndarray:
        """One sample as the array holds it."""
        packed = self.fingerprint.dtype == "int8"
        if quarantined:
            return (
                np.zeros(self.shape[1:], np.int8) if packed else np.full(self.shape[1:], np.nan, self.fingerprint.dtype)
            )
        finite = bool(np.isfinite(sample).all())
        if finite and packed:
            try:
                return packing.pack(sample)
            except OverflowError:
                finite = False
        with np.errstate(over="ignore"):
            stored = sample.astype(self.fingerprint.dtype)
        if not finite or not np.isfinite(stored).all():
            raise StoreError(
                f"{self.url}: shard {row // layout.ROWS_PER_SHARD}: features of {self.rows[row].source} are not finite "
                f"in {stored.dtype}; extract with --precision fp32 or --dtype float32, and look at the image"
            )
        return stored

    def unseal(self) -> None:
        """Take back seal and manifest, before anything is written again."""
        self.folder.delete(layout.SEAL)
        self.folder.delete(layout.MANIFEST)

    def sealed(self) -> bool:
        """Whether there is a seal."""
        return layout.SEAL in self.folder.names("")

    def seal(self) -> dict[int, str]:
        """Write manifest and seal once all shards are there. Returns quarantined rows and why.

        Raises StoreError naming what is missing or damaged.
        """
        missing = self.missing()
        total = layout.num_shards(len(self.rows))
        if missing:
            raise StoreError(
                f"{self.url}: {len(missing)} of {total} shards missing (first: {missing[0]}); rerun the extraction"
            )
        markers = []
        for shard, marker in self.markers(range(total)).items():
            if marker is None:
                raise DamagedFile(self.url, layout.marker_key(shard, self.build_id))
            markers.append(marker)
        if not self.sealed():
            table = manifest.manifest_bytes(self.rows, markers)
            self.folder.write(layout.MANIFEST, [table])
            kept = {name: self.folder.read(name) for name in (layout.ARRAY, layout.PLAN)}
            self.folder.write(layout.SEAL, [manifest.seal_bytes({**kept, layout.MANIFEST: table})])
        return {
            shard * layout.ROWS_PER_SHARD + slot: reason
            for shard, marker in enumerate(markers)
            for slot, reason in marker.quarantine.items()
        }


def read_array(url: str, data: Any) -> dict[str, Any]:
    """The array's zarr.json. Raises DamagedFile if it is damaged, StoreError if it is none of ours."""
    try:
        record = json.loads(bytes(data))
        fingerprint = record["attributes"]["fingerprint"]
    except ValueError:
        raise DamagedFile(url, layout.ARRAY) from None
    except (KeyError, TypeError):
        raise OtherArray(f"{url}: expected a feature store, got a Zarr array without a fingerprint") from None
    if fingerprint.get("format_version") != Fingerprint.format_version:
        command = COMMANDS.get(fingerprint.get("feature"), "extract_features")
        raise OtherFormat(
            f"{url}: expected a store of format {Fingerprint.format_version}, got {fingerprint.get('format_version')}; "
            f"run `python -m pipelines.{command}` to write a new one, and remove this one"
        )
    return record


def _read_plan(url: str, data: Any) -> list[Row]:
    try:
        return manifest.rows_of(manifest.read_table(data))
    except (OSError, ValueError, KeyError) as error:  # what pyarrow makes of damaged Parquet
        raise DamagedFile(url, layout.PLAN, str(error).splitlines()[0]) from None


def _without_versions(data: Any) -> dict[str, Any]:
    record = json.loads(bytes(data))
    record["attributes"].pop("versions", None)
    return record


def _array_bytes(fingerprint: Fingerprint, num_rows: int) -> bytes:
    """zarr.json as zarr-python writes it."""
    import zarr
    from zarr.codecs import Crc32cCodec

    channels = packing.stored_channels(fingerprint.channels, fingerprint.dtype)
    shape = (fingerprint.grid, fingerprint.grid, channels)
    held: dict[str, Any] = {}
    zarr.create_array(
        store=zarr.storage.MemoryStore(held),
        shape=(num_rows, *shape),
        chunks=(1, *shape),
        shards=(layout.ROWS_PER_SHARD, *shape),
        dtype=fingerprint.dtype,
        compressors=[Crc32cCodec()],
        fill_value=0 if fingerprint.dtype == "int8" else np.nan,
        attributes=fingerprint.record(),
    )
    return held[layout.ARRAY].to_bytes()
