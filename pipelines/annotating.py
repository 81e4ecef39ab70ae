"""Picklable Ray Data operators of `annotate`: actors that segment shards of photographs, tasks that write them.

A shard is so many photographs, and the unit of work and of retry: what is there of it is whole. Its marker is written
last.
"""

import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store import FeatureStore, Row
from feature_store.storage import open_folder
from feature_store.urls import redacted
from pipelines import checkpoints
from pipelines.outcome import Outcome
from pipelines.outputs import annotation, parts
from pipelines.stages import Loaded

if TYPE_CHECKING:
    from fsdino.predictor import ClassEncoding

MARKER = ".json"  # part-000042.json says that part-000042.parquet and part-000042.coco.json are whole
MOST_PARTS = 10_000  # annotations of one image whose numbers tell it
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
        ("bbox", pa.list_(pa.float32(), 4)),
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
    gpu: bool
    threads: int
    forward_batch: int


class Annotated(NamedTuple):
    """A shard that is written."""

    shard: int
    images: int
    found: dict[str, int]
    """Photographs in which each class was found."""
    bad: dict[str, str]
    """Photographs that could not be read, and why."""
    seconds: float
    """That the network took."""


class Seen(NamedTuple):
    """A shard that was segmented; its logits (n, classes, m, m) and presence (n, classes) go beside it."""

    loaded: Loaded
    sizes: np.ndarray
    seconds: float


def part_name(shard: int) -> str:
    """What a shard's files are called, without suffix."""
    return f"part-{shard:06d}"


def finished(url: str) -> set[int]:
    """Shards that are written."""
    names = open_folder(url).names("")
    return {int(name[5:-5]) for name in names if name.startswith("part-") and name[5:-5].isdigit()}


def marker(url: str, shard: int) -> Annotated:
    """What a shard's marker says."""
    return Annotated(**json.loads(bytes(open_folder(url).read(part_name(shard) + MARKER))))


class Segment:
    """Actor: encoder, unless features are stored, and segmenter over a shard of photographs."""

    def __init__(self, job: AnnotationJob):
        import torch

        torch.set_num_threads(job.threads)
        self.job = job
        self.predictor: Outcome[Any] = Outcome.of(
            lambda: checkpoints.load_predictor(checkpoints.chosen(job.checkpoint), job.encoder_weights, job.gpu)
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of one loaded shard in; `outcome` (of Seen), `logits` and `presence` out."""
        found: list[tuple[Seen, np.ndarray, np.ndarray]] = []
        outcome = Outcome.of(lambda: found.append(self._segment(batch)))
        if outcome.error is not None:
            nothing = np.zeros((1, 0, 0, 0, 0), np.float16)
            return {"outcome": np.array([outcome], object), "logits": nothing, "presence": nothing[..., 0, 0]}
        seen, logits, presence = found[0]
        return {"outcome": np.array([Outcome(value=seen)], object), "logits": logits[None], "presence": presence[None]}

    def _segment(self, batch: dict[str, np.ndarray]) -> tuple[Seen, np.ndarray, np.ndarray]:
        loaded: Loaded = batch["outcome"][0].get()
        predictor, sizes = self.predictor.get(), batch["sizes"][0]
        started = time.perf_counter()
        if self.job.stores is not None:
            loaded, sizes, features = self._stored(loaded)
        else:
            features = map(predictor.features, _chunks(batch["pixels"][0], self.job.forward_batch))
        predicted = [of for late, embedding in features for of in predictor.find(late, embedding, self.job.classes)]
        logits = np.stack([of.mask_logits[:, 0].half().cpu().numpy() for of in predicted])
        presence = [
            np.full(len(self.job.classes), np.nan, np.float32)
            if of.presence is None
            else of.presence.float().cpu().numpy()
            for of in predicted
        ]
        return Seen(loaded, sizes, time.perf_counter() - started), logits, np.stack(presence)

    def _stored(self, loaded: Loaded) -> tuple[Loaded, np.ndarray, Iterable[tuple[Any, Any]]]:
        """The shard with what its stores know of it, and its features."""
        import torch

        assert self.job.stores is not None
        late, early = self.job.stores
        rows = late.samples.find([row.sample_id for row in loaded.unit.rows], [row.view for row in loaded.unit.rows])
        known = [row for row in rows if row is not None]
        assert len(known) == len(rows)
        quarantined = late.quarantined | early.quarantined
        reasons = {slot: quarantined.get(row[:2]) for slot, row in enumerate(loaded.unit.rows)}
        bad = {slot: reason for slot, reason in reasons.items() if reason is not None}
        predictor = self.predictor.get()

        def tensor(store: FeatureStore, chunk: Sequence[int]) -> Any:
            return torch.from_numpy(np.nan_to_num(store.read(chunk))).movedim(-1, 1).float().to(predictor.device)

        with torch.inference_mode():
            chunks = [known[at : at + self.job.forward_batch] for at in range(0, len(known), self.job.forward_batch)]
            features = [(tensor(late, chunk), predictor.segmenter.embed(tensor(early, chunk))) for chunk in chunks]
        return loaded._replace(bad=bad), late.sizes[known], features


class Write:
    """Task: a shard's masks at their photographs' sizes, as Parquet and as COCO's JSON, then its marker."""

    def __init__(self, job: AnnotationJob):
        self.job = job
        self.names = [one.name for one in job.classes]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of one segmented shard in, its `outcome` (of Annotated) out."""
        return {"outcome": np.array([Outcome.of(lambda: self._write(batch))], object)}

    def _write(self, batch: dict[str, np.ndarray]) -> Annotated:
        seen: Seen = batch["outcome"][0].get()
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
            count = 0
            for category, record in self._of_image(batch["logits"][0][slot], width, height):
                name, presence = self.names[category], float(batch["presence"][0][slot][category])
                rows.append(_row(row, width, height, name, presence, record))
                if record is not None:
                    count += 1
                    ids = {"id": number * MOST_PARTS + count, "image_id": number, "category_id": category + 1}
                    coco["annotations"].append(ids | record)
            for category in {of["category_id"] for of in coco["annotations"][-count:]} if count else ():
                found[self.names[category - 1]] += 1
        done = Annotated(
            unit.shard,
            len(unit.rows) - len(bad),
            found,
            {unit.rows[slot].sample_id: reason for slot, reason in bad.items()},
            round(seen.seconds, 3),
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

        torch.set_num_threads(1)
        for category, small in enumerate(logits):
            tensor = torch.from_numpy(small.astype(np.float32))[None, None]
            large = F.interpolate(tensor, size=(height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
            masks = list(parts(large > 0, self.job.instances))[: MOST_PARTS // len(logits) - 1]
            for place, part in masks:
                yield category, annotation(place, part, large)
            if not masks:
                yield category, None


def _row(
    row: Row, width: int, height: int, name: str, presence: float, record: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A row of SCHEMA."""
    return {
        "image_id": row.sample_id,
        "source": redacted(row.source),
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
