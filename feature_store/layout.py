"""Which row lies in which shard and where in it: pure arithmetic, no I/O.

A store is one Zarr v3 array (sample, grid, grid, channels), a chunk to a sample and 32 samples to a shard. Beside the
array lie `rows.parquet` (the plan, written first), `markers/` (one per finished shard), `manifest.parquet` and, last,
`seal.json`.
"""

from collections.abc import Iterable, Sequence

import awscrt.checksums
import numpy as np

ROWS_PER_SHARD = 32
ARRAY = "zarr.json"
PLAN = "rows.parquet"
MANIFEST = "manifest.parquet"
SEAL = "seal.json"
LOCK = "lock.json"
MISSING = np.iinfo(np.uint64).max
CRC_BYTES = 4
INDEX_BYTES = ROWS_PER_SHARD * 16 + CRC_BYTES
"""Length of the index at a shard's end: offset and length of each chunk as uint64, then a crc32c."""


def crc32c(data, start: int = 0) -> int:
    """The crc32c of contiguous bytes of any buffer; `start` is that of the bytes before them."""
    return awscrt.checksums.crc32c(data, start)


def crc_bytes(data) -> bytes:
    """The crc32c as Zarr's codec appends it: four bytes, little end first."""
    return crc32c(data).to_bytes(CRC_BYTES, "little")


def num_shards(num_rows: int) -> int:
    """Shards that hold `num_rows` rows; the last may be part full."""
    return -(-num_rows // ROWS_PER_SHARD)


def shard_rows(shard: int, num_rows: int) -> range:
    """The rows of a shard."""
    return range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, num_rows))


def shard_key(shard: int) -> str:
    """Zarr v3's default key of a shard of a four-axis array that is split along the first axis only."""
    return f"c/{shard}/0/0/0"


def marker_key(shard: int, build: str) -> str:
    """The file that says a shard is done, by its build id."""
    return f"markers/{shard:06d}.{build}.json"


def shard_parts(samples: Sequence[memoryview]) -> list[bytes | memoryview]:
    """A shard's bytes, in parts: each sample and its crc32c, one after another, then the index. Zarr's own layout."""
    parts: list[bytes | memoryview] = []
    index = np.full((ROWS_PER_SHARD, 2), MISSING, "<u8")
    offset = 0
    for slot, sample in enumerate(samples):
        parts += [sample, crc_bytes(sample)]
        length = sample.nbytes + CRC_BYTES
        index[slot] = offset, length
        offset += length
    table = index.tobytes()
    return [*parts, table, crc_bytes(table)]


def read_index(raw: bytes | memoryview) -> np.ndarray | None:
    """Offset and length of each slot, (32, 2), from a shard's last INDEX_BYTES; None if they are damaged."""
    if len(raw) != INDEX_BYTES or crc_bytes(raw[:-CRC_BYTES]) != bytes(raw[-CRC_BYTES:]):
        return None
    return np.frombuffer(raw[:-CRC_BYTES], "<u8").reshape(ROWS_PER_SHARD, 2)


def runs(spans: Iterable[tuple[int, int]], limit: int) -> list[list[int]]:
    """Positions in `spans` (offset, length; sorted by offset) grouped so that each group is one gapless range.

    A group is at most `limit` bytes long, or one span.
    """
    groups: list[list[int]] = []
    start = end = -1
    for position, (offset, length) in enumerate(spans):
        if groups and offset == end and offset + length - start <= limit:
            groups[-1].append(position)
        else:
            groups.append([position])
            start = offset
        end = offset + length
    return groups
