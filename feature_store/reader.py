"""Read samples of a sealed store at the speed of the disk: shard indexes in memory, one range per sample, checked."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import google_crc32c
import numpy as np
import zarr

from feature_store import files, layout, manifest
from feature_store.errors import StoreError
from feature_store.schema import Fingerprint

READ_THREADS = 8


class FeatureStore:
    """A sealed store, opened for reading.

    `expect` names fields of the fingerprint and the values they must have; a mismatch raises StoreError with both
    sides. So does a store that is absent or not sealed. An opened store pickles as its URL and opens anew on arrival.
    """

    def __init__(self, url: str, expect: dict[str, Any] | None = None, verify: bool = True):
        self.url = files.absolute(url)
        self.expect, self.verify = dict(expect or {}), verify
        try:
            array = zarr.open_array(store=self.url, mode="r")
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise StoreError(f"{self.url}: expected a feature store, found none; extract it first") from error
        if "fingerprint" not in array.attrs:
            raise StoreError(f"{self.url}: expected a feature store, got a Zarr array without a fingerprint")
        self.fingerprint = Fingerprint.of_record(dict(array.attrs))
        differing = self.fingerprint.differences(self.expect)
        if differing:
            raise StoreError(
                f"{self.url}: the store was made otherwise ({'; '.join(differing)}); extract it anew elsewhere"
            )
        try:
            table = manifest.read_table(files.read_bytes(self.url, layout.MANIFEST))
        except FileNotFoundError:
            raise StoreError(f"{self.url}: the store is not sealed; run its extraction again to finish it") from None
        self.samples = manifest.rows_of(table)
        self.sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
        self.checksums: list[int] = table["checksum"].to_pylist()
        self.shape: tuple[int, ...] = array.shape[1:]
        self.dtype = np.dtype(self.fingerprint.dtype)
        self._row = {(sample.sample_id, sample.view): i for i, sample in enumerate(self.samples)}
        self._index: dict[int, np.ndarray] = {}
        self._local = files.local_path(self.url)
        self._pool = ThreadPoolExecutor(READ_THREADS)

    def __reduce__(self):
        return FeatureStore, (self.url, self.expect, self.verify)

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, sample_ids: Sequence[str], views: Sequence[int]) -> list[int]:
        """Row numbers of samples. Raises StoreError naming the first that the store lacks."""
        try:
            return [self._row[key] for key in zip(sample_ids, views, strict=True)]
        except KeyError as error:
            sample_id, view = error.args[0]
            raise StoreError(
                f"{self.url}: no sample {sample_id!r} view {view} among {len(self)}; "
                "extract with that image and --num-views above it"
            ) from None

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """Samples in the order asked for, shape (rows, grid, grid, channels). Raises StoreError on damage."""
        wanted = sorted(set(rows))
        samples = dict(zip(wanted, self._pool.map(self._sample, wanted), strict=True))
        return np.stack([samples[row] for row in rows]) if len(rows) else np.empty((0, *self.shape), self.dtype)

    def _sample(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise StoreError(f"{self.url}: no row {row}; the store has {len(self)}")
        shard, slot = divmod(row, layout.ROWS_PER_SHARD)
        offset, length = (int(v) for v in self._shard_index(shard)[slot])
        expected = int(np.prod(self.shape)) * self.dtype.itemsize
        if offset == layout.MISSING or length != expected + layout.CRC_BYTES:
            raise StoreError(f"{self.url}: shard {shard} holds no sample {slot}; the store is damaged, extract it anew")
        raw = self._range(shard, offset, length)
        body = raw[:expected]
        if self.verify and google_crc32c.value(body) != int.from_bytes(raw[expected:], "little"):
            raise StoreError(
                f"{self.url}: shard {shard}, sample {slot} ({self.samples[row].sample_id}): its checksum is wrong; "
                "the file is damaged, delete the store and extract it anew"
            )
        return np.frombuffer(body, self.dtype).reshape(self.shape)

    def _shard_index(self, shard: int) -> np.ndarray:
        if shard not in self._index:
            raw = self._range(shard, -layout.index_bytes(), layout.index_bytes())
            body, crc = raw[: -layout.CRC_BYTES], raw[-layout.CRC_BYTES :]
            if google_crc32c.value(body) != int.from_bytes(crc, "little"):
                raise StoreError(f"{self.url}: shard {shard} has a damaged index (truncated?); extract the store anew")
            self._index[shard] = np.frombuffer(body, "<u8").reshape(layout.ROWS_PER_SHARD, 2)
        return self._index[shard]

    def _range(self, shard: int, offset: int, length: int) -> bytes:
        """Bytes of a shard; a negative offset counts from its end."""
        key = layout.shard_key(shard)
        try:
            if self._local is None:
                fs, root = fsspec.url_to_fs(self.url)
                return fs.cat_file(f"{root}/{key}", start=offset, end=None if offset < 0 else offset + length)
            with open(os.path.join(self._local, key), "rb", buffering=0) as file:
                start = offset if offset >= 0 else max(os.fstat(file.fileno()).st_size + offset, 0)
                return os.pread(file.fileno(), length, start)
        except FileNotFoundError:
            raise StoreError(f"{self.url}: shard {shard} is missing; the store is damaged, extract it anew") from None
