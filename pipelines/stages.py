"""Picklable Ray operators of the extraction jobs, and the job they share: one row in is one shard out.

A shard is the unit of work and of retry: a task decodes its images, an actor computes and writes them whole. So a
killed task or actor leaves either a finished shard or none, and a new run does only what is missing.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy
from torch import Tensor
from tqdm import tqdm

from feature_store import FeatureStore, Fingerprint, Row, ShardWriter, create
from feature_store.layout import num_shards, shard_rows
from fsdino.data.views import draw_view
from fsdino.data.voc import VocDataset
from fsdino.preprocess import read_image, resize_square, to_input
from pipelines import tracking
from pipelines.recipes import Encoding, Extraction, Places

Network = Callable[[Tensor], Sequence[Tensor]]
"""A normalised batch (or stored features) in, one `b c g g` tensor for each store out."""


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray for this process."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
        logging.getLogger("ray.data").setLevel(logging.WARNING)


def store_url(root: str, dataset: str, feature: str, res_px: int) -> str:
    """Where a data set's feature at a resolution is kept."""
    return f"{root.rstrip('/')}/{dataset}/{feature}@{res_px}"


def open_store(places: Places, dataset: str, feature: str, encoding: Encoding, **more: Any) -> FeatureStore:
    """The store of a feature of the encoder at the resolution of `encoding`, checked for being that."""
    expect = {"feature": feature, "model": encoding.encoder, "res_px": encoding.res, "view_seed": encoding.view_seed}
    return FeatureStore(store_url(places.store, dataset, feature, encoding.res), expect | more)


def plan_rows(dataset: VocDataset, splits: Sequence[str], num_views: int) -> list[Row]:
    """Every image of the splits under view 0, training images under the augmented views too."""
    rows: dict[tuple[str, int], Row] = {}
    for split in splits:
        views = range(num_views if split == "train" else 1)
        for image_id in dataset.ids(split):  # type: ignore[arg-type]
            source = str(dataset.image_path(image_id))
            rows |= {(image_id, view): Row(image_id, view, source) for view in views}
    return list(rows.values())


class DecodeShard:
    """Task: the pixels of a shard's images under their views, square, and the originals' sizes."""

    def __init__(self, res_px: int, view_seed: int):
        self.res_px, self.view_seed = res_px, view_seed

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """`shard`, and its rows' `sample_id`, `view` and `source` in; `pixels` (n, r, r, 3) and `sizes` (n, 2) out."""
        rows = [Row(*values) for values in zip(item["sample_id"], item["view"], item["source"], strict=True)]
        pixels = np.empty((len(rows), self.res_px, self.res_px, 3), np.uint8)
        sizes = np.empty((len(rows), 2), np.int32)
        for i, row in enumerate(rows):
            image = read_image(row.source)
            sizes[i] = image.size
            pixels[i] = resize_square(draw_view(self.view_seed, row.sample_id, int(row.view)).image(image), self.res_px)
        return {"shard": item["shard"], "pixels": pixels, "sizes": sizes}


class ReadShard:
    """Task: the stored features of a shard, in the place of pixels."""

    def __init__(self, url: str):
        self.url = url

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """As DecodeShard, `pixels` (n, g, g, c) being features; `sizes` as the store's manifest has them."""
        store = FeatureStore(self.url)
        rows = store.rows(item["sample_id"], item["view"])
        return {"shard": item["shard"], "pixels": store.read(rows), "sizes": np.array([store.sizes[r] for r in rows])}


class ComputeShard:
    """Actor: the network over a shard, then the shard and its marker into every store."""

    def __init__(self, build: Callable[[], Network], urls: Sequence[str], settings: Extraction):
        torch.set_num_threads(max(1, int(settings.actor_cpus)))
        self.device = torch.device("cuda" if settings.actor_gpus else "cpu")
        self.network = build()
        if isinstance(self.network, torch.nn.Module):
            self.network.to(self.device)
        self.writers = [ShardWriter(url) for url in urls]
        self.settings = settings

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of one row; returns its shard, images and bytes written."""
        shard, pixels, sizes = int(batch["shard"][0]), batch["pixels"][0], batch["sizes"][0]
        outputs: list[list[np.ndarray]] = [[] for _ in self.writers]
        for start in range(0, len(pixels), self.settings.forward_batch):
            features = self._forward(pixels[start : start + self.settings.forward_batch])
            for kept, feature in zip(outputs, features, strict=True):
                kept.append(feature.float().movedim(1, -1).cpu().numpy())
        sized = [(int(w), int(h)) for w, h in sizes]
        written = sum(
            writer.write(shard, np.concatenate(kept), sized)
            for writer, kept in zip(self.writers, outputs, strict=True)
            if not writer.has(shard)  # another store of the same job may lack it
        )
        return {"shard": np.array([shard]), "images": np.array([len(pixels)]), "bytes": np.array([written])}

    @torch.inference_mode()
    def _forward(self, pixels: np.ndarray) -> Sequence[Tensor]:
        if pixels.dtype == np.uint8:
            x = to_input(pixels, self.network.mean, self.network.std)  # type: ignore[attr-defined]
        else:
            x = torch.from_numpy(np.array(pixels)).movedim(-1, 1).float()
        half = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            features = self.network(x.to(self.device))
        return (features,) if isinstance(features, Tensor) else features


def extract(
    build: Callable[[], Network],
    read: Callable[[dict[str, Any]], dict[str, Any]],
    targets: dict[str, Fingerprint],
    rows: Sequence[Row],
    settings: Extraction,
    tracking_uri: str,
) -> dict[str, Any]:
    """Fill the stores `targets` (URL to fingerprint, in the order of the network's outputs) and seal them.

    Prints the plan, shows progress, does only the shards that some store lacks. Returns counts for the summary; a run
    that computed anything is also in MLflow's experiment `extract`.
    """
    started = time.perf_counter()
    writers = [create(url, fingerprint, rows) for url, fingerprint in targets.items()]
    missing = sorted({shard for writer in writers for shard in writer.missing()})
    todo = sum(len(shard_rows(shard, len(rows))) for shard in missing)
    total = num_shards(len(rows))
    for url, writer in zip(targets, writers, strict=True):
        size = writer.array.dtype.itemsize * int(np.prod(writer.array.shape))
        print(f"{url}: {len(rows)} samples, {size / 1e9:.2f} GB", file=sys.stderr)
    print(f"{total - len(missing)} of {total} shards done, {todo} samples to compute", file=sys.stderr)
    written = 0
    if not missing:
        for writer in writers:
            writer.seal()
        return {"stores": list(targets), "samples": len(rows), "computed": 0, "bytes": 0, "seconds": 0.0}
    tags = {f"store.{mark.feature}": str(asdict(mark)) for mark in targets.values()}
    name = "+".join(f"{mark.feature}@{mark.res_px}" for mark in targets.values())
    with tracking.running(tracking_uri, "extract", name, asdict(settings) | {"samples": len(rows)}, tags) as run:
        connect()
        ray.data.DataContext.get_current().enable_progress_bars = False
        items = ray.data.from_items([_item(shard, rows) for shard in missing], override_num_blocks=len(missing))
        done = items.map(read, num_cpus=settings.actor_cpus).map_batches(
            ComputeShard,
            batch_size=1,
            compute=ActorPoolStrategy(size=settings.actors),
            num_cpus=settings.actor_cpus,
            num_gpus=settings.actor_gpus,
            fn_constructor_args=(build, list(targets), settings),
        )
        with tqdm(total=todo, unit="img", desc="extracting", mininterval=1) as bar:
            for row in done.iter_rows():
                bar.update(int(row["images"]))
                written += int(row["bytes"])
        for writer in writers:
            writer.seal()
        seconds = round(time.perf_counter() - started, 1)
        run.log(0, computed=todo, bytes=written, seconds=seconds)
    return {"stores": list(targets), "samples": len(rows), "computed": todo, "bytes": written, "seconds": seconds}


def _item(shard: int, rows: Sequence[Row]) -> dict[str, Any]:
    wanted = [rows[r] for r in shard_rows(shard, len(rows))]
    return {
        "shard": shard,
        "sample_id": [row.sample_id for row in wanted],
        "view": [row.view for row in wanted],
        "source": [row.source for row in wanted],
    }
