"""The networks and training steps on a GPU, at the paper's sizes with random weights and features.

    python -m tests.benchmarks.bench_gpu --folder /scratch/bench --out docs/benchmarks/gpu.md

ViT-B/14 at 518 px, SAM ViT-H at 1024 px, the 4D segmenter at grid 37. Rates are medians of rounds, and ratios those of
pairs within a round. Needs neither Ray nor MLflow; 3 GB in the folder, and 20 GB on the GPU.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from feature_store import FeatureStore, Fingerprint, Row, create
from feature_store.layout import shard_rows
from fsdino import paper
from fsdino.encoder import DinoV2Encoder
from fsdino.episodic import EpisodeBatch, EpisodeLoss
from pipelines.feeding import Feed
from pipelines.loading import ahead
from tests.benchmarks import bench_networks
from tests.benchmarks.bench_networks import GRID, RES_PX, WIDTH, episodes, segmenter

CUDA = torch.device("cuda")
Work = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """Benchmark a GPU."""

    folder: Path
    """Where stores of random features go."""
    parts: tuple[Literal["rates", "steps", "feeding", "latency", "compiled"], ...] = (
        "rates",
        "steps",
        "feeding",
        "latency",
        "compiled",
    )
    rounds: int = 5
    samples: int = 256
    """Of the stores; 2.1 MB each in float16."""
    batches: tuple[int, ...] = (8, 32)
    """Episodes of a training step; 8 is the paper's."""
    provenance: str = ""
    """What the page says of commit and machine."""
    out: Path | None = None
    """Markdown file to write."""


def main(settings: Settings) -> None:
    """Measure and print."""
    torch.backends.cuda.matmul.allow_tf32 = False
    parts: dict[str, tuple[str, Callable[[Settings], list[str]]]] = {
        "rates": ("Extraction: images a second", rates_table),
        "steps": ("Training steps on a batch that is held, and from images", steps_table),
        "feeding": ("The same steps, fed from a store", feeding_table),
        "latency": ("One photograph at a time", latency_table),
        "compiled": ("Through torch.compile, bf16", compiled_table),
    }
    lines = ["# On a GPU", "", f"`python -m tests.benchmarks.bench_gpu` {settings.provenance}".strip() + ", "]
    lines[-1] += f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%F')}."
    for part in settings.parts:
        title, made = parts[part]
        lines += ["", f"## {title}", "", *made(settings)]
        print("\n".join(lines[-14:]), file=sys.stderr, flush=True)
        if settings.out is not None:
            settings.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def matmul_rate() -> float:
    """Of an 8192-cubed product in bfloat16, in FLOP/s: what this GPU can do."""
    a, b = (torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / statistics.median(seconds(lambda: a @ b) for _ in range(10))


def rates_table(settings: Settings) -> list[str]:
    """Both networks that extraction runs, by batch and precision."""
    peak = matmul_rate()
    lines = [f"A product of two 8192 x 8192 matrices in bf16 runs at {peak / 1e12:.0f} TFLOP/s.", ""]
    lines += ["| | batch | precision | images/s | TFLOP/s | share of the product's |", "|---|---|---|---|---|---|"]
    for name, make, sizes in (
        ("ViT-B/14 at 518 px", bench_networks.encoder, (1, 32)),
        ("SAM-H at 1024 px", bench_networks.teacher, (1, 4)),
    ):
        torch.manual_seed(0)
        with CUDA:
            network = make()[0].eval().requires_grad_(False)
        side = RES_PX if name.startswith("ViT") else 1024
        for precision in ("fp32", "bf16"):
            for size in sizes:
                x = torch.randn(size, 3, side, side, device=CUDA)
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    network(x[:1])
                flop = counter.get_total_flops()
                work = forward(network, x, precision)
                work()
                rate = size / statistics.median(seconds(work) for _ in range(settings.rounds))
                share = rate * flop / peak
                lines.append(f"| {name} | {size} | {precision} | {rate:.1f} | {rate * flop / 1e12:.0f} | {share:.2f} |")
        del network
    return lines


def forward(network: Any, x: torch.Tensor, precision: str) -> Work:
    """A pass through a frozen network."""

    def work() -> None:
        with torch.no_grad(), autocast(precision):
            network(x)

    return work


def compiled_table(settings: Settings) -> list[str]:
    """Pairs of a network or step as it is and compiled; compiling comes first and is not counted."""
    lines = ["| batch | | ms | a second | over as it is |", "|---|---|---|---|---|"]
    torch.manual_seed(0)
    with CUDA:
        encoder: Any = bench_networks.encoder()[0].eval().requires_grad_(False)
    x, batch = torch.randn(32, 3, RES_PX, RES_PX, device=CUDA), episodes(paper.BATCH_SIZE).to(CUDA)
    works = {"as it is": stepper("bf16"), "compiled": stepper("bf16", "default")}
    works["compiled, CUDA graphs"] = stepper("bf16", "reduce-overhead")
    steps: dict[str, Work] = {f"step, {name}": partial(work, batch) for name, work in works.items()}
    passes: dict[str, Work] = {
        "ViT-B, as it is": forward(encoder, x, "bf16"),
        "ViT-B, compiled": forward(torch.compile(encoder), x, "bf16"),
    }
    lines += paired(settings, steps, paper.BATCH_SIZE, "step, as it is")
    return lines + paired(settings, passes, len(x), "ViT-B, as it is")


def steps_table(settings: Settings) -> list[str]:
    """Forward, backward and AdamW; from images the encoder and the adapter come before."""
    lines = ["| episodes a step | | ms a step | episodes/s | over bf16, held |", "|---|---|---|---|---|"]
    torch.manual_seed(0)
    with CUDA:
        encoder: Any = bench_networks.encoder()[0].eval().requires_grad_(False)
        adapter = segmenter().adapter
    for size in settings.batches:
        batch = episodes(size).to(CUDA)
        images = torch.randn(2 * size, 3, RES_PX, RES_PX, device=CUDA)
        half, single = stepper("bf16"), stepper("fp32")
        works: dict[str, Work] = {
            "bf16, held": partial(half, batch),
            "fp32, held": partial(single, batch),
            "bf16, from images": partial(from_images, encoder, adapter, images, half, batch),
        }
        lines += paired(settings, works, size, "bf16, held")
    return lines


def from_images(
    encoder: DinoV2Encoder,
    adapter: torch.nn.Module,
    images: torch.Tensor,
    step: Callable[[EpisodeBatch], None],
    batch: EpisodeBatch,
) -> None:
    """A step that computes the features of its supports and queries first, and embeds the queries."""
    with torch.no_grad(), autocast("bf16"):
        for at in range(0, len(images), 32):
            adapter(encoder(images[at : at + 32]).early[::2])
    step(batch)


def feeding_table(settings: Settings) -> list[str]:
    """Random rows of stores of late features and embeddings, through every tier."""
    lines = ["| episodes a step | | ms a step | episodes/s | over held |", "|---|---|---|---|---|"]
    stores = {dtype: written(settings, dtype) for dtype in ("float16", "int8")}
    for size in settings.batches:
        held, step = episodes(size).to(CUDA), stepper("bf16")
        works: dict[str, Work] = {"held": lambda held=held, step=step: step(held)}
        feeds: list[Iterator[EpisodeBatch]] = []
        for dtype, (late, embedding) in stores.items():
            for tier in ("store", "memory", "GPU"):
                room = 10**11 if tier != "store" else 0
                kept = {"memory_bytes": room} if tier == "memory" else {"device_bytes": room}
                bytes_of = [store.sample_bytes * len(store) for store in (late, embedding)]
                kept_of = [{key: min(value, n) for key, value in kept.items()} for n in bytes_of]
                both = [Feed(s, CUDA, **k) for s, k in zip((late, embedding), kept_of, strict=True)]
                if tier != "store":
                    fill(both, settings.samples)
                feeds.append(fed(both, settings.samples, size, held))
                works[f"{dtype}, from {tier}"] = lambda feed=feeds[-1], step=step: step(next(feed))
        lines += paired(settings, works, size, "held")
        for feed in feeds:
            feed.close()  # type: ignore[attr-defined]
    return lines


def fill(feeds: list[Feed], samples: int) -> None:
    """Read all samples once."""
    for feed in feeds:
        for at in range(0, samples, 64):
            rows = [str(row) for row in range(at, min(at + 64, samples))]
            feed.rows(rows, [0] * len(rows))


def fed(feeds: list[Feed], samples: int, size: int, like: EpisodeBatch) -> Iterator[EpisodeBatch]:
    """Episodes of random rows, read ahead by two threads as a worker's are; masks and labels are those of `like`."""
    late, embedding = feeds

    def read(number: int) -> EpisodeBatch:
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(samples, (2 * size,), generator=generator).tolist()
        names = [str(row) for row in rows]
        features = late.rows(names, [0] * len(names)).unflatten(0, (size, 2))
        queries = embedding.rows(names[::2], [0] * size)
        return replace(like, support_late=features[:, 1:], query_late=features[:, 0], query_input=queries)

    return ahead(read, iter(range(10**9)), threads=2, depth=4)


def written(settings: Settings, dtype: str) -> tuple[FeatureStore, FeatureStore]:
    """Stores of random features under the folder, written if they are not there."""
    found = []
    for feature, channels in (("late", WIDTH), ("embedding", paper.EMBEDDING_CHANNELS)):
        place = settings.folder / f"{feature}-{dtype}-{settings.samples}"
        if not (place / "seal.json").exists():
            kept = Fingerprint(
                feature, "bench", "w", "l", "none", RES_PX, GRID, channels, view_seed=0, preprocessing="p", dtype=dtype
            )
            writer = create(str(place), kept, [Row(str(n), 0, "-") for n in range(settings.samples)])
            generator = torch.Generator().manual_seed(0)
            for shard in writer.missing():
                rows = shard_rows(shard, settings.samples)
                values = torch.randn(len(rows), GRID, GRID, channels, generator=generator)
                writer.write(shard, values.half().numpy(), [(RES_PX, RES_PX)] * len(rows))
            writer.seal()
        found.append(FeatureStore(str(place)))
    return found[0], found[1]


def latency_table(settings: Settings) -> list[str]:
    """Parts of a prediction on one photograph."""
    lines = ["| | precision | ms |", "|---|---|---|"]
    for name, make in bench_networks.PARTS.items():
        if "teacher" in name or "training" in name:
            continue
        for precision in ("fp32", "bf16"):
            times = bench_networks.times(make, bench_networks.Settings("cuda", rounds=3 * settings.rounds), precision)
            lines.append(f"| {name} | {precision} | {1e3 * times[0]:.2f} |")
    return lines


def stepper(precision: str, compiled: str | None = None) -> Callable[[EpisodeBatch], None]:
    """A step of training, without a wait for the GPU; through torch.compile in that mode, if any."""
    torch.manual_seed(0)
    network = EpisodeLoss(segmenter().train()).to(CUDA)
    run: Any = torch.compile(network, mode=compiled) if compiled else network
    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(batch: EpisodeBatch) -> None:
        with autocast(precision):
            loss = run(batch.to(CUDA))["loss"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step


def paired(settings: Settings, works: dict[str, Work], size: int, base: str, steps: int = 20) -> list[str]:
    """Rows of a table: every contender in each round, in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        for _ in range(3):
            work()
    for _ in range(settings.rounds):
        for name, work in works.items():
            few = steps if "images" not in name else 3
            times[name].append(seconds(lambda work=work, few=few: [work() for _ in range(few)]) / few)
    lines = []
    for name, of in times.items():
        middle = statistics.median(of)
        ratio = statistics.median(t / b for t, b in zip(of, times[base], strict=True))
        lines.append(f"| {size} | {name} | {1e3 * middle:.1f} | {size / middle:.0f} | {ratio:.2f} |")
    return lines


def seconds(work: Work) -> float:
    """Of one call and all that it asked of the GPU."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def autocast(precision: str) -> Any:
    """The precision's context."""
    return torch.autocast("cuda", torch.bfloat16) if precision == "bf16" else nullcontext()


if __name__ == "__main__":
    main(tyro.cli(Settings))
