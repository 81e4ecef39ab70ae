"""Read samples of a sealed store at the speed of the disk or network: neighbours at once, checked, in parallel."""

import mmap
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from feature_store import layout, manifest, packing
from feature_store.buffers import Buffers
from feature_store.cache import CacheSettings, SampleCache
from feature_store.errors import StoreError, StoreFault
from feature_store.files import Bytes, ObjectFolder, absolute, local_path, open_folder, place
from feature_store.schema import Fingerprint
from feature_store.writer import read_array

LOCAL_THREADS, REMOTE_THREADS = 4, 16
RUN_BYTES = 8 << 20  # the longest range asked for at once, so that a long read is spread over the threads
MAPS_KEPT = FILES_KEPT = 256


class FeatureStore:
    """A sealed store, opened for reading.

    `expect` names fields of the fingerprint and the values they must have; a mismatch raises StoreError with both
    sides. So does a store that is absent, damaged or not sealed. `verify` checks each sample's crc32c as it is read.
    `cache` keeps samples of a remote store on a local disk.

    An opened store pickles as its arguments and opens anew on arrival. After a fork a local store goes on working; a
    remote one raises StoreError, as its connections cannot be carried over.
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
        self.samples = manifest.rows_of(table)
        self.sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
        self.checksums: list[int] = table["checksum"].to_pylist()
        reasons = zip(self.samples, table["quarantine"].to_pylist(), strict=True)
        self.quarantined: dict[tuple[str, int], str] = {
            (sample.sample_id, sample.view): reason for sample, reason in reasons if reason is not None
        }
        self.stored_shape: tuple[int, ...] = tuple(array["shape"][1:])
        self.stored_dtype = np.dtype(self.fingerprint.dtype)
        packed = self.stored_dtype == np.int8
        self.shape = (*self.stored_shape[:-1], self.fingerprint.channels)
        self.dtype = np.dtype(np.float16) if packed else self.stored_dtype
        self.sample_bytes = int(np.prod(self.stored_shape)) * self.stored_dtype.itemsize
        self._row = {(sample.sample_id, sample.view): i for i, sample in enumerate(self.samples)}
        self._index: dict[int, list[list[int]]] = {}
        self._files: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._full = False
        self._path = local_path(self.url)
        self._threads = REMOTE_THREADS if self._path is None else LOCAL_THREADS
        self._buffers = Buffers()
        self._start_pool()
        self._cache = SampleCache(cache, self.url, seal) if cache is not None and self._path is None else None

    def __reduce__(self):
        return FeatureStore, (self.url, self.expect, self.verify, self.cache_settings)

    def __len__(self) -> int:
        return len(self.samples)

    def row_numbers(self, sample_ids: Sequence[str], views: Sequence[int]) -> list[int]:
        """Row numbers of samples. Raises StoreError naming the first that the store lacks or has in quarantine."""
        try:
            rows = [self._row[key] for key in zip(sample_ids, views, strict=True)]
        except KeyError as error:
            sample_id, view = error.args[0]
            raise StoreError(
                f"{self.url}: no sample {sample_id!r} view {view} among {len(self)}; "
                "extract with that image and --num-views above it"
            ) from None
        for key in zip(sample_ids, views, strict=True) if self.quarantined else ():
            if key in self.quarantined:
                raise StoreError(f"{self.url}: sample {key[0]!r} has no features: {self.quarantined[key]}")
        return rows

    def rows(self, sample_ids: Sequence[str], views: Sequence[int], **how: Any) -> np.ndarray:
        """Features of samples by their ids and views; `how` as in `read`."""
        return self.read(self.row_numbers(sample_ids, views), **how)

    def read(
        self, rows: Sequence[int], out: np.ndarray | None = None, dtype: np.typing.DTypeLike | None = None
    ) -> np.ndarray:
        """Samples in the order asked for, shape (rows, grid, grid, channels). Raises StoreError on damage.

        `out` is a C-contiguous buffer to fill instead of a new array (page-locked memory, say); its dtype counts.
        Else `dtype`: float16 or float32; by default the stored one, float16 for int8. Without conversion a local store
        reads straight into the result.
        """
        shape = (len(rows), *self.shape)
        if out is None:
            out = self._buffers.empty(shape, self.dtype if dtype is None else dtype)
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
        if self._path is None or self.dtype != self.stored_dtype:
            raise StoreError(f"{self.url}: only local stores of float features can be mapped; use read()")
        if not 0 <= row < len(self):
            raise StoreError(f"{self.url}: no row {row}; the store has {len(self)}")
        shard = row // layout.ROWS_PER_SHARD
        offset, _ = self._span(row)
        mapped = memoryview(self._map(shard))
        end = offset + self.sample_bytes
        if not self._right(row, mapped[offset:end], mapped[end : end + layout.CRC_BYTES]):
            raise self._damaged(row)
        return np.frombuffer(mapped, self.dtype, int(np.prod(self.shape)), offset).reshape(self.shape)

    def _map(self, shard: int) -> mmap.mmap:
        """A shard's file, mapped; it stays so while a view of it lives, even if it is forgotten here."""
        mapped = self._maps.get(shard)
        if mapped is None:
            assert self._path is not None
            with place(self.url, layout.shard_key(shard)):
                try:
                    with open(os.path.join(self._path, layout.shard_key(shard)), "rb") as file:
                        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except FileNotFoundError:
                    raise self._missing(shard) from None
            if len(self._maps) < MAPS_KEPT:
                self._maps[shard] = mapped
        return mapped

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
            files = manifest.read_sealed(self.folder, (layout.ARRAY, layout.MANIFEST))
        except FileNotFoundError:
            try:
                self._expected(read_array(self.url, self.folder.read(layout.ARRAY)))
            except FileNotFoundError:
                raise StoreError(f"{self.url}: expected a feature store, found none; extract it first") from None
            raise StoreError(f"{self.url}: the store is not sealed; run its extraction again to finish it") from None
        array, table = read_array(self.url, files[layout.ARRAY]), manifest.read_table(files[layout.MANIFEST])
        return bytes(files[layout.SEAL]), array, table

    def _expected(self, array: dict[str, Any]) -> Fingerprint:
        """The fingerprint. Raises StoreError if it is not as expected."""
        fingerprint = Fingerprint.of_record(array["attributes"])
        differing = fingerprint.differences(self.expect)
        if differing:
            raise StoreError(
                f"{self.url}: the store was made otherwise ({'; '.join(differing)}); extract it anew elsewhere"
            )
        return fingerprint

    def _start_pool(self) -> None:
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(self._threads)

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
        if self.shape == self.stored_shape and targets[0].dtype == self.stored_dtype:
            stored = targets
        else:
            stored = list(self._buffers.empty((len(rows), *self.stored_shape), self.stored_dtype))
        buffers = [memoryview(sample.reshape(-1).view(np.uint8).data) for sample in stored]
        if self._path is not None:
            self._fill_local(rows, buffers)
        elif self._cache is not None:
            self._fill_cached(rows[0], buffers[0])
        else:
            self._fill_remote(rows, buffers)
        for target, sample in zip(targets, stored, strict=True):
            if target is sample:
                continue
            if self.shape == self.stored_shape:
                target[...] = sample
            else:
                packing.unpack(sample, target)

    def _fill_local(self, rows: list[int], buffers: list[memoryview]) -> None:
        """One call of the system for all neighbours, each into its own memory."""
        shard = rows[0] // layout.ROWS_PER_SHARD
        file = self._files.get(shard)
        if file is None:
            file = self._open_shard(shard)
        crcs = [memoryview(bytearray(layout.CRC_BYTES)) for _ in rows]
        inside = [part for pair in zip(buffers, crcs, strict=True) for part in pair]
        try:
            got = os.preadv(file, inside, self._span(rows[0])[0])
        except OSError as error:
            raise self._failed(shard, error) from None
        finally:
            if self._files.get(shard) != file:
                os.close(file)
        for row, buffer, crc in zip(rows, buffers, crcs, strict=True):
            got -= self.sample_bytes + layout.CRC_BYTES
            if got < 0 or not self._right(row, buffer, crc):
                raise self._damaged(row)

    def _open_shard(self, shard: int) -> int:
        """A shard's file, kept open if few are."""
        assert self._path is not None
        try:
            file = os.open(os.path.join(self._path, layout.shard_key(shard)), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._missing(shard) from None
        except OSError as error:
            raise self._failed(shard, error) from None
        if len(self._files) < FILES_KEPT and self._files.setdefault(shard, file) == file:
            weakref.finalize(self, os.close, file)
        return file

    def _fill_remote(self, rows: list[int], buffers: list[memoryview]) -> None:
        """One request; a sample whose crc32c is wrong is asked for once more, as the wire may be at fault."""
        spans = [self._span(row) for row in rows]
        start = spans[0][0]
        if isinstance(self.folder, ObjectFolder):
            crcs = [memoryview(bytearray(layout.CRC_BYTES)) for _ in rows]
            inside = [part for pair in zip(buffers, crcs, strict=True) for part in pair]
            if self.folder.span_into(layout.shard_key(rows[0] // layout.ROWS_PER_SHARD), start, inside) and all(
                map(self._right, rows, buffers, crcs)
            ):
                return
        chunk = memoryview(self._bytes(rows[0], start, sum(length for _, length in spans)))
        for row, buffer, (offset, length) in zip(rows, buffers, spans, strict=True):
            part = chunk[offset - start : offset - start + length]
            if not self._copy(row, part, buffer):
                if not self._copy(row, memoryview(self._bytes(row, offset, length)), buffer):
                    raise self._damaged(row)

    def _fill_cached(self, row: int, buffer: memoryview) -> None:
        """From the cache, else from the store into both."""
        assert self._cache is not None
        if self._cache.read_into(row, buffer) and self._right(row, buffer):
            return
        self._cache.drop(row)
        self._fill_remote([row], [buffer])
        self._cache.put(row, buffer)

    def _copy(self, row: int, chunk: memoryview, buffer: memoryview) -> bool:
        """Copy a sample that is followed by its crc32c; whether it is whole and right."""
        if len(chunk) != len(buffer) + layout.CRC_BYTES:
            return False
        # NumPy, as it lets other threads run meanwhile.
        np.copyto(np.frombuffer(buffer, np.uint8), np.frombuffer(chunk[: len(buffer)], np.uint8))
        return self._right(row, buffer, chunk[len(buffer) :])

    def _right(self, row: int, sample: memoryview, crc: memoryview | None = None) -> bool:
        """Whether a sample, and Zarr's checksum behind it, are what the manifest lists; true if nothing is checked."""
        if not self.verify:
            return True
        listed = self.checksums[row]
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
            for _ in range(1 if self._path is not None else 2):  # the wire may be at fault
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

    def _failed(self, shard: int, error: OSError) -> StoreFault:
        return StoreFault(f"{self.url}: shard {shard} cannot be read ({error}); see to it and run the command again")

    def _missing(self, shard: int) -> StoreError:
        return StoreError(f"{self.url}: shard {shard} is missing; {self._cure()}")

    def _damaged(self, row: int) -> StoreError:
        shard, slot = divmod(row, layout.ROWS_PER_SHARD)
        return StoreError(
            f"{self.url}: shard {shard}, sample {slot} ({self.samples[row].sample_id}): its checksum is wrong; "
            f"{self._cure()}"
        )

    def _cure(self) -> str:
        return f"the store is damaged: run `python -m feature_store repair {self.url}`, then its extraction"
