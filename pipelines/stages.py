"""Picklable Ray Data operators of the extraction jobs: tasks that read, actors that compute and write.

One unit is one shard, and the unit of work and of retry: a killed task or actor leaves either a finished shard or none.
What travels between them is an Outcome, pixels beside it as an array.
"""

import functools
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from feature_store import FeatureStore, Fingerprint, Row, ShardWriter, StoreError, StoreFault
from feature_store.urls import is_url, redacted
from fsdino.data.photographs import file_stamps
from fsdino.data.views import draw_view
from fsdino.errors import DataWarning, UserError
from fsdino.preprocess import read_image, resize_square
from pipelines.meters import ExtractionMeter
from pipelines.networks import NetworkPlan
from pipelines.outcome import EXPECTED, Outcome
from pipelines.recipes import Extraction


class Unit(NamedTuple):
    """One shard of all stores that share resolution and rows."""

    shard: int
    res_px: int
    rows: tuple[Row, ...]
    urls: tuple[str, ...]
    features: tuple[str, ...]
    """Which feature each of the stores keeps."""
    stamps: tuple[str, ...]
    """Of each row's source."""


@dataclass(frozen=True)
class Item:
    """Units that need the same images: one task reads them."""

    units: tuple[Unit, ...]


class Loaded(NamedTuple):
    """A unit whose pixels or features have been read; `bad` maps positions to the reason why they could not be."""

    unit: Unit
    bad: dict[int, str]
    notes: list[str]
    """What was unusual about images that could be read."""


class Written(NamedTuple):
    """A unit that is in its stores."""

    images: int
    bytes: int
    bad: dict[str, str]
    """Ids of quarantined images, and why."""
    notes: list[str]
    """What was unusual about the others."""


class Read(Protocol):
    """A task that brings what the network works on."""

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """An item in; `outcome` (of Loaded), `pixels` and `sizes` of each of its units out, or one with an error."""
        ...

    def readable(self, row: Row) -> bool:
        """Whether a row that was quarantined can be read by now."""
        ...

    def place(self, rows: Sequence[Row]) -> str:
        """A path or URL that tells whether a node can read the rows."""
        ...

    def stamps(self, rows: Sequence[Row]) -> list[str]:
        """What tells of each row whether its source has changed since."""
        ...


class Decode:
    """Task: the pixels of an item's images, square, under each view and at each size that its units want."""

    def __init__(self, view_seed: int, on_bad_image: str):
        self.view_seed, self.on_bad_image = view_seed, on_bad_image

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """See Read. Pixels are (n, r, r, 3)."""
        yield from _guarded(self._decode(item["item"].units))

    def _decode(self, units: Sequence[Unit]) -> Iterator[dict[str, Any]]:
        pixels = [np.zeros((len(unit.rows), unit.res_px, unit.res_px, 3), np.uint8) for unit in units]
        sizes = [np.zeros((len(unit.rows), 2), np.int32) for unit in units]
        bad: list[dict[int, str]] = [{} for _ in units]
        wanted: dict[str, list[tuple[int, int]]] = {}
        for number, unit in enumerate(units):
            for slot, row in enumerate(unit.rows):
                wanted.setdefault(row.source, []).append((number, slot))
        notes: list[str] = []
        for source, positions in wanted.items():  # one decoded photograph in memory at a time
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", DataWarning)
                    image = read_image(source)
                notes += [str(w.message) for w in caught if issubclass(w.category, DataWarning)]
            except UserError as error:
                reason = str(error).replace(source, redacted(source))
                if not is_url(source) and not os.path.isdir(os.path.dirname(source)):
                    raise StoreFault(
                        f"{os.path.dirname(source)}: the folder is gone; bring it back and rerun"
                    ) from None
                if self.on_bad_image == "fail":
                    raise UserError(reason) from None
                for number, slot in positions:
                    bad[number][slot] = reason
                continue
            except OSError as error:
                reason = str(error).replace(source, redacted(source))
                raise StoreFault(f"{redacted(source)}: {reason}; fix this and rerun to resume") from None
            for number, slot in positions:
                row = units[number].rows[slot]
                view = draw_view(self.view_seed, row.sample_id, row.view)
                pixels[number][slot] = resize_square(view.image(image), units[number].res_px)
                sizes[number][slot] = image.size
        for number, unit in enumerate(units):
            yield _loaded(unit, bad[number], pixels[number], sizes[number], notes if number == 0 else [])

    def readable(self, row: Row) -> bool:
        """See Read."""
        try:
            read_image(row.source)
        except (UserError, OSError):
            return False
        return True

    def place(self, rows: Sequence[Row]) -> str:
        """See Read. The first photograph."""
        return rows[0].source

    def stamps(self, rows: Sequence[Row]) -> list[str]:
        """See Read."""
        found = file_stamps(list(dict.fromkeys(row.source for row in rows)))
        return [found.get(row.source, "") for row in rows]


def known_rows(rows: Sequence[Row], *stores: FeatureStore) -> tuple[list[int], dict[int, str]]:
    """Where rows lie in stores that have them all, in the same order; and by position which of them are quarantined in
    one of these, and why."""
    found = stores[0].samples.find([row.sample_id for row in rows], [row.view for row in rows])
    known = [row for row in found if row is not None]
    assert len(known) == len(rows)
    reasons = {slot: reason for slot, row in enumerate(rows) for s in stores if (reason := s.quarantined.get(row[:2]))}
    return known, reasons


class ReadStored:
    """Task: stored features in the place of pixels; quarantined samples stay so."""

    def __init__(self, url: str, fingerprint: Fingerprint):
        self.url, self.fingerprint = url, fingerprint

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """See Read. Pixels are features (n, g, g, c); sizes and reasons are the store's manifest's."""
        yield from _guarded(self._read(item["item"].units))

    def _read(self, units: Sequence[Unit]) -> Iterator[dict[str, Any]]:
        store = _opened(self.url, self.fingerprint)
        for unit in units:
            rows, bad = known_rows(unit.rows, store)
            yield _loaded(unit, bad, np.nan_to_num(store.read(rows)), store.sizes[rows], [])

    def readable(self, row: Row) -> bool:
        """See Read."""
        return row[:2] not in _opened(self.url, self.fingerprint).quarantined

    def place(self, rows: Sequence[Row]) -> str:
        """See Read. The store."""
        return self.url

    def stamps(self, rows: Sequence[Row]) -> list[str]:
        """See Read. The same as the store's: what changes there has to be computed again here."""
        store = _opened(self.url, self.fingerprint)
        return [stamp or "" for stamp in store.stamps([row.sample_id for row in rows], [row.view for row in rows])]


@functools.cache
def _opened(url: str, fingerprint: Fingerprint) -> FeatureStore:
    """A store of that fingerprint, opened once in a process."""
    return FeatureStore(url, asdict(fingerprint))


def _loaded(unit: Unit, bad: dict[int, str], pixels: np.ndarray, sizes: np.ndarray, notes: list[str]) -> dict[str, Any]:
    return {"outcome": Outcome(value=Loaded(unit, bad, notes)), "pixels": pixels, "sizes": sizes}


def _guarded(loaded: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What a task yields, an expected error as its last outcome."""
    try:
        yield from loaded
    except EXPECTED as error:
        nothing = {"pixels": np.zeros((0, 1, 1, 3), np.uint8), "sizes": np.zeros((0, 2), np.int32)}
        yield {"outcome": Outcome(error=error), **nothing}


class Extract:
    """Actor: the network over a shard, then the shard and its marker into every store.

    Ray calls it from two threads, so that one shard is written while the next is computed; a thread of its own runs
    the network.
    """

    def __init__(self, network: NetworkPlan, builds: Mapping[str, str], settings: Extraction):
        self.builds = builds
        self.meter = ExtractionMeter("+".join(sorted({url.rstrip("/").rsplit("/", 1)[-1] for url in builds})))
        self.thread = ThreadPoolExecutor(1)
        self.forward: Outcome[Any] = self.thread.submit(Outcome.of, lambda: _forward(network, settings)).result()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of one loaded unit in, its `outcome` (of Written) out."""
        return {"outcome": np.array([Outcome.of(lambda: self._write(batch))], object)}

    @functools.cached_property
    def writers(self) -> dict[str, ShardWriter]:
        """Of each store; opened at the first shard, where an error can still be told."""
        writers = {url: ShardWriter(url) for url in self.builds}
        for url, build in self.builds.items():
            if writers[url].build_id != build:
                raise StoreError(f"{url}: another job recreated this store since this one began; stop this one")
        return writers

    def _write(self, batch: dict[str, np.ndarray]) -> Written:
        unit, bad, notes = batch["outcome"][0].get()
        forward, writers = self.forward.get(), self.writers
        pixels, sizes = batch["pixels"][0], batch["sizes"][0]
        wanted = tuple(dict.fromkeys(unit.features))
        features, seconds = self.thread.submit(_timed, forward, pixels, wanted).result()
        sized = [(int(w), int(h)) for w, h in sizes]
        written = sum(
            writers[url].write(unit.shard, features[name], sized, bad, unit.stamps)
            for url, name in zip(unit.urls, unit.features, strict=True)
        )
        self.meter.add(len(pixels), written, seconds)
        reasons = {unit.rows[slot].sample_id: reason for slot, reason in bad.items()}
        return Written(len(pixels), written, reasons, notes)


def _timed(forward: Any, pixels: np.ndarray, wanted: tuple[str, ...]) -> tuple[Any, float]:
    """The features, and the seconds they took."""
    began = time.perf_counter()
    return forward(pixels, wanted), time.perf_counter() - began


def _forward(network: NetworkPlan, settings: Extraction) -> Any:
    """The network on its device. Torch is loaded only here: tasks that decode do without."""
    from pipelines.forward import Forward

    return Forward(network.build(), settings)
