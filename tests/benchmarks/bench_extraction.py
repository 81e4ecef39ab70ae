"""What an extraction costs beyond decoding and the network: against bare loops that write nothing; a Markdown table.

    python -m tests.benchmarks.bench_extraction --data VOCdevkit/VOC2012 --out docs/benchmarks/extraction.md

The bare loop is one process for each actor, with the same number of threads, its network loaded and warm. The job's
rate is taken from its first finished shard to its last, so that the start of its processes is left out; that is
told apart.
"""

import multiprocessing
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from feature_store import Fingerprint, Row, create
from feature_store.layout import num_shards
from fsdino.encoder import build_encoder, to_input
from fsdino.preprocess import read_image, resize_square
from fsdino.specs import encoder_spec
from fsdino.weights import weights_digest
from pipelines import cluster, extraction
from pipelines.networks import EncoderPlan
from pipelines.recipes import RECIPES
from pipelines.stages import Decode, Extract
from tests.benchmarks.provenance import provenance


@dataclass(frozen=True)
class Settings:
    """Benchmark extraction."""

    data: Path
    """Data set in VOC's layout."""
    folder: Path
    """Where the stores go."""
    recipe: str = "offline"
    """Recipe of encoder and actors."""
    images: int = 640
    """Images of the validation list."""
    rounds: int = 3
    """Rounds of each contender."""
    out: Path | None = None
    """Markdown file to write."""


def bare(sources: Sequence[str], recipe: str, threads: int, ready: Any, go: Any) -> None:
    """One process of the bare loop: the same decoding and the same network, nothing written."""
    torch.set_num_threads(threads)
    chosen = RECIPES[recipe]()
    encoder = build_encoder(chosen.backbone.encoder)
    batch = chosen.extraction.forward_batch

    def features(paths: Sequence[str]) -> list[np.ndarray]:
        pixels = np.stack([resize_square(read_image(path), chosen.backbone.res) for path in paths])
        with torch.inference_mode():
            out = encoder(to_input(pixels, encoder.mean, encoder.std))
        return [feature.movedim(1, -1).numpy() for feature in out]

    features(sources[:batch])
    ready.release()
    go.wait()
    for at in range(0, len(sources), batch):
        features(sources[at : at + batch])


def run_bare(sources: Sequence[str], settings: Settings, actors: int, threads: int) -> float:
    """Images a second of the bare loop."""
    spawn = multiprocessing.get_context("spawn")
    ready, go = spawn.Semaphore(0), spawn.Event()
    parts = [sources[n::actors] for n in range(actors)]
    workers = [spawn.Process(target=bare, args=(part, settings.recipe, threads, ready, go)) for part in parts]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    started = time.perf_counter()
    go.set()
    for worker in workers:
        worker.join()
    return len(sources) / (time.perf_counter() - started)


class WriteNothing(Extract):
    """The actor without its writing."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        for writer in self.writers.values():
            writer.write = lambda *_: 0  # type: ignore[method-assign]


def run_job(rows: Sequence[Row], settings: Settings, actor: type) -> tuple[float, float, int]:
    """Images a second from the first finished shard on, seconds until then, and bytes written, of one job."""
    recipe = RECIPES[settings.recipe]()
    backbone, spec = recipe.backbone, encoder_spec(recipe.backbone.encoder)
    digest = weights_digest(backbone.encoder)
    shutil.rmtree(settings.folder, ignore_errors=True)
    targets = []
    for feature, layer in (("early", spec.early), ("late", spec.late)):
        fingerprint = Fingerprint(
            feature=feature,
            model=spec.name,
            weights=digest,
            layer=layer.name,
            norm=layer.norm,
            res_px=backbone.res,
            grid=spec.grid(backbone.res),
            channels=layer.channels,
            view_seed=0,
            preprocessing="benchmark",
        )
        targets.append(extraction.Target(str(settings.folder / feature), fingerprint, rows))
    builds = {target.url: create(target.url, target.fingerprint, rows).build_id for target in targets}
    items = extraction.plan_items(targets, {target.url: range(num_shards(len(rows))) for target in targets}, stamps={})
    kept, extraction.Extract = extraction.Extract, actor  # type: ignore[misc]
    started, times, images, written = time.perf_counter(), [], [], 0
    try:
        network = EncoderPlan(backbone, digest)
        for unit in extraction.run_units(network, Decode(0, "fail"), builds, items, recipe.extraction):
            times.append(time.perf_counter())
            images.append(unit.images)
            written += unit.bytes
    finally:
        extraction.Extract = kept  # type: ignore[misc]
    return sum(images[1:]) / (times[-1] - times[0]), times[0] - started, written


def main(settings: Settings) -> None:
    """All contenders in turn, in every round."""
    recipe = RECIPES[settings.recipe]()
    actors, threads = recipe.extraction.actors, max(1, int(recipe.extraction.actor_cpus))
    sources = [str(p) for p in sorted((settings.data / "JPEGImages").glob("*.jpg"))[: settings.images]]
    rows = [Row(Path(source).stem, 0, source) for source in sources]
    cluster.connect({"CPU": actors * recipe.extraction.actor_cpus}, f"{actors} actors", "name another recipe")
    rates: dict[str, list[float]] = {"bare loop": [], "extraction": [], "extraction that writes nothing": []}
    starts, written = [], 0
    for _ in range(settings.rounds):
        rates["bare loop"].append(run_bare(sources, settings, actors, threads))
        rate, start, written = run_job(rows, settings, Extract)
        rates["extraction"].append(rate)
        starts.append(start)
        rates["extraction that writes nothing"].append(run_job(rows, settings, WriteNothing)[0])
    lines = [
        "# Extraction",
        "",
        f"{provenance('python -m tests.benchmarks.bench_extraction')}: recipe `{settings.recipe}`,",
        f"{settings.images} images, {settings.rounds} rounds, {actors} actors of {threads} thread.",
        "",
        "| | images/s, each round | time over the bare loop's, median of rounds |",
        "|---|---|---|",
    ]
    for name, values in rates.items():
        ratio = statistics.median(base / rate for base, rate in zip(rates["bare loop"], values, strict=True))
        lines.append(f"| {name} | {', '.join(f'{v:.2f}' for v in values)} | {ratio:.3f} |")
    lines += [
        "",
        f"Until the first shard was finished: {statistics.median(starts):.0f} s. Written: {written / 1e9:.2f} GB.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if settings.out:
        settings.out.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Settings))
