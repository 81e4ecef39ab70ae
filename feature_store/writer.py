"""Create a store, fill it shard by shard from any number of processes, and seal it.

One shard is written whole by one process, then its marker. A shard without a marker was never finished: extraction
writes it again. Sealing checks every marker and writes the manifest last, so its presence means the store is whole.
"""

import json
from collections.abc import Sequence

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from feature_store import files, layout, manifest
from feature_store.errors import StoreError
from feature_store.schema import Fingerprint, Row


def create(url: str, fingerprint: Fingerprint, rows: Sequence[Row]) -> "ShardWriter":
    """Create the store, or open the one that an earlier run left there if it is of the same making.

    Raises StoreError if a store of another fingerprint or of other rows is in the way, or the URL is of no known kind.
    """
    url = files.absolute(url)
    if not rows:
        raise StoreError(f"{url}: expected at least one row to store, got none")
    try:
        created = files.exists(url, "zarr.json")
    except (ValueError, ImportError) as error:  # fsspec's words for an unknown scheme or a missing driver
        raise StoreError(f"{url}: expected a path or an fsspec URL, got: {error}; check --store") from None
    if created:
        writer = ShardWriter(url)
        differing = writer.fingerprint.differences(fingerprint.record()["fingerprint"])
        if differing:
            raise StoreError(f"{url}: another store is in the way ({'; '.join(differing)}); choose another --store")
        if [row[:2] for row in rows] != [row[:2] for row in writer.rows]:  # the data set may lie elsewhere by now
            raise StoreError(
                f"{url}: a store of other images is in the way (expected {len(rows)} rows, got {len(writer.rows)}, "
                "or in another order); choose another --store"
            )
        return writer
    shape = (fingerprint.grid, fingerprint.grid, fingerprint.channels)
    files.write_bytes(url, layout.PLAN, manifest.plan_bytes(rows))  # before zarr.json, whose presence means "created"
    zarr.create_array(
        store=url,
        shape=(len(rows), *shape),
        chunks=(1, *shape),
        shards=(layout.ROWS_PER_SHARD, *shape),
        dtype=fingerprint.dtype,
        compressors=[Crc32cCodec()],
        fill_value=np.nan,
        attributes=fingerprint.record(),
    )
    return ShardWriter(url)


class ShardWriter:
    """Writes to a created store; cheap to make, so every process opens its own."""

    def __init__(self, url: str):
        self.url = files.absolute(url)
        self.array = zarr.open_array(store=self.url, mode="r+")
        self.fingerprint = Fingerprint.of_record(dict(self.array.attrs))
        self.rows = manifest.rows_of(manifest.read_table(files.read_bytes(self.url, layout.PLAN)))

    def missing(self) -> list[int]:
        """Shards without a marker: the work that is left."""
        done = set(files.names(self.url, "markers"))
        shards = range(layout.num_shards(len(self.rows)))
        return [s for s in shards if layout.marker_key(s).removeprefix("markers/") not in done]

    def has(self, shard: int) -> bool:
        """Whether the shard is finished."""
        return files.exists(self.url, layout.marker_key(shard))

    def write(self, shard: int, features: np.ndarray, sizes: Sequence[tuple[int, int]]) -> int:
        """Write a whole shard, features of shape (rows, grid, grid, channels), then its marker. Returns the bytes.

        `sizes` are the original images' (width, height). Writing a shard again gives the same bytes.
        Raises StoreError if the shape is wrong or a value is not finite in the stored dtype.
        """
        rows = layout.shard_rows(shard, len(self.rows))
        expected = (len(rows), *self.array.shape[1:])
        if features.shape != expected or len(sizes) != len(rows):
            raise StoreError(f"{self.url}: shard {shard}: expected features of shape {expected}, got {features.shape}")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(features, dtype=self.array.dtype)
        bad = [self.rows[r].source for r, ok in zip(rows, np.isfinite(stored).all((1, 2, 3)), strict=True) if not ok]
        if bad:
            raise StoreError(
                f"{self.url}: shard {shard}: features of {bad[0]} are not finite in {stored.dtype}; "
                "extract with --precision fp32, and look at the image"
            )
        self.array[rows.start : rows.stop] = stored
        marker = {
            "shard": shard,
            "first_row": rows.start,
            "width": [w for w, _ in sizes],
            "height": [h for _, h in sizes],
            "checksum": [google_crc32c.value(sample.tobytes()) for sample in stored],
        }
        files.write_bytes(self.url, layout.marker_key(shard), json.dumps(marker).encode())
        return stored.nbytes

    def seal(self) -> None:
        """Write the manifest once all shards are there. Raises StoreError naming what is missing."""
        if files.exists(self.url, layout.MANIFEST):
            return
        missing = self.missing()
        total = layout.num_shards(len(self.rows))
        if missing:
            raise StoreError(
                f"{self.url}: {len(missing)} of {total} shards missing (first: {missing[0]}); run the extraction again"
            )
        markers = [json.loads(files.read_bytes(self.url, layout.marker_key(s))) for s in range(total)]
        files.write_bytes(self.url, layout.MANIFEST, manifest.manifest_bytes(self.rows, markers))
