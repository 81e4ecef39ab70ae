"""Inspect, verify, repair and copy feature stores.

    python -m feature_store ls outputs/stores
    python -m feature_store stats outputs/stores/pascal-5i/tf_efficientnet_lite0/late@400
    python -m feature_store verify s3://features/pascal-5i/dinov2_vitb14/late@518
    python -m feature_store repair s3://features/pascal-5i/dinov2_vitb14/late@518
    python -m feature_store copy s3://features/pascal-5i/dinov2_vitb14/late@518 /scratch/late@518
    python -m feature_store diff s3://features/pascal-5i/dinov2_vitb14/late@518 /scratch/late@518
    python -m feature_store gc outputs/stores --delete
    python -m feature_store warm s3://features/pascal-5i/dinov2_vitb14/late@518 --cache /scratch/cache --cache-gb 200

The last line of stdout is JSON. Exit codes: 0 all well, 1 damage (`verify`), a difference (`diff`) or a place that
failed, 2 wrong usage or no such store.
"""

import json
import sys
from typing import Any

import tyro

from feature_store import tools
from feature_store.cache import CacheSettings
from feature_store.errors import OtherArray, StoreError, StoreFault
from feature_store.reader import FeatureStore
from feature_store.urls import redacted_text

Url = tyro.conf.Positional[str]


def ls(root: Url) -> dict[str, Any]:
    """List the stores below a path or URL: samples, bytes, what made them, and how far they have come.

    Exits with 1 if one of them cannot be described.
    """
    stores, failed = [], []
    for url in tools.find(root):
        try:
            stores.append(tools.describe(url))
        except OtherArray as error:
            print(error)
        except StoreError as error:
            print(error)
            failed.append(url)
    for s in stores:
        state = "sealed" if s["sealed"] else f"{s['done']} of {s['shards']} shards"
        print(f"{s['url']}  {s['samples']} samples  {s['bytes'] / 1e9:.2f} GB {s['dtype']}  {s['model']}  {state}")
    return {"stores": stores, "failed": failed}


def stats(url: Url) -> dict[str, Any]:
    """Count samples, bytes and values of a store: range, mean, deviation, NaN, and channels that never vary."""
    return tools.statistics(url)


def verify(url: Url) -> dict[str, Any]:
    """Check every byte against its checksums: seal, manifest, markers, shards. Exits with 1 if anything is damaged."""
    summary, damages = tools.verify(url)
    for damage in damages:
        print(damage.message)
    return {
        **summary,
        "damaged": len(damages),
        "shards_damaged": sorted({d.shard for d in damages if d.shard is not None}),
    }


def repair(url: Url, quarantined: bool = False) -> dict[str, Any]:
    """Mark damaged shards as missing, so that a rerun of the store's extraction computes them, and only them.

    Args:
        url: The store.
        quarantined: Also shards with quarantined images, to read those again.
    """
    return tools.repair(url, quarantined)


def copy(source: Url, destination: Url) -> dict[str, Any]:
    """Copy a sealed store to another path or URL, checked; rerun to resume."""
    return tools.copy(source, destination)


def diff(first: Url, second: Url) -> dict[str, Any]:
    """Compare two stores: fingerprints, samples, largest difference of a value. Exits with 1 unless they are equal."""
    return tools.difference(first, second)


def gc(root: Url, delete: bool = False, older_than_hours: float = 1) -> dict[str, Any]:
    """List what killed jobs left behind below a path or URL.

    Args:
        root: One store, or any folder above stores.
        delete: Remove it, instead of only listing it.
        older_than_hours: Leave alone what is younger.
    """
    result = tools.garbage(root, delete, older_than_hours)
    for name in [*result["files"], *result["uploads"], *result["left_alone"]]:
        print(name)
    return result


def warm(url: Url, cache: str, cache_gb: float = 100) -> dict[str, Any]:
    """Fill the local cache of a remote store before training.

    Args:
        url: The store.
        cache: Folder of the cache, as given to training.
        cache_gb: Its largest size in GB (10^9 bytes), over all stores.
    """
    return tools.warm(FeatureStore(url, cache=CacheSettings(cache, int(cache_gb * 1e9))))


COMMANDS = {f.__name__: f for f in (ls, stats, verify, repair, copy, diff, gc, warm)}


def main() -> None:
    """Run one of the commands."""
    try:
        result = tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__)
    except StoreError as error:
        print(f"error: {redacted_text(str(error))}", file=sys.stderr)
        sys.exit(1 if isinstance(error, StoreFault) else 2)
    print(json.dumps(result))
    bad = (sys.argv[1] == "verify" and result["damaged"]) or result.get("equal") is False or result.get("failed")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
