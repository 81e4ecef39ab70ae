"""Opening a store of ten million samples: the time until a sample can be asked for, and the memory of the process.

    python -m tests.benchmarks.bench_manifest --folder /tmp/manifest --out docs/benchmarks/manifest.md

The manifest is as an extraction of SA-1B would write it, but made up: no features are behind it.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro

from feature_store import FeatureStore, Fingerprint, Row, create, layout, manifest
from tests.benchmarks.provenance import provenance


@dataclass(frozen=True)
class Settings:
    """Benchmark the opening of large stores."""

    folder: Path
    """Where the store goes."""
    samples: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    rounds: int = 3
    open: Path | None = None
    """Open this store once and print what it took as JSON; what the benchmark starts its processes with."""
    out: Path | None = None
    """Markdown file to write."""


def main(settings: Settings) -> None:
    """Make, open in processes of their own, compare."""
    if settings.open is not None:
        print(json.dumps(opened(settings.open)))
        return
    rows = []
    for samples in settings.samples:
        store = settings.folder / f"teacher@{samples}"
        made_up(store, samples)
        line = [sys.executable, "-m", "tests.benchmarks.bench_manifest", "--folder", str(settings.folder)]
        line += ["--open", str(store)]
        found = [
            json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
            for _ in range(settings.rounds)
        ]
        cells = [f"{samples:,}", f"{(store / layout.MANIFEST).stat().st_size / 1e6:.0f}"]
        for name, form in (("opened", ".2f"), ("first", ".2f"), ("later", ".3f"), ("gb", ".2f")):
            cells.append(", ".join(format(one[name], form) for one in found))
        rows.append(f"| {' | '.join(cells)} |")
    text = "\n".join(
        [
            "# Opening large stores",
            "",
            f"{provenance('python -m tests.benchmarks.bench_manifest')}. Each round is a process of its own.",
            "",
            "| samples | manifest, MB | opened, s | first 32 samples found, s | 32 others, ms | largest memory, GB |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )
    print(text)
    if settings.out is not None:
        settings.out.write_text(text + "\n")


def made_up(store: Path, samples: int) -> None:
    """A sealed store of that many samples of SA-1B."""
    fingerprint = Fingerprint("teacher", "sam_vit_h", "w", "neck", "none", 1024, 64, 256, 0, "p")
    create(str(store), fingerprint, [Row("sa_0", 0, "-")])
    number = np.arange(samples)
    names = pc.binary_join_element_wise("sa_", pa.array(number).cast(pa.string()), "")
    folders = pc.binary_join_element_wise("sa_", pa.array(number // 11186).cast(pa.string()), "")
    sides, random = pa.array(np.full(samples, 1500, np.int32)), np.random.default_rng(0)
    stamps = pa.array(random.integers(1e5, 1e6, samples)).cast(pa.string())
    table = {
        "sample_id": names,
        "view": pa.array(np.zeros(samples, np.int32)),
        "source": pc.binary_join_element_wise("s3://sa-1b/images/", folders, "/", names, ".jpg", ""),
        "width": sides,
        "height": sides,
        "checksum": pa.array(random.integers(0, 2**32, samples, dtype=np.uint32)),
        "stamp": pc.binary_join_element_wise(stamps, "-1690000000000000000", ""),
        "quarantine": pa.nulls(samples, pa.string()),
    }
    pq.write_table(pa.table(table), store / layout.MANIFEST)
    files = {name: (store / name).read_bytes() for name in (layout.ARRAY, layout.MANIFEST)}
    (store / layout.SEAL).write_bytes(manifest.seal_bytes(files))


def opened(store: Path) -> dict[str, float]:
    """Seconds to open it and to find samples, and the most memory that the process ever had."""
    started = time.perf_counter()
    found = FeatureStore(str(store))
    took = time.perf_counter() - started
    chosen = np.random.default_rng(1).integers(0, len(found), (2, 32))
    times = []
    for numbers in chosen:
        started = time.perf_counter()
        assert found.row_numbers([f"sa_{n}" for n in numbers], [0] * 32) == numbers.tolist()
        times.append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"opened": took, "first": times[0], "later": 1e3 * times[1], "gb": memory}


if __name__ == "__main__":
    main(tyro.cli(Settings))
