"""What one watches while a job runs: numbers of actors and workers, which Ray exports to Prometheus.

Every name begins with `fsdino_`, before which Prometheus has `ray_`; infra/grafana/fsdino.json shows them. Each metric
costs microseconds, and nothing where no Ray runs.
"""

import time
from dataclasses import dataclass
from functools import cache
from typing import Any


class ExtractionMeter:
    """Of an actor of an extraction."""

    def __init__(self, feature: str):
        self._tags = {"feature": feature}
        self._since, self._busy_s = time.perf_counter(), 0.0

    def add(self, images: int, written_bytes: int, network_s: float) -> None:
        """A unit is written, for which the network worked that long."""
        _counter("fsdino_images", "Images whose features are written").inc(images, self._tags)
        _counter("fsdino_bytes", "Bytes of features written").inc(written_bytes, self._tags)
        self._busy_s += network_s
        now = time.perf_counter()
        if now - self._since > 5:
            share = max(0.0, 1 - self._busy_s / (now - self._since))
            _gauge("fsdino_network_idle_share", "Share of the time that the network waits").set(share, self._tags)
            self._since, self._busy_s = now, 0.0


@dataclass(frozen=True)
class TrainingMeter:
    """Of a worker of a training."""

    run: str
    rank: int

    def add(self, samples: int) -> None:
        """A step is done on that many images or episodes, those of this worker."""
        _counter("fsdino_samples", "Images or episodes trained on").inc(samples, self._tags())
        _counter("fsdino_steps", "Steps of training").inc(1, self._tags())

    def tell(self, **values: float) -> None:
        """Numbers of now: losses, the share of the time that steps wait, the share of samples found in a cache."""
        for name, value in values.items():
            _gauge(f"fsdino_{name}", name.replace("_", " ")).set(value, self._tags())

    def _tags(self) -> dict[str, str]:
        return {"run": self.run, "rank": str(self.rank)}


@cache
def _counter(name: str, description: str) -> Any:
    from ray.util.metrics import Counter

    return Counter(name, description=description, tag_keys=_keys(name))


@cache
def _gauge(name: str, description: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description=description, tag_keys=_keys(name))


def _keys(name: str) -> tuple[str, ...]:
    extraction = name in ("fsdino_images", "fsdino_bytes", "fsdino_network_idle_share")
    return ("feature",) if extraction else ("run", "rank")
