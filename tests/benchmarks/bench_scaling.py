"""A model of 8 to 512 GPUs: time, bytes and requests of extraction and training, and where each breaks first.

    python -m tests.benchmarks.bench_scaling --out docs/benchmarks/scaling.md

Rates of one GPU are those of docs/benchmarks/gpu.md; what the driver costs, and what a core decodes, is measured here;
the object store's limits are AWS's published ones. Starts neither Ray nor a second process.
"""

import argparse
import heapq
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from PIL import Image

from feature_store import Fingerprint, Row
from feature_store.layout import ROWS_PER_SHARD, num_shards
from feature_store.writer import create
from fsdino.preprocess import read_image, resize_square
from pipelines.extraction import Target, plan_items
from tests.benchmarks.provenance import provenance

GPUS = (8, 32, 128, 512)
PER_NODE, NODE_CORES, NODE_GB_S = 8, 192, 12.5  # p5.48xlarge; 100 Gb/s of it to S3
PUTS, GETS = 3500, 5500  # a second and partitioned prefix, by AWS's guidelines
ENCODER, TEACHER = 961.5, 19.9  # images/s of an H100 in bf16, docs/benchmarks/gpu.md
STEP_S, EPISODES = 0.0354, 8
LATE, EMBEDDING, TEACHER_BYTES = 2.103e6, 0.701e6, 2.097e6
PHOTOGRAPH = 110e3  # VOC's mean JPEG
DATA = {"PASCAL-5i": (60979, 5953), "COCO-20i": (868334, 82783), "SA-1B, 1 %": (335562, 111854)}  # docs/cost.md
THREADS, LATENCY_S = 16, 0.03


def decoded_a_second(rounds: int = 40) -> float:
    """Photographs of VOC's size that one core decodes and resizes to 518 px."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
    smooth = noise.resize((500, 375), Image.Resampling.BICUBIC)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.jpg"
        smooth.save(file, quality=92)
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            resize_square(read_image(str(file)), 518)
            times.append(time.perf_counter() - began)
    return 1 / statistics.median(times)


def driver_costs(rows: int = 320_000) -> dict[str, float]:
    """Of planning that many samples: bytes and seconds a million; of markers: seconds a hundred thousand to list."""
    tracemalloc.start()
    began = time.perf_counter()
    planned = [Row(f"2007_{i:06d}", 0, f"s3://bucket/VOC2012/JPEGImages/2007_{i:06d}.jpg") for i in range(rows)]
    of = Fingerprint("late", "m", "w", "l", "none", 518, 37, 768, 0, "p")
    target = Target("s3://bucket/late@518", of, planned)
    items = plan_items([target], {target.url: range(num_shards(rows))}, {})
    seconds, held = time.perf_counter() - began, tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert sum(len(unit.rows) for item in items for unit in item.units) == rows
    with tempfile.TemporaryDirectory() as folder:
        writer = create(f"{folder}/late@518", of, planned[: 32 * 3000])
        (Path(folder) / "late@518" / "markers").mkdir(exist_ok=True)
        for shard in range(3000):
            (Path(folder) / "late@518" / "markers" / f"{shard}.{writer.build_id}.json").write_bytes(b"{}")
        began = time.perf_counter()
        writer.missing()
        listing = time.perf_counter() - began
    return {
        "gb": held / rows * 1e6 / 1e9,
        "plan_s": seconds / rows * 1e6,
        "list_s": listing / 3000 * 100_000,
    }


def throttled(clients: int, limit: int, tries: int, seconds: float = 60.0, seed: int = 0) -> tuple[float, float]:
    """Closed loop: threads that ask a store of so many requests a second, and wait as ours do when it answers 503.

    Answers a second, and the share of requests that fail for good: obstore tries five times (0.1 s doubled), and we
    `tries` times (0.2 s doubled, up to 10 s).
    """
    rng, done, failed = random.Random(seed), 0, 0
    tokens, refilled = float(limit), 0.0
    events = [(rng.uniform(0, LATENCY_S), client, 0, 0) for client in range(clients)]
    heapq.heapify(events)
    while events and events[0][0] < seconds:
        now, client, inner, outer = heapq.heappop(events)
        tokens, refilled = min(limit, tokens + (now - refilled) * limit), now
        if tokens >= 1:
            tokens -= 1
            done += now > seconds / 4  # behind the start's burst
            again = (now + LATENCY_S, client, 0, 0)
        elif inner < 4:
            again = (now + LATENCY_S + rng.uniform(0, 0.1 * 2 ** (inner + 1)), client, inner + 1, outer)
        elif outer < tries - 1:
            again = (now + LATENCY_S + rng.uniform(0, min(10, 0.2 * 2**outer)), client, 0, outer + 1)
        else:
            failed += 1
            again = (now + LATENCY_S, client, 0, 0)
        heapq.heappush(events, again)
    return done / (seconds * 0.75), failed / max(1, done + failed)


def table(header: list[str], rows: list[list[object]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def hours(seconds: float) -> str:
    """A duration as one says it."""
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )


def extraction(core: float) -> str:
    """Rates that each part would allow, and the least of them."""
    rows = []
    networks = (("ViT-B/14, early and late", ENCODER, 2, 2 * LATE), ("SAM-H", TEACHER, 1, TEACHER_BYTES))
    for what, rate, stores, size in networks:
        for gpus in GPUS:
            nodes = gpus / PER_NODE
            limits = {
                "GPUs": gpus * rate,
                "decoding": nodes * NODE_CORES * core,
                "network": nodes * NODE_GB_S * 1e9 / (size + PHOTOGRAPH),
                "one prefix's PUTs": PUTS / (2 * stores / ROWS_PER_SHARD),
                "one prefix's GETs": GETS,
            }
            least = min(limits, key=lambda name: limits[name])
            got = limits[least]
            rows.append(
                [what, gpus, f"{limits['GPUs']:,.0f}", f"{limits['decoding']:,.0f}", f"{limits['network']:,.0f}",
                 f"{got:,.0f} ({least})", f"{got * size / 1e9:.1f}", f"{got * 2 * stores / ROWS_PER_SHARD:,.0f}",
                 *(hours(count[0 if stores == 2 else 1] / got) for count in DATA.values())]
            )  # fmt: skip
    return table(
        [
            "network",
            "GPUs",
            "they would do",
            "cores decode",
            "network writes",
            "images/s (least)",
            "GB/s",
            "PUT/s",
            *DATA,
        ],
        rows,
    )


def training() -> str:
    """Requests and bytes of fed steps: 16 photographs' late features and eight queries' embeddings each."""
    rows = []
    for gpus in GPUS:
        steps = gpus / STEP_S
        asked, moved = steps * 3 * EPISODES, steps * EPISODES * (2 * LATE + EMBEDDING)
        once = DATA["PASCAL-5i"][0] * 2 * gpus / PER_NODE
        rows.append(
            [gpus, f"{steps * EPISODES:,.0f}", f"{asked:,.0f}", f"{asked / GETS:.0f}", f"{moved / 1e9:.0f}",
             f"{gpus / PER_NODE * NODE_GB_S:.0f}", f"{once:,.0f}", hours(once / GETS)]
        )  # fmt: skip
    header = [
        "GPUs",
        "episodes/s",
        "GET/s",
        "times a prefix's",
        "GB/s",
        "GB/s of the nodes",
        "GETs with `--cache`",
        "at one prefix's rate",
    ]
    return table(header, rows)


def throttling() -> str:
    """What a prefix at its limit does to threads that retry."""
    rows = []
    for gpus in GPUS:
        _, lost_before = throttled(gpus * THREADS, GETS, 6)
        got, lost = throttled(gpus * THREADS, GETS, 60)
        cells = (f"{gpus * THREADS / LATENCY_S:,.0f}", f"{got:,.0f}", f"{lost_before:.1e}", f"{lost:.1e}")
        rows.append([gpus, gpus * THREADS, *cells])
    header = ["GPUs", "threads", "would ask, 1/s", "answered, 1/s", "lost with six tries", "lost with three minutes"]
    return table(header, rows)


def main() -> None:
    """Measure, model, simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    core, costs = decoded_a_second(), driver_costs()
    text = f"""# 8 to 512 GPUs, on paper

{provenance("python -m tests.benchmarks.bench_scaling")}.
Nobody has run more than one GPU: this is a model, of rates measured on one H100 ([GPU](gpu.md)), what one core of this
machine decodes ({core:.0f} photographs a second to 518 px), nodes of {PER_NODE} GPUs with {NODE_CORES} cores and {NODE_GB_S} GB/s to the
object store, and AWS's guideline of {PUTS:,} PUTs and {GETS:,} GETs a second for each partitioned prefix of a bucket.

## Extraction

{extraction(core)}
The first to break is the node's network: ViT-B's early and late features are 4.2 MB for each photograph, so one GPU at
its full rate writes 4 GB/s, and eight of them write nearly three times what their node sends. `--dtype int8` halves the
bytes, one of the two features halves them again. Then comes one prefix's rate of photographs read: beyond 16 GPUs of
ViT-B a data set wants tars, whose photographs are read by range from few objects, or several prefixes. SAM-H is bound by
its GPUs up to {GETS / TEACHER:,.0f} of them.

## Training

{training()}
A step of {STEP_S * 1e3:.0f} ms reads {3 * EPISODES} samples, {EPISODES * (2 * LATE + EMBEDDING) / 1e6:.0f} MB: straight from the object store, eight GPUs ask for
all that one prefix serves and for most of what one node receives. Hence the tiers: with `--cache` each node asks for each
sample once. PASCAL's stores of one view are {(5953 + 1449) * (LATE + EMBEDDING) / 1e9:.0f} GB and fit a card (`--cache-device-gb`); of eight views in int8 they are
{DATA["PASCAL-5i"][0] * (LATE + EMBEDDING) / 2e9:.0f} GB, for the node's memory or disk. And the paper's batch of eight gives one GPU too little to do, so more
GPUs train more folds and variants, not one run faster: a table needs eight runs.

## What breaks first

| what | where | what was done |
|---|---|---|
| requests a second of a prefix | training without a cache: 8 GPUs; extraction: {PUTS / (4 / ROWS_PER_SHARD):,.0f} images/s by PUTs, {GETS:,} by GETs of photographs | caches in three tiers; a shard of 32 samples is one PUT, neighbours are one GET, tars are read by range; a store that says `SlowDown` is tried for three minutes instead of six times (below) |
| size of the manifest | 22 MB and 0.7 s a million samples, 1.9 GB of memory at ten million ([manifest](manifest.md)) | one Parquet file, columns in Arrow's memory, samples found by hash without a Python object for each |
| driver's memory and time | {costs["gb"]:.2f} GB and {costs["plan_s"]:.0f} s of planning a million samples of a store, traced | the whole of SA-1B takes {11.2 * costs["gb"]:.0f} GB; not changed |
| markers | one object for each shard; listing 100,000 takes {costs["list_s"]:.1f} s on a local disk, and 100 requests on S3 | listed at the start, the end and a resume only; not changed |
| Ray Data's blocks | one for each group of 32 photographs: 350,000 for the whole of SA-1B | not changed; extract such sets by parts (`--share`) |

## A prefix at its limit

Simulated for a minute: {THREADS} threads for each GPU that ask without pause ({LATENCY_S * 1e3:.0f} ms an answer) of a store that answers
{GETS:,} a second and refuses the rest (503), with obstore's five tries inside ours. Lost is the share of requests that fail
for good, each of which would end a job.

{throttling()}
With six tries a job ended at four times the rate. With three minutes the threads share what there is, and the job runs at
that. S3 splits a prefix that stays hot within minutes, which is not in it.
"""  # noqa: E501
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
