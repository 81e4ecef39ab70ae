"""What a photograph costs with a class, and each further class, beside the encoder alone.

    python -m tests.benchmarks.bench_predict --out docs/benchmarks/predict.md

ViT-B/14 at 518 px with random weights, and the model that comes with the project, on a photograph of 640 x 480; every
round runs all contenders in turn, and ratios are medians of a round's pairs.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.encoder import to_input
from fsdino.predictor import Predictor
from fsdino.preprocess import resize_square
from fsdino.segmenter import Segmenter
from tests.benchmarks import bench_networks
from tests.benchmarks.bench_networks import GRID, RES_PX, WIDTH
from tests.benchmarks.provenance import provenance

PLAIN = SegmenterConfig()
OURS = {"neighbours": True, "self_support": True, "fuse": True}
MODELS = {
    "ViT-B, compact": replace(PLAIN, variant="compact"),
    "ViT-B, compact, neighbours, self-support, fuse": replace(PLAIN, variant="compact", **OURS),
    "ViT-B, 4d": PLAIN,
    "ViT-B, 4d, neighbours, self-support, fuse": replace(PLAIN, **OURS),
}
COUNTS = (1, 5)
SIZE = (640, 480)


@dataclass(frozen=True)
class Settings:
    """Measure predictions."""

    rounds: int = 7
    out: Path | None = None
    """Markdown file to write."""


def main(settings: Settings) -> None:
    """All models."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8))
    lines = ["# A photograph, and further classes", ""]
    lines += [f"{provenance('python -m tests.benchmarks.bench_predict')}: medians of {settings.rounds} rounds.", ""]
    lines += [
        "| | encoder alone, ms | one class, ms | over the encoder | each further class, over the encoder | "
        "`segment` of one class, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, predictor in (*random_predictors(), ("the project's own (Lite0, 400 px)", Predictor.load())):
        lines.append(row(name, predictor, image, settings.rounds))
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if settings.out:
        settings.out.write_text(text)


def random_predictors() -> Any:
    """The paper's sizes under random weights."""
    for name, config in MODELS.items():
        torch.manual_seed(0)
        encoder: Any = bench_networks.encoder()[0].eval()
        yield name, Predictor(encoder, Segmenter(config, SegmenterShape(WIDTH, WIDTH, GRID)), RES_PX)


@torch.inference_mode()
def row(name: str, predictor: Predictor, image: Image.Image, rounds: int) -> str:
    """A model's times."""
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[100:300, 200:400] = 1
    classes = [predictor.register([image], [mask], f"class {number}") for number in range(max(COUNTS))]
    x = to_input(resize_square(image, predictor.res_px)[None], predictor.encoder.mean, predictor.encoder.std)

    def whole(count: int) -> None:
        predictor.set_image(image)
        predictor.segment(classes[:count])

    works: dict[Any, Callable[[], object]] = {"encoder": lambda: predictor.encoder(x)}
    works |= {count: lambda count=count: whole(count) for count in COUNTS}
    works["segment"] = lambda: predictor.segment(classes[:1])
    times: dict[Any, list[float]] = {key: [] for key in works}
    for number in range(rounds + 1):
        for key, work in works.items():
            started = time.perf_counter()
            work()
            if number:
                times[key].append(time.perf_counter() - started)
    pairs = list(zip(*times.values(), strict=True))  # encoder, one class, five, segment
    one = statistics.median(pair[1] / pair[0] for pair in pairs)
    further = statistics.median((pair[2] - pair[1]) / (COUNTS[-1] - 1) / pair[0] for pair in pairs)
    ms = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    return f"| {name} | {ms['encoder']:.0f} | {ms[1]:.0f} | {one:.2f} | {further:.2f} | {ms['segment']:.0f} |"


if __name__ == "__main__":
    main(tyro.cli(Settings))
