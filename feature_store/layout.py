"""Which row lies in which shard and where in it: pure arithmetic, no I/O.

A store is one Zarr v3 array (sample, grid, grid, channels), a chunk to a sample and 32 samples to a shard. Beside the
array lie `rows.parquet` (the plan, written first), `markers/` (one per finished shard) and `manifest.parquet` (last).
"""

import numpy as np

ROWS_PER_SHARD = 32
PLAN = "rows.parquet"
MANIFEST = "manifest.parquet"
MISSING = np.iinfo(np.uint64).max
CRC_BYTES = 4


def num_shards(num_rows: int) -> int:
    """Shards that hold `num_rows` rows; the last may be part full."""
    return -(-num_rows // ROWS_PER_SHARD)


def shard_rows(shard: int, num_rows: int) -> range:
    """The rows of a shard."""
    return range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, num_rows))


def shard_key(shard: int) -> str:
    """Zarr v3's default key of a shard of a four-axis array that is split along the first axis only."""
    return f"c/{shard}/0/0/0"


def marker_key(shard: int) -> str:
    """The file that says a shard is done."""
    return f"markers/{shard:06d}.json"


def index_bytes() -> int:
    """Length of a shard's index at its end: offset and length of each chunk as uint64, then a crc32c."""
    return ROWS_PER_SHARD * 16 + CRC_BYTES
