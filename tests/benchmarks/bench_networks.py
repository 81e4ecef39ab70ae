"""The networks at full size: time and memory of every part, and the fused correlation against the plain one.

    python -m tests.benchmarks.bench_networks --out docs/benchmarks/networks.md

ViT-B/14 at 518 px, SAM ViT-H at 1024 px, the 4D segmenter at grid 37, under random weights. Times are medians; memory
is what a process of its own needed above weights and inputs. Needs the extra `dev` and 8 GB; `--device cuda` for a GPU.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import timm
import torch
import torch.nn.functional as F
import tyro
from segment_anything import sam_model_registry

from fsdino import paper
from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.encoder import DinoV2Encoder, Features
from fsdino.episodic import EpisodeBatch, EpisodeLoss
from fsdino.segmenter import Segmenter
from fsdino.specs import DINOV2, teacher_spec
from fsdino.teacher import SamTeacher
from tests.benchmarks.provenance import provenance

GRID, WIDTH, RES_PX = 37, 768, paper.IMAGE_RES_PX


@dataclass(frozen=True)
class Settings:
    """Benchmark the networks."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where they run."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Weights stay float32; bf16 is autocast."""
    compile: bool = False
    """Also time each part through torch.compile."""
    rounds: int = 15
    """Runs of each part; the teacher has three."""
    part: str | None = None
    """Print the memory of one part as JSON; what the benchmark starts its processes with."""
    out: Path | None = None
    """Markdown file to write."""


Work = Callable[[], object]


def encoder() -> tuple[torch.nn.Module, Work]:
    """Both layers of one photograph."""
    vit = timm.create_model(DINOV2["dinov2_vitb14"].timm, num_classes=0)
    for name, parameter in vit.named_parameters():
        if ".ls" in name:
            torch.nn.init.ones_(parameter)  # a fresh network's LayerScale is 1e-5, under which no block does anything
    net = DinoV2Encoder(vit, "random")
    x = torch.randn(1, 3, RES_PX, RES_PX)
    return net, lambda: net(x)


def teacher() -> tuple[torch.nn.Module, Work]:
    """SAM-H's embedding of one photograph."""
    net = SamTeacher(sam_model_registry["vit_h"]().image_encoder, "random")
    side = teacher_spec("sam_vit_h").input_px(RES_PX)
    x = torch.randn(1, 3, side, side)
    return net, lambda: net(x)


def support() -> tuple[torch.nn.Module, Work]:
    """A class, registered from one support."""
    net, batch = segmenter(), episodes(1)
    return net, lambda: net.encode_support(batch.support_late, batch.support_masks)


def query() -> tuple[torch.nn.Module, Work]:
    """The class found in one query, whose features are at hand."""
    net, batch = segmenter(), episodes(1)
    with torch.inference_mode():
        encoded = net.encode_support(batch.support_late, batch.support_masks)
    return net, lambda: net.segment(batch.query_late, batch.query_input, encoded)


def adapter() -> tuple[torch.nn.Module, Work]:
    """The embedding of one query."""
    net, x = segmenter(), torch.randn(1, WIDTH, GRID, GRID)
    return net, lambda: net.embed(x)


def training_step() -> tuple[torch.nn.Module, Work]:
    """Forward, backward and AdamW on eight episodes of cached features, labels at 518 px."""
    loss = EpisodeLoss(segmenter().train())
    batch = episodes(paper.BATCH_SIZE)
    optimiser = torch.optim.AdamW([p for p in loss.parameters() if p.requires_grad], lr=paper.LEARNING_RATE)

    def step() -> None:
        with torch.enable_grad():
            loss(batch)["loss"].backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return loss, step


def fused(size: int = 1, backward: bool = False) -> tuple[torch.nn.Module, Work]:
    """Support and query features to the reduced correlation, through the support's kernel."""
    return _reduction(size, backward, _fused)


def fused_again(size: int = 1, backward: bool = False) -> tuple[torch.nn.Module, Work]:
    """The same for a further query of that support, whose kernel is there already."""
    net, batch = segmenter().correlation, episodes(size)
    assert net is not None
    with torch.inference_mode():
        kernel = net.kernel(batch.support_late[:, 0], torch.rand(size, GRID, GRID))
    return net, lambda: net.reduced(kernel, batch.query_late)


def plain(size: int = 1, backward: bool = False) -> tuple[torch.nn.Module, Work]:
    """The same through the 4D correlation itself."""
    return _reduction(size, backward, _plain)


def _reduction(size: int, backward: bool, reduce: Callable[..., torch.Tensor]) -> tuple[torch.nn.Module, Work]:
    net, batch = segmenter().correlation, episodes(size)
    assert net is not None
    weights = torch.rand(size, GRID, GRID)

    def work() -> None:
        with torch.set_grad_enabled(backward):
            out = reduce(net, batch.support_late[:, 0], weights, batch.query_late)
            if backward:
                out.sum().backward()

    return net, work


def _fused(net, late, weights, query) -> torch.Tensor:
    return net.reduced(net.kernel(late, weights), query)


def _plain(net, late, weights, query) -> torch.Tensor:
    """As tests/test_correlation.py has it, by one matrix product instead of a five-letter einsum."""
    masked = F.normalize(late, dim=1) * net.position_weights(weights)[:, None]
    correlation = torch.einsum("bcs,bcp->bsp", masked.flatten(2), F.normalize(query, dim=1).flatten(2))
    return F.relu(net.support_reduce(correlation.unflatten(2, query.shape[-2:])))


PARTS: dict[str, Callable[[], tuple[torch.nn.Module, Work]]] = {
    "encoder, ViT-B/14 at 518 px": encoder,
    "teacher, SAM-H at 1024 px": teacher,
    "`encode_support`, one shot": support,
    "adapter": adapter,
    "`segment`": query,
    "training step, batch 8": training_step,
}
CORRELATIONS: dict[str, dict[str, Callable[[], tuple[torch.nn.Module, Work]]]] = {
    "one pair": {"plain": plain, "fused": fused, "fused, a further query": fused_again},
    "batch 8, forward and backward": {"plain ": lambda: plain(8, True), "fused ": lambda: fused(8, True)},
}


def segmenter() -> Segmenter:
    """The paper's, 4D."""
    torch.manual_seed(0)
    return Segmenter(SegmenterConfig(sam_decoder="sam_vit_h"), SegmenterShape(WIDTH, WIDTH, GRID)).eval()


def episodes(size: int) -> EpisodeBatch:
    """Random features and labels of so many episodes."""
    torch.manual_seed(1)
    late, labels = torch.randn(size, 2, WIDTH, GRID, GRID), (torch.rand(size, 2, RES_PX, RES_PX) > 0.5)
    embedding = torch.randn(size, paper.EMBEDDING_CHANNELS, GRID, GRID)
    masks = labels[:, 1:].float()
    return EpisodeBatch([], late[:, 1:], masks, late[:, 0], embedding, labels[:, 0].to(torch.uint8))


def made(make: Callable[[], tuple[torch.nn.Module, Work]], device: str) -> tuple[torch.nn.Module, Work]:
    """Network, weights and inputs on the device."""
    with torch.device(device):
        return make()


def run(work: Work, device: str, precision: str) -> float:
    """Seconds of one run."""
    amp = torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()
    started = time.perf_counter()
    with torch.no_grad(), amp:
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def memory(settings: Settings) -> dict[str, float]:
    """Peak of one part above its weights and inputs in this process, and the weights, in MB."""
    torch.manual_seed(0)
    every = PARTS | {name: make for group in CORRELATIONS.values() for name, make in group.items()}
    net, work = made(every[settings.part], settings.device)  # type: ignore[index]
    weights = sum(p.nbytes for p in net.parameters()) / 1e6
    torch.ones(64, 64, device=settings.device) @ torch.ones(64, 64, device=settings.device)  # the library's own buffers
    if settings.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(work, settings.device, settings.precisions[0])
        return {"weights_mb": weights, "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
    before = psutil.Process().memory_info().rss
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    run(work, settings.device, settings.precisions[0])
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"weights_mb": weights, "peak_mb": (int(peak.split()[1]) * 1024 - before) / 1e6}


def memory_of(part: str, settings: Settings, precision: str) -> dict[str, float]:
    """The same in a process of its own, whose allocator gives back what is freed."""
    line = [sys.executable, "-m", "tests.benchmarks.bench_networks", "--part", part, "--device", settings.device]
    done = subprocess.run(
        [*line, "--precisions", precision],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def times(make: Callable[[], tuple[torch.nn.Module, Work]], settings: Settings, precision: str) -> list[float]:
    """Medians of a part's runs, plain and if so set compiled."""
    _, work = made(make, settings.device)
    rounds = 3 if make is teacher else settings.rounds
    found = []
    for way in (work, torch.compile(work)) if settings.compile else (work,):
        run(way, settings.device, precision)
        found.append(statistics.median(run(way, settings.device, precision) for _ in range(rounds)))
    return found


def paired(group: dict[str, Callable], settings: Settings, precision: str) -> dict[str, list[float]]:
    """Seconds of each contender in every round, in turn."""
    works = {name: made(make, settings.device)[1] for name, make in group.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(settings.rounds + 2):
        for name, work in works.items():
            took = run(work, settings.device, precision)
            if number >= 2:
                seconds[name].append(took)
    return seconds


def errors(make: Callable[[], tuple[torch.nn.Module, Work]], device: str) -> dict[str, list[float]]:
    """For each feature of an encoder or teacher, its relative error in bfloat16 and in float16."""
    torch.manual_seed(0)
    _, work = made(make, device)

    def features(precision: torch.dtype | None) -> dict[str, torch.Tensor]:
        with torch.no_grad(), nullcontext() if precision is None else torch.autocast(device, precision):
            out: Any = work()
        named = out._asdict() if isinstance(out, Features) else {"embedding": out}
        return {f"{make.__name__}, {name}": value.float() for name, value in named.items()}

    exact = features(None)
    halves = [features(precision) for precision in (torch.bfloat16, torch.float16)]
    return {name: [float((half[name] - x).norm() / x.norm()) for half in halves] for name, x in exact.items()}


def main(settings: Settings) -> None:
    """All parts, then the pairs."""
    if settings.part:
        print(json.dumps(memory(settings)))
        return
    compiled = " ms compiled |" if settings.compile else ""
    lines = [*head(settings), "", f"| | precision | ms |{compiled} peak above weights, MB | weights, MB |"]
    lines.append("|" + "---|" * (lines[-1].count("|") - 1))
    for name, make in PARTS.items():
        for precision in settings.precisions:
            spent = " | ".join(f"{1e3 * seconds:.1f}" for seconds in times(make, settings, precision))
            used = memory_of(name, settings, precision)
            lines.append(f"| {name} | {precision} | {spent} | {used['peak_mb']:.0f} | {used['weights_mb']:.0f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", "## Support and query features to the reduced correlation", ""]
    lines += ["| | precision | | ms | time over plain (quartiles) | MB | memory over plain |", "|" + "---|" * 7]
    for title, group in CORRELATIONS.items():
        for precision in settings.precisions:
            seconds = paired(group, settings, precision)
            used = {name: memory_of(name, settings, precision)["peak_mb"] for name in group}
            base = next(iter(group))
            for name, values in seconds.items():
                ratios = [own / other for own, other in zip(values, seconds[base], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                lines.append(
                    f"| {title} | {precision} | {name.strip()} | {1e3 * statistics.median(values):.1f} | "
                    f"{middle:.2f} ({low:.2f} to {high:.2f}) | {used[name]:.1f} | {used[name] / used[base]:.2f} |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", "## Halves: relative L2 error of the features under autocast, against float32", ""]
    lines += ["| | bfloat16 | float16 |", "|---|---|---|"]
    for make in (encoder, teacher):
        lines += [f"| {name} | {half[0]:.4f} | {half[1]:.4f} |" for name, half in errors(make, settings.device).items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if settings.out:
        settings.out.write_text(text)


def head(settings: Settings) -> list[str]:
    """What was run, where and when."""
    machine = torch.cuda.get_device_name() if settings.device == "cuda" else None
    command = f"python -m tests.benchmarks.bench_networks --device {settings.device}"
    return [
        "# The networks at full size",
        "",
        f"{provenance(command, machine)}, torch {torch.__version__}: random weights, seed 0, batch 1 unless said. "
        f"Medians of {settings.rounds} runs (the teacher's: 3). Memory is what a process of its own needed above "
        "weights and inputs.",
    ]


if __name__ == "__main__":
    main(tyro.cli(Settings))
