"""Read samples of a sealed store at the speed of the disk or network: neighbours at once, checked, in parallel."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Any

import numpy as np

from feature_store import layout, manifest, packing
from feature_store.buffers import Buffers
from feature_store.cache import CacheSettings, SampleCache
from feature_store.errors import StoreError
from feature_store.samples import Samples
from feature_store.schema import Fingerprint
from feature_store.storage import Bytes, open_folder
from feature_store.urls import absolute
from feature_store.writer import read_array

RUN_BYTES = 8 << 20  # the longest range asked for at once, so that a long read is spread over the threads


class FeatureStore:
    """A sealed store, opened for reading.

    `expect` names fields of the fingerprint and the values they must have; a mismatch raises StoreError with both
    sides. So does a store that is absent, damaged or not sealed. `verify` checks each sample's crc32c as it is read.
    `cache` keeps samples of a remote store on a local disk.

    An opened store pickles as its arguments and reopens on arrival, where it must be what it was here. After a fork a
    local store still works; a remote one raises StoreError, as its connections cannot be carried over.
    """

    def __init__(
        self,
        url: str,
        expect: dict[str, Any] | None = None,
        verify: bool = True,
        cache: CacheSettings | None = None,
    ):
        self.url = absolute(url)
        self.expect, self.verify, self.cache_settings = dict(expect or {}), verify, cache
        self.folder = open_folder(self.url)
        seal, array, table = self._open()
        self.fingerprint = self._expected(array)
        self.samples = Samples(table)
        self.sizes = np.column_stack([table["width"].to_numpy(), table["height"].to_numpy()])
        """(width, height) of each sample's image."""
        self._checksums = table["checksum"].to_numpy()
        self._stamps = table["stamp"] if "stamp" in table.column_names else None
        bad = np.flatnonzero(table["quarantine"].is_valid()).tolist()
        self.quarantined: dict[tuple[str, int], str] = {
            self.samples[row][:2]: table["quarantine"][row].as_py() for row in bad
        }
        self.stored_shape: tuple[int, ...] = tuple(array["shape"][1:])
        self.stored_dtype = np.dtype(self.fingerprint.dtype)
        packed = self.stored_dtype == np.int8
        self.shape = (*self.stored_shape[:-1], self.fingerprint.channels)
        self.dtype = np.dtype(np.float16) if packed else self.stored_dtype
        self.sample_bytes = int(np.prod(self.stored_shape)) * self.stored_dtype.itemsize
        self._index: dict[int, list[list[int]]] = {}
        self._full = False
        self._buffers = Buffers()
        self._start_pool()
        self._cache = SampleCache(cache, self.url, seal) if cache is not None and self.folder.remote else None

    def __reduce__(self):
        return FeatureStore, (self.url, asdict(self.fingerprint), self.verify, self.cache_settings)

    def __len__(self) -> int:
        return len(self.samples)

    def row_numbers(self, sample_ids: Sequence[str], views: Sequence[int]) -> list[int]:
        """Row numbers of samples. Raises StoreError naming the first that the store lacks or has in quarantine."""
        rows: list[int] = []
        for row, sample_id, view in zip(self.samples.find(sample_ids, views), sample_ids, views, strict=True):
            if row is None:
                raise StoreError(
                    f"{self.url}: no sample {sample_id!r} view {view} among {len(self)}; "
                    "extract with that image and a larger --num-views"
                )
            rows.append(row)
        for key in zip(sample_ids, views, strict=True) if self.quarantined else ():
            if key in self.quarantined:
                raise StoreError(f"{self.url}: sample {key[0]!r} has no features: {self.quarantined[key]}")
        return rows

    def content(self, sample_ids: Iterable[str]) -> str:
        """Eight hex digits of the features of these images under all their views: another, if any of them is."""
        listed = [(*self.samples[row][:2], int(self._checksums[row])) for row in self.samples.of_images(sample_ids)]
        return hashlib.sha256(json.dumps(sorted(listed)).encode()).hexdigest()[:8]

    def stamps(self, sample_ids: Sequence[str], views: Sequence[int]) -> list[str | None]:
        """What tells of each sample's source whether it has changed since it was extracted; None for one that is not
        here."""
        found, known = self.samples.find(sample_ids, views), self._stamps
        return [None if row is None else "" if known is None else known[row].as_py() for row in found]

    def rows(self, sample_ids: Sequence[str], views: Sequence[int], **how: Any) -> np.ndarray:
        """Features of samples by their ids and views; `how` as in `read`."""
        return self.read(self.row_numbers(sample_ids, views), **how)

    def read(
        self,
        rows: Sequence[int],
        out: np.ndarray | None = None,
        dtype: np.typing.DTypeLike | None = None,
        packed: bool = False,
    ) -> np.ndarray:
        """Samples in the order asked for, shape (rows, grid, grid, channels). Raises StoreError on damage.

        `out` is a C-contiguous buffer to fill instead of a new array (page-locked memory, say); its dtype counts.
        Else `dtype`: float16 or float32; by default the stored one, float16 for int8. Without conversion a local store
        reads straight into the result. `packed`: just as they are stored, an int8 store's codes with their scales
        behind them.
        """
        shape = (len(rows), *(self.stored_shape if packed else self.shape))
        if out is None:
            kept = self.stored_dtype if packed else self.dtype
            out = self._buffers.empty(shape, kept if dtype is None else dtype)
        elif out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
            raise StoreError(
                f"{self.url}: expected a writable C-contiguous buffer of shape {shape} to read into, got {out.shape}"
            )
        first: dict[int, int] = {}
        for position, row in enumerate(rows):
            if not 0 <= row < len(self.samples):
                raise StoreError(f"{self.url}: no row {row}; the store has {len(self)}")
            first.setdefault(int(row), position)
        if len(rows) == 1:
            self._read_group([rows[0]], [out[0]])
            return out
        wanted = sorted(first)
        groups = self._groups(wanted)
        targets = [[out[first[row]] for row in group] for group in groups]
        if len(groups) == 1:
            self._read_group(groups[0], targets[0])
        else:
            work = [self._workers().submit(self._read_group, *pair) for pair in zip(groups, targets, strict=True)]
            wait(work)  # all of them, as the caller may use its buffer for something else after an error
            for done in work:
                done.result()
        for position, row in enumerate(rows):
            if first[int(row)] != position:
                out[position] = out[first[int(row)]]
        return out

    def view(self, row: int) -> np.ndarray:
        """One sample without a copy: read-only, mapped from the file, checked. Local stores that need no unpacking.

        A file that is cut short afterwards, while the view is in use, ends the process: so it is with mapped files.
        """
        if self.dtype != self.stored_dtype:
            raise StoreError(f"{self.url}: only stores of float features can be mapped; use read()")
        if not 0 <= row < len(self):
            raise StoreError(f"{self.url}: no row {row}; the store has {len(self)}")
        shard = row // layout.ROWS_PER_SHARD
        offset, _ = self._span(row)
        try:
            mapped = self.folder.map(layout.shard_key(shard))
        except FileNotFoundError:
            raise self._missing(shard) from None
        end = offset + self.sample_bytes
        if not self._right(row, mapped[offset:end], mapped[end : end + layout.CRC_BYTES]):
            raise self._damaged(row)
        return np.frombuffer(mapped, self.dtype, int(np.prod(self.shape)), offset).reshape(self.shape)

    def warm(self, shard: int) -> int:
        """Bring a whole shard into the cache by one request. Returns the samples that were taken in."""
        if self._cache is None:
            raise StoreError(f"{self.url}: expected a remote store opened with a cache, got one without")
        rows = [r for r in layout.shard_rows(shard, len(self)) if not self._cache.has(r)]
        if not rows or self._full:
            return 0
        try:
            whole = memoryview(self.folder.read(layout.shard_key(shard)))
        except FileNotFoundError:
            raise self._missing(shard) from None
        taken = 0
        for row in rows:
            offset, length = self._span(row)
            sample = whole[offset : offset + self.sample_bytes]
            if not self._right(row, sample, whole[offset + self.sample_bytes : offset + length]):
                raise self._damaged(row)
            if not self._cache.put(row, sample):
                self._full = True
                break
            taken += 1
        return taken

    def _open(self) -> tuple[bytes, dict[str, Any], Any]:
        """Seal, array's record and manifest's table, each checked."""
        try:
            contents = manifest.read_sealed(self.folder, (layout.ARRAY, layout.MANIFEST))
        except FileNotFoundError:
            try:
                self._expected(read_array(self.url, self.folder.read(layout.ARRAY)))
            except FileNotFoundError:
                self.folder.names("")  # a bucket that does not exist has an error of its own
                raise StoreError(f"{self.url}: expected a feature store, found none; extract it first") from None
            raise StoreError(f"{self.url}: the store is not sealed; rerun its extraction to finish it") from None
        array, table = read_array(self.url, contents[layout.ARRAY]), manifest.read_table(contents[layout.MANIFEST])
        return bytes(contents[layout.SEAL]), array, table

    def _expected(self, array: dict[str, Any]) -> Fingerprint:
        """The fingerprint. Raises StoreError if it is not as expected."""
        fingerprint = Fingerprint.of_record(array["attributes"]["fingerprint"])
        differing = fingerprint.differences(self.expect)
        if differing:
            raise StoreError(
                f"{self.url}: fingerprint mismatch ({'; '.join(differing)}); extract it again under another --store"
            )
        return fingerprint

    def _start_pool(self) -> None:
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(self.folder.threads)

    def _workers(self) -> ThreadPoolExecutor:
        """The threads; those of a forked process stayed behind, so it starts its own."""
        if self._pid != os.getpid():
            self._start_pool()
        return self._pool

    def _groups(self, rows: list[int]) -> list[list[int]]:
        """Sorted rows as ranges to read at once: neighbours in one shard, or for a cache single samples."""
        if self._cache is not None:
            return [[row] for row in rows]
        by_shard: dict[int, list[int]] = {}
        for row in rows:
            by_shard.setdefault(row // layout.ROWS_PER_SHARD, []).append(row)
        unknown = [shard for shard in by_shard if shard not in self._index]
        if len(unknown) > 1:
            list(self._workers().map(self._shard_index, unknown))
        groups = []
        for members in by_shard.values():
            spans = [self._span(row) for row in members]
            groups += [[members[i] for i in run] for run in layout.runs(spans, RUN_BYTES)]
        return groups

    def _read_group(self, rows: list[int], targets: list[np.ndarray]) -> None:
        """Fill one target for each of neighbouring rows."""
        if targets[0].shape == self.stored_shape and targets[0].dtype == self.stored_dtype:
            stored = targets
        else:
            stored = list(self._buffers.empty((len(rows), *self.stored_shape), self.stored_dtype))
        buffers = [memoryview(sample.reshape(-1).view(np.uint8).data) for sample in stored]
        if self._cache is not None:
            self._fill_cached(rows[0], buffers[0])
        else:
            self._fill(rows, buffers)
        for target, sample in zip(targets, stored, strict=True):
            if target is sample:
                continue
            if self.shape == self.stored_shape:
                target[...] = sample
            else:
                packing.unpack(sample, target)

    def _fill(self, rows: list[int], buffers: list[memoryview]) -> None:
        """Neighbouring rows by one request, each straight into its memory, and checked. A sample whose crc32c is wrong
        is asked for once more if it came over a wire, which may be at fault."""
        wrong = self._request(rows, buffers)
        if wrong and self.folder.remote:
            wrong = [i for i in wrong if self._request([rows[i]], [buffers[i]])]
        if wrong:
            raise self._damaged(rows[wrong[0]])

    def _request(self, rows: list[int], buffers: list[memoryview]) -> list[int]:
        """Read neighbouring rows; positions of those that came short or wrong."""
        shard = rows[0] // layout.ROWS_PER_SHARD
        crcs = [memoryview(bytearray(layout.CRC_BYTES)) for _ in rows]
        inside = [part for pair in zip(buffers, crcs, strict=True) for part in pair]
        try:
            got = self.folder.read_into(layout.shard_key(shard), self._span(rows[0])[0], inside)
        except FileNotFoundError:
            raise self._missing(shard) from None
        whole = got // (self.sample_bytes + layout.CRC_BYTES)
        return [
            i
            for i, (row, buffer, crc) in enumerate(zip(rows, buffers, crcs, strict=True))
            if i >= whole or not self._right(row, buffer, crc)
        ]

    def _fill_cached(self, row: int, buffer: memoryview) -> None:
        """From the cache, else from the store into both."""
        assert self._cache is not None
        if self._cache.read_into(row, buffer) and self._right(row, buffer):
            return
        self._cache.drop(row)
        self._fill([row], [buffer])
        self._cache.put(row, buffer)

    def _right(self, row: int, sample: memoryview, crc: memoryview | None = None) -> bool:
        """Whether a sample, and Zarr's checksum behind it, are what the manifest lists; true if nothing is checked."""
        if not self.verify:
            return True
        listed = int(self._checksums[row])
        return layout.crc32c(sample) == listed and (crc is None or int.from_bytes(crc, "little") == listed)

    def _span(self, row: int) -> tuple[int, int]:
        """Offset and length in its shard of a sample with its crc32c."""
        shard, slot = divmod(row, layout.ROWS_PER_SHARD)
        index = self._index.get(shard)
        offset, length = (self._shard_index(shard) if index is None else index)[slot]
        if offset == layout.MISSING or length != self.sample_bytes + layout.CRC_BYTES:
            raise self._damaged(row)
        return offset, length

    def _shard_index(self, shard: int) -> list[list[int]]:
        """A shard's index, from memory once it has been read."""
        if shard not in self._index:
            for _ in range(2 if self.folder.remote else 1):  # the wire may be at fault
                raw = self._bytes(shard * layout.ROWS_PER_SHARD, -layout.INDEX_BYTES, layout.INDEX_BYTES)
                index = layout.read_index(raw)
                if index is not None:
                    break
            else:
                raise StoreError(f"{self.url}: shard {shard} has a damaged index (truncated?); {self._cure()}")
            self._index[shard] = index.tolist()
        return self._index[shard]

    def _bytes(self, row: int, offset: int, length: int) -> Bytes:
        """Bytes of a row's shard; a negative offset counts from its end."""
        shard = row // layout.ROWS_PER_SHARD
        try:
            return self.folder.span(layout.shard_key(shard), offset, length)
        except FileNotFoundError:
            raise self._missing(shard) from None

    def _missing(self, shard: int) -> StoreError:
        return StoreError(f"{self.url}: shard {shard} is missing; {self._cure()}")

    def _damaged(self, row: int) -> StoreError:
        shard, slot = divmod(row, layout.ROWS_PER_SHARD)
        return StoreError(
            f"{self.url}: shard {shard}, sample {slot} ({self.samples[row].sample_id}): its checksum is wrong; "
            f"{self._cure()}"
        )

    def _cure(self) -> str:
        return f"the store is damaged: run `python -m feature_store repair {self.url}`, then rerun its extraction"
