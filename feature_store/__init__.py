"""Features of images, computed once, kept in sharded Zarr v3 arrays that any Zarr reader can open.

writer = create(url, fingerprint, rows)   # once, by the driver
writer.write(shard, features, sizes)      # by any process, one shard each
writer.seal()                             # all shards there: manifest and seal, then readable
store = FeatureStore(url, expect={"feature": "late"})
store.rows(["2007_000033"], [0])          # (1, grid, grid, channels)
"""

from feature_store.cache import CacheSettings
from feature_store.errors import DamagedFile, StoreError, StoreFault
from feature_store.reader import FeatureStore
from feature_store.schema import Fingerprint, Row
from feature_store.writer import ShardWriter, create, extend

__all__ = [
    "CacheSettings",
    "DamagedFile",
    "FeatureStore",
    "Fingerprint",
    "Row",
    "ShardWriter",
    "StoreError",
    "StoreFault",
    "create",
    "extend",
]
