"""Look at feature stores.

    python -m feature_store ls outputs/stores
    python -m feature_store stats outputs/stores/pascal-5i/late@400
    python -m feature_store verify s3://features/pascal-5i/late@518

The last line of stdout is JSON. Exit codes: 0 all well, 1 `verify` found damage, 2 no such store.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import google_crc32c
import numpy as np
import tyro
from tqdm import tqdm

from feature_store import files, layout
from feature_store.errors import StoreError
from feature_store.reader import FeatureStore
from feature_store.writer import ShardWriter


def ls(root: tyro.conf.Positional[str]) -> dict[str, Any]:
    """List the stores below a path or URL: samples, shards done, bytes, what made them, and whether they are sealed."""
    fs, path = fsspec.url_to_fs(files.absolute(root))
    stores = []
    for found in sorted(fs.glob(f"{path}/**/zarr.json")):
        url = fs.unstrip_protocol(found.removesuffix("/zarr.json")).removeprefix("file://")
        writer = ShardWriter(url)
        shards = layout.num_shards(len(writer.rows))
        entry = {
            "url": url,
            "samples": len(writer.rows),
            "shards": shards,
            "done": shards - len(writer.missing()),
            "bytes": int(np.prod(writer.array.shape)) * writer.array.dtype.itemsize,
            "model": writer.fingerprint.model,
            "sealed": files.exists(url, layout.MANIFEST),
        }
        state = "sealed" if entry["sealed"] else f"{entry['done']} of {shards} shards"
        print(f"{url}  {entry['samples']} samples  {entry['bytes'] / 1e9:.2f} GB  {entry['model']}  {state}")
        stores.append(entry)
    return {"stores": stores}


def stats(url: tyro.conf.Positional[str]) -> dict[str, Any]:
    """Count samples, bytes and values of a store: range, mean, deviation, NaN, and channels that never vary."""
    store = FeatureStore(url)
    low, high = np.full(store.shape[-1], np.inf), np.full(store.shape[-1], -np.inf)
    total, squares, nans = 0.0, 0.0, 0
    for rows in tqdm(_shards(store), unit="shard", file=sys.stderr):
        values = store.read(rows).astype(np.float64).reshape(-1, store.shape[-1])
        nans += int(np.isnan(values).sum())
        low, high = np.fmin(low, np.fmin.reduce(values)), np.fmax(high, np.fmax.reduce(values))
        total, squares = total + np.nansum(values), squares + np.nansum(values**2)
    count = len(store) * int(np.prod(store.shape))
    mean = total / max(count - nans, 1)
    return {
        "url": store.url,
        "samples": len(store),
        "bytes": count * store.dtype.itemsize,
        "min": float(low.min()),
        "max": float(high.max()),
        "mean": mean,
        "std": float(np.sqrt(max(squares / max(count - nans, 1) - mean**2, 0))),
        "nan": nans,
        "dead_channels": np.flatnonzero(low == high).tolist(),
    }


def verify(url: tyro.conf.Positional[str]) -> dict[str, Any]:
    """Read every sample and check it against its shard's checksum and the manifest's."""
    store = FeatureStore(url)

    def damage(row: int) -> str | None:
        try:
            (sample,) = store.read([row])
        except StoreError as error:
            return str(error)
        if google_crc32c.value(sample.tobytes()) != store.checksums[row]:
            return f"{store.url}: row {row} ({store.samples[row].sample_id}) is not the one that the manifest lists"
        return None

    with ThreadPoolExecutor() as pool:
        checked = tqdm(pool.map(damage, range(len(store))), total=len(store), unit="sample", file=sys.stderr)
        damaged = [message for message in checked if message]
    for message in damaged:
        print(message)
    return {"url": store.url, "samples": len(store), "damaged": len(damaged)}


def _shards(store: FeatureStore) -> list[range]:
    return [layout.shard_rows(shard, len(store)) for shard in range(layout.num_shards(len(store)))]


def main() -> None:
    """Run one of the commands."""
    try:
        result = tyro.extras.subcommand_cli_from_dict({"ls": ls, "stats": stats, "verify": verify})
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result))
    sys.exit(1 if result.get("damaged") else 0)


if __name__ == "__main__":
    main()
