"""Steps of episodic training: fed by the loader against a batch that is held, and against recomputing the features.

    python -m tests.benchmarks.bench_training --data VOCdevkit/VOC2012 --store outputs/stores --runs outputs/runs \
        --folder /scratch/bench --out docs/benchmarks/training.md

The first tables take a recipe's own stores, the others the paper's sizes with random weights and features. A ratio is
the median of the rounds' own. Needs the extras `dev` and `bench`, and 6 GB in the folder, as bench_store does.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import obstore
import psutil
import ray
import timm
import torch
import tyro

from feature_store import FeatureStore, Row, create
from feature_store.layout import CRC_BYTES, shard_key, shard_rows
from fsdino import paper
from fsdino.data import shapes
from fsdino.encoder import DinoV2Encoder
from fsdino.episodic import EpisodeBatch, EpisodeLoss
from fsdino.segmenter import Segmenter
from fsdino.specs import DINOV2
from pipelines import (
    bake_embeddings,
    distill,
    episodic_loop,
    extract_features,
    extract_teacher,
    heap,
    train_episodic,
    training,
)
from pipelines.cli import call, parse
from pipelines.feeding import Feed
from pipelines.loading import EpisodeLoader, ahead
from pipelines.recipes import Workers
from tests.benchmarks import bench_store
from tests.benchmarks.bench_networks import episodes, segmenter
from tests.benchmarks.provenance import provenance
from tests.servers import aws, environment, range_server

STEP_S = 0.005
"""A step of a fast accelerator at the paper's sizes."""


@dataclass(frozen=True)
class Settings:
    """Benchmark training steps."""

    data: Path
    """PASCAL VOC."""
    store: Path
    """Root of its stores."""
    runs: Path
    """Root of the runs, for the adapter."""
    folder: Path
    """Where bench_store's files are, or go."""
    parts: tuple[Literal["fed", "workers", "memory", "cached", "feeding", "profile"], ...] = (
        "fed",
        "workers",
        "memory",
        "cached",
        "feeding",
        "profile",
    )
    recipe: str = "offline"
    fold: int = 0
    steps: int = 12
    """Steps of each contender in a round."""
    rounds: int = 3
    full_size_rounds: int = 2
    out: Path | None = None
    """Markdown file to write."""


def main(settings: Settings) -> None:
    """Time, compare, print."""
    heap.keep_freed_memory()
    here = f"recipe `{settings.recipe}`, fold {settings.fold}"
    parts: dict[str, tuple[str, Callable[[Settings], list[str]]]] = {
        "fed": (f"Fed steps, {here}, {settings.steps} steps a round", fed_table),
        "workers": (f"Workers, {here}, {settings.steps} steps", workers_table),
        "memory": ("Memory of a worker over 2,000 steps, recipe `tiny`", memory_table),
        "cached": ("From the cache and from images: ViT-B/14 at 518 px, batch 8, 1-shot", cached_table),
        "feeding": (f"Feeding a step of {1e3 * STEP_S:.0f} ms: 8 pairs of 37 x 37 x 768 fp16, 34 MB", feeding_table),
        "profile": ("Where a step's time goes: the paper's sizes, fp32", profile_table),
    }
    lines = ["# Training", "", f"{provenance('python -m tests.benchmarks.bench_training')}."]
    for part in settings.parts:
        title, made = parts[part]
        lines += ["", f"## {title}", "", *made(settings)]
        print("\n".join(lines[-20:]), flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if settings.out is not None:
        settings.out.write_text(text)


def fed_table(settings: Settings) -> list[str]:
    """Held, fed, and the loader alone."""
    chosen = parse(train_episodic.Settings, [*map(str, of_recipe(settings, "bench"))])
    job = train_episodic.planned(chosen, settings.fold)[1]()
    worker = training.Worker(torch.device("cpu"), 0, 1, "", chosen.device.train_precision, chosen.workers, None, None)
    step = stepper(episodic_loop.build_segmenter(job), worker)
    loader = EpisodeLoader(job.dataset, job.late, job.query, job.late.fingerprint.view_seed, job.label_px)
    feed = episodic_loop.fed(loader, job, worker, 0)
    held = next(feed)
    step(held)
    times: dict[str, list[float]] = {"held": [], "fed": [], "the loader alone": []}
    for _ in range(settings.rounds):
        times["held"].append(seconds(lambda: [step(held) for _ in range(settings.steps)]) / settings.steps)
        step(next(feed))
        times["fed"].append(seconds(lambda: [step(next(feed)) for _ in range(settings.steps)]) / settings.steps)
        times["the loader alone"].append(seconds(lambda: [next(feed) for _ in range(settings.steps)]) / settings.steps)
    return table(times, "held")


def workers_table(settings: Settings) -> list[str]:
    """Whole trainings by commands, so many workers of so many cores."""
    splits = {"1 worker of 2 cores": (1, 2), "1 worker of 1 core": (1, 1), "2 workers of 1 core": (2, 1)}
    times: dict[str, list[float]] = {name: [] for name in splits}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(settings.rounds):
            for name, (workers, cpus) in splits.items():
                flags = [*of_recipe(settings, name=f"bench-{workers}-{cpus}-{number}"), "--workers", workers]
                flags += ["--worker-cpus", cpus, "--steps", 2 * settings.steps, "--no-register"]
                flags += ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
                result = call(train_episodic.Settings, train_episodic.job, [*map(str, flags)])
                times[name].append(result["seconds_per_step"])
                shutil.rmtree(Path(result["checkpoint"]).parent)
    ray.shutdown()
    return table(times, "1 worker of 2 cores")


def memory_table(settings: Settings) -> list[str]:
    """Resident memory of a loop that reads, steps and gathers, as a worker does."""
    steps, rows = 2000, ["| step | resident memory, MB |", "|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        shapes.write_shapes(Path(folder) / "shapes", 160, seed=1, side_px=224)
        place = [
            "--recipe",
            "tiny",
            "--data",
            f"{folder}/shapes",
            "--store",
            f"{folder}/stores",
            "--out",
            f"{folder}/runs",
        ]
        place += ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
        for command in (extract_teacher, extract_features, distill, bake_embeddings):
            own = ["--coarse-res", 28] if command is extract_features else []
            call(command.Settings, command.job, [*map(str, [*place, *own])])
        ray.shutdown()
        chosen = parse(train_episodic.Settings, [*map(str, [*place, "--fold", 1, "--steps", steps])])
        job = train_episodic.planned(chosen, 1)[1]()
        worker = training.Worker(torch.device("cpu"), 0, 1, "", "fp32", chosen.workers, None, None)
        step = stepper(episodic_loop.build_segmenter(job), worker)
        loader = EpisodeLoader(job.dataset, job.late, job.query, job.late.fingerprint.view_seed, job.label_px)
        for number, batch in enumerate(episodic_loop.fed(loader, job, worker, 0), start=1):
            step(batch)
            if number in (100, 500, 1000, 1500, 2000):
                rows.append(f"| {number} | {psutil.Process().memory_info().rss / 1e6:.0f} |")
    return rows


def feeding_table(settings: Settings) -> list[str]:
    """An accelerator that takes no time of this machine's: what reaches it, and what any reader could bring."""
    of_store = bench_store.Settings(settings.folder)
    bench_store.write_files(of_store)
    place, mapped = settings.folder / "bucket" / "store", np.load(settings.folder / "plain.npy", mmap_mode="r")
    packed, samples = settings.folder / "bucket" / "packed", of_store.samples
    if not (packed / "seal.json").exists():
        writer = create(str(packed), replace(FeatureStore(str(place)).fingerprint, dtype="int8"), bench_rows(samples))
        for shard in writer.missing():
            rows = shard_rows(shard, samples)
            writer.write(shard, mapped[rows.start : rows.stop], [(518, 518)] * len(rows))
        writer.seal()
    whole = 2 * samples * mapped[0].nbytes
    contenders: dict[str, Callable[[Sequence[int]], object]] = {
        "np.memmap": lambda rows: np.stack([mapped[row] for row in rows]),
        "the store": reads(Feed(FeatureStore(str(place)))),
        "the store in int8": reads(Feed(FeatureStore(str(packed)))),
        "the store through memory that holds it": reads(Feed(FeatureStore(str(place)), memory_bytes=whole)),
    }
    local = fed_by(settings, contenders, samples, "np.memmap")
    with range_server(settings.folder) as address, environment(**aws(address)):
        bare = obstore.store.S3Store("bucket", client_options={"allow_http": True})
        size, pool = mapped[0].nbytes + CRC_BYTES, ThreadPoolExecutor(16)

        def one(row: int) -> object:
            key = f"store/{shard_key(row // 32)}"
            return obstore.get_range(bare, key, start=row % 32 * size, length=size)

        contenders = {
            "bare range requests (obstore, 16 threads)": lambda rows: list(pool.map(one, rows)),
            "the store on S3": reads(Feed(FeatureStore("s3://bucket/store"))),
        }
        remote = fed_by(settings, contenders, samples, "bare range requests (obstore, 16 threads)")
    return [*local, "", *remote]


def fed_by(
    settings: Settings, contenders: dict[str, Callable[[Sequence[int]], object]], samples: int, base: str
) -> list[str]:
    """A table of rates: batches read ahead by two threads, taken by steps that only wait."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(settings.rounds + 1):
        order = np.random.default_rng(number).integers(0, samples, (40, 16)).tolist()
        for name, read in contenders.items():
            started = time.perf_counter()
            for _ in ahead(read, iter(order), threads=2, depth=4):
                time.sleep(STEP_S)
            if number:  # the first warms up
                rates[name].append(len(order) / (time.perf_counter() - started))
    lines = ["| | steps/s, each round | episodes/s | GB/s | rate over the first, median |", "|---|---|---|---|---|"]
    for name, of in rates.items():
        ratio, rate = statistics.median(a / b for a, b in zip(of, rates[base], strict=True)), statistics.median(of)
        each = ", ".join(f"{r:.0f}" for r in of)
        lines.append(f"| {name} | {each} | {8 * rate:.0f} | {rate * 16 * 37 * 37 * 768 * 2 / 1e9:.2f} | {ratio:.2f} |")
    return lines


def reads(feed: Feed) -> Callable[[Sequence[int]], object]:
    """Rows by number through a feed."""
    return lambda rows: feed.rows([str(row) for row in rows], [0] * len(rows))


def bench_rows(samples: int) -> list[Row]:
    """Those of bench_store's."""
    return [Row(str(number), 0, "-") for number in range(samples)]


def profile_table(settings: Settings) -> list[str]:
    """Operators of one step, by the time that they take themselves."""
    network, batch = segmenter().train(), episodes(paper.BATCH_SIZE)
    worker = training.Worker(torch.device("cpu"), 0, 1, "", "fp32", Workers(), None, None)
    step = stepper(network, worker)
    step(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(batch)
    found = sorted(profiler.key_averages(), key=lambda of: -of.self_cpu_time_total)
    total = sum(of.self_cpu_time_total for of in found)
    lines = ["| operator | calls | ms | share |", "|---|---|---|---|"]
    for of in found[:12]:
        share = of.self_cpu_time_total / total
        lines.append(f"| {of.key} | {of.count} | {of.self_cpu_time_total / 1e3:.0f} | {share:.2f} |")
    return lines


def of_recipe(settings: Settings, name: str) -> list[object]:
    """Flags of a training."""
    flags: list[object] = ["--recipe", settings.recipe, "--data", settings.data, "--store", settings.store]
    return [*flags, "--out", settings.runs, "--fold", settings.fold, "--name", name]


def cached_table(settings: Settings) -> list[str]:
    """A step on features that are there, and one that computes them first, in both precisions."""
    single, half = (cached_times(settings, precision) for precision in ("fp32", "bf16"))
    return [*single, *half[2:]]


def cached_times(settings: Settings, precision: str) -> list[str]:
    """As a table, at the paper's sizes."""
    network, batch, images = segmenter().train(), episodes(paper.BATCH_SIZE), torch.randn(16, 3, 518, 518)
    encoder = DinoV2Encoder(timm.create_model(DINOV2["dinov2_vitb14"].timm, num_classes=0), "random").eval()
    worker = training.Worker(torch.device("cpu"), 0, 1, "", precision, Workers(), None, None)
    step = stepper(network, worker)

    def recomputed() -> None:
        with torch.inference_mode(), worker.autocast():
            for at in range(0, len(images), 4):  # eight supports and eight queries
                network.embed(encoder(images[at : at + 4]).early)
        step(batch)

    step(batch)
    cached = f"{precision}, from the cache"
    times: dict[str, list[float]] = {cached: [], f"{precision}, from images": []}
    for _ in range(settings.full_size_rounds):
        times[cached].append(seconds(lambda: step(batch)))
        times[f"{precision}, from images"].append(seconds(recomputed))
    return table(times, cached)


def table(times: dict[str, list[float]], base: str) -> list[str]:
    """Milliseconds of each round, and the median of the rounds' ratios to the base's."""
    lines = ["| | ms a step, each round | over the first, median |", "|---|---|---|"]
    for name, of in times.items():
        ratio = statistics.median(t / b for t, b in zip(of, times[base], strict=True))
        lines.append(f"| {name} | {', '.join(f'{1e3 * t:.0f}' for t in of)} | {ratio:.3f} |")
    return lines


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def stepper(network: Segmenter, worker: training.Worker) -> Callable[[EpisodeBatch], None]:
    """A step of training on one batch, as the loop takes it."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model = EpisodeLoss(network)

    def step(batch: EpisodeBatch) -> None:
        losses = episodic_loop.train_step(model, optimiser, [batch], worker, None)
        losses["loss"].item()

    return step


if __name__ == "__main__":
    main(tyro.cli(Settings))
