"""Picklable Ray Data operators of `annotate`: actors that segment shards of photographs, tasks that write them.

A shard is so many photographs, and the unit of work and of retry. Its marker is written last, so that a shard with a
marker is whole.
"""

import io
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store import FeatureStore, Row
from feature_store.schema import text
from feature_store.storage import open_folder
from feature_store.urls import redacted
from pipelines import checkpoints, cluster, heap
from pipelines.outcome import Outcome
from pipelines.outputs import coco_record, parts
from pipelines.stages import Loaded, known_rows
from pipelines.stored import channels_first

if TYPE_CHECKING:
    from fsdino.predictor import ClassEncoding

MARKER = ".json"  # part-000042.json says that part-000042.parquet and part-000042.coco.json are whole
MOST_PARTS = 10_000  # of one image; an annotation's id is MOST_PARTS times the image's, and its number there
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("class", pa.string()),
        ("presence", pa.float32()),
        ("score", pa.float32()),
        ("area", pa.int64()),
        ("bbox", pa.list_(pa.float32())),  # of a fixed length its nulls could not be read back
        ("rle", pa.string()),
    ]
)
"""A row for each class of each photograph (for each part, of `instances`), also where nothing was found: then area 0
and no run lengths. `presence`: probability that the photograph shows the class; `score`: mean probability over the
mask; `bbox`: x, y, width, height in pixels; `rle`: COCO's compressed column-major run lengths."""


@dataclass(frozen=True)
class AnnotationJob:
    """All that actors and tasks need, checked and opened by the driver."""

    checkpoint: str | None
    """None: the one that comes with the project, wherever a node has it."""
    encoder_weights: str | None
    classes: "tuple[ClassEncoding, ...]"
    out: str
    """URL of the folder for the shards."""
    shard_images: int
    instances: bool
    stores: tuple[FeatureStore, FeatureStore] | None
    """Late and early features, instead of pixels."""
    digests: tuple[str, ...]
    """Of each shard's photographs."""
    gpu: bool
    threads: int
    forward_batch: int
    precision: str
    """Of the encoder's pass."""
    compile: bool


class WrittenShard(NamedTuple):
    """A shard that is written."""

    shard: int
    images: int
    found: dict[str, int]
    """Photographs in which each class was found."""
    bad: dict[str, str]
    """Photographs that could not be read, and why."""
    seconds: float
    """That reading stored features and the networks took."""
    photographs: str
    """Digest of what it is of."""


class SegmentedShard(NamedTuple):
    """A shard that was segmented; its logits (n, classes, m, m) and presence (n, classes) go beside it."""

    loaded: Loaded
    sizes: np.ndarray
    seconds: float


def part_name(shard: int) -> str:
    """What a shard's files are called, without suffix."""
    return f"part-{shard:06d}"


def files(shard: int) -> tuple[str, ...]:
    """The files of a shard, its marker first."""
    return tuple(part_name(shard) + suffix for suffix in (MARKER, ".parquet", ".coco.json"))


def finished(url: str) -> set[int]:
    """Shards that are written."""
    names = open_folder(url).names("")
    return {int(name[5:-5]) for name in names if name.startswith("part-") and name[5:-5].isdigit()}


def marker(url: str, shard: int) -> WrittenShard | None:
    """What a shard's marker says; None if it is damaged."""
    try:
        return WrittenShard(**json.loads(bytes(open_folder(url).read(part_name(shard) + MARKER))))
    except (ValueError, TypeError):
        return None


class Segment:
    """Actor: encoder, unless features are stored, and segmenter over a shard of photographs."""

    def __init__(self, job: AnnotationJob):
        import torch

        torch.set_num_threads(job.threads)
        heap.keep_freed_memory()
        self.job = job
        self.predictor: Outcome[Any] = Outcome.of(
            lambda: checkpoints.load_predictor(checkpoints.chosen(job.checkpoint), job.encoder_weights, job.gpu)
        )
        if job.compile and self.predictor.error is None:
            self.predictor.get().encoder.compile()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of one loaded shard in; `outcome` (of SegmentedShard), `logits` and `presence` out."""
        found: list[tuple[SegmentedShard, np.ndarray, np.ndarray]] = []
        outcome = Outcome.of(lambda: found.append(self._segment(batch)))
        if outcome.error is not None:
            nothing: dict[str, np.ndarray] = {
                "logits": np.zeros((1, 1, 1, 1, 1), np.float16),
                "presence": np.zeros((1, 1, 1), np.float32),
            }
            return {"outcome": np.array([outcome], object), **nothing}
        seen, logits, presence = found[0]
        return {"outcome": np.array([Outcome(value=seen)], object), "logits": logits[None], "presence": presence[None]}

    def _segment(self, batch: dict[str, np.ndarray]) -> tuple[SegmentedShard, np.ndarray, np.ndarray]:
        loaded: Loaded = batch["outcome"][0].get()
        predictor, sizes = self.predictor.get(), batch["sizes"][0]
        started = time.perf_counter()
        if self.job.stores is None:
            features = map(self._encoded, _chunks(batch["pixels"][0], self.job.forward_batch))
        else:
            rows, bad = known_rows(loaded.unit.rows, *self.job.stores)
            loaded, sizes = loaded._replace(bad=bad), self.job.stores[0].sizes[rows]
            features = map(self._stored, _chunks(np.array(rows), self.job.forward_batch))
        logits, presence = [], []
        for late, embedding in features:
            for of_image in predictor.find(late, embedding, self.job.classes):
                logits.append(of_image.mask_logits[:, 0].half().cpu().numpy())
                nothing = np.full(len(self.job.classes), np.nan, np.float32)
                presence.append(nothing if of_image.presence is None else of_image.presence.float().cpu().numpy())
        seconds = time.perf_counter() - started
        return SegmentedShard(loaded, sizes, seconds), np.stack(logits), np.stack(presence)

    def _encoded(self, pixels: np.ndarray) -> tuple[Any, Any]:
        """Late features and embedding of photographs."""
        predictor = self.predictor.get()
        with cluster.autocast(self.job.precision, predictor.device):
            return predictor.features(pixels)

    def _stored(self, rows: np.ndarray) -> tuple[Any, Any]:
        """The same, from the stores."""
        import torch

        assert self.job.stores is not None
        predictor = self.predictor.get()
        with torch.inference_mode():
            late, early = (channels_first(store, rows.tolist(), predictor.device) for store in self.job.stores)
            return late, predictor.segmenter.embed(early)


class Write:
    """Task: a shard's masks at their photographs' sizes, as Parquet and as COCO's JSON, then its marker."""

    def __init__(self, job: AnnotationJob):
        self.job = job
        self.names = [one.name for one in job.classes]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of one segmented shard in, its `outcome` (of WrittenShard) out."""
        return {"outcome": np.array([Outcome.of(lambda: self._write(batch))], object)}

    def _write(self, batch: dict[str, np.ndarray]) -> WrittenShard:
        import torch

        torch.set_num_threads(1)
        seen: SegmentedShard = batch["outcome"][0].get()
        unit, bad = seen.loaded.unit, seen.loaded.bad
        rows: list[dict[str, Any]] = []
        categories = [{"id": number, "name": name} for number, name in enumerate(self.names, start=1)]
        coco: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}
        found = dict.fromkeys(self.names, 0)
        for slot, row in enumerate(unit.rows):
            if slot in bad:
                continue
            number = unit.shard * self.job.shard_images + slot + 1
            width, height = (int(side) for side in seen.sizes[slot])
            image = {"id": number, "file_name": row.sample_id, "width": width, "height": height}
            coco["images"].append(image)
            count, hits = 0, set[str]()
            for category, record in self._of_image(batch["logits"][0][slot], width, height):
                name, presence = self.names[category], float(batch["presence"][0][slot][category])
                rows.append(_row(row, width, height, name, presence, record))
                if record is not None:
                    count += 1
                    hits.add(name)
                    ids = {"id": number * MOST_PARTS + count, "image_id": number, "category_id": category + 1}
                    coco["annotations"].append(ids | record)
            found = {name: times + (name in hits) for name, times in found.items()}
        done = WrittenShard(
            unit.shard,
            len(unit.rows) - len(bad),
            found,
            {unit.rows[slot].sample_id: reason for slot, reason in bad.items()},
            round(seen.seconds, 3),
            self.job.digests[unit.shard],
        )
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer)
        folder, part = open_folder(self.job.out), part_name(unit.shard)
        folder.write(f"{part}.parquet", [buffer.getvalue()])
        folder.write(f"{part}.coco.json", [json.dumps(coco).encode()])
        folder.write(f"{part}{MARKER}", [json.dumps(done._asdict()).encode()])
        return done

    def _of_image(self, logits: np.ndarray, width: int, height: int) -> Iterable[tuple[int, dict[str, Any] | None]]:
        """Number of the class and what was found of it, class after class, at the photograph's size."""
        import torch
        import torch.nn.functional as F

        for category, small in enumerate(logits):
            tensor = torch.from_numpy(small.astype(np.float32))[None, None]
            large = F.interpolate(tensor, size=(height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
            masks = list(parts(large > 0, self.job.instances))[: MOST_PARTS // len(logits) - 1]
            for place, part in masks:
                yield category, coco_record(place, part, large)
            if not masks:
                yield category, None


def _row(
    row: Row, width: int, height: int, name: str, presence: float, record: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A row of SCHEMA."""
    return {
        "image_id": row.sample_id,
        "source": text(redacted(row.source)),
        "width": width,
        "height": height,
        "class": name,
        "presence": None if np.isnan(presence) else presence,
        "score": None if record is None else record["score"],
        "area": 0 if record is None else record["area"],
        "bbox": None if record is None else record["bbox"],
        "rle": None if record is None else record["segmentation"]["counts"],
    }


def _chunks(pixels: np.ndarray, size: int) -> Iterable[np.ndarray]:
    return (pixels[at : at + size] for at in range(0, len(pixels), size))
