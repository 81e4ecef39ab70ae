"""An extraction job: plan what the stores lack, run it on Ray Data, seal.

Tasks decode images, actors compute and write whole shards (stages.py). A pass may fill several stores, of several
resolutions: each image is decoded once for all its views and sizes. A rerun does only what is missing.
"""

import logging
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from feature_store import Fingerprint, Row, ShardWriter, StoreError, create, extend
from feature_store.layout import ARRAY, num_shards, shard_rows
from feature_store.lock import locked
from feature_store.schema import text
from feature_store.storage import open_folder
from feature_store.urls import redacted, redacted_text
from fsdino.data.dataset import Dataset, Split
from fsdino.data.photographs import same_file
from fsdino.data.views import PLAIN
from fsdino.errors import UserError
from pipelines import checkpoints, cluster, datasets, ray_messages
from pipelines.networks import NetworkPlan
from pipelines.outbox import Outbox
from pipelines.recipes import Extraction, Photographs, Places
from pipelines.runs import About, Input
from pipelines.stages import Extract, Item, Read, Unit, Written

if TYPE_CHECKING:
    from pipelines.tracking import Run

IMAGES_PER_ITEM = 32
NOTES_SHOWN = 5
TOLD_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Target:
    """A store that a pass fills."""

    url: str
    fingerprint: Fingerprint
    rows: Sequence[Row]


def read_rows(
    places: Places, photographs: Photographs, splits: Sequence[Split], num_views: int, test_view: int = PLAIN
) -> tuple[str, list[Row]]:
    """The name of what is to be extracted, and its rows: photographs of a place, or else splits of the data set."""
    if photographs.images is not None:
        return datasets.photographs_name(photographs), [
            Row(image_id, PLAIN, source) for image_id, source in datasets.listed(photographs, places.skip_bad).items()
        ]
    dataset = datasets.dataset_of(places)
    there = [split for split in splits if split in dataset.splits]
    if not there:
        raise UserError(f"{places.data}: expected a list of {' or '.join(splits)} images, but {dataset.name} has none")
    return dataset.name, plan_rows(dataset, there, num_views, test_view)


def photographs_input(places: Places, photographs: Photographs, name: str, rows: Sequence[Row]) -> Input:
    """What an extraction reads, as MLflow lists it."""
    ids = sorted({text(row.sample_id) for row in rows})
    place = photographs.images or places.data
    return Input(name, checkpoints.short_digest(ids), place, "training", {"images": len(ids), "rows": len(rows)})


def plan_rows(dataset: Dataset, splits: Sequence[Split], num_views: int, test_view: int = PLAIN) -> list[Row]:
    """Every image of the splits under view 0, training images under the augmented views too, test images under the
    one that the protocol sees them under."""
    rows: dict[tuple[str, int], Row] = {}
    for split in splits:
        views = range(num_views) if split == "train" else dict.fromkeys((PLAIN, test_view))
        for image_id in dataset.ids(split):
            source = dataset.source(image_id)
            rows |= {(image_id, view): Row(image_id, view, source) for view in views}
    return list(rows.values())


def plan_items(
    targets: Sequence[Target], missing: Mapping[str, Sequence[int]], stamps: Mapping[tuple[str, int], str]
) -> list[Item]:
    """The missing shards of each store, as units, grouped by the images they need.

    32 images make a group, and a unit belongs to the group of its first row. So each image is decoded once for all its
    views and resolutions, or twice where a shard reaches into the next group.
    """
    order: dict[str, int] = {}
    for target in targets:
        for row in target.rows:
            order.setdefault(row.source, len(order))
    merged: dict[tuple[int, int, tuple[Row, ...]], list[Target]] = {}
    for target in targets:
        for shard in missing[target.url]:
            inside = shard_rows(shard, len(target.rows))
            rows = tuple(target.rows[inside.start : inside.stop])
            merged.setdefault((shard, target.fingerprint.res_px, rows), []).append(target)
    items: dict[int, list[Unit]] = {}
    for (shard, res_px, rows), together in merged.items():
        urls, features = tuple(t.url for t in together), tuple(t.fingerprint.feature for t in together)
        group = order[rows[0].source] // IMAGES_PER_ITEM
        stamped = tuple(stamps.get(row[:2], "") for row in rows)
        items.setdefault(group, []).append(Unit(shard, res_px, rows, urls, features, stamped))
    return [Item(tuple(items[group])) for group in sorted(items)]


def extract(
    network: NetworkPlan,
    read: Read,
    targets: Sequence[Target],
    settings: Extraction,
    tracking_uri: str,
    dataset: str,
    inputs: tuple[Input, ...],
) -> dict[str, Any]:
    """Fill the stores and seal them.

    Prints the plan, shows progress, does only the shards that some store lacks. Images that a store does not know yet
    are added behind its others; those that have changed since are named, and computed again with `settings.refresh`.
    Images that cannot be read are quarantined up to `settings.max_bad_share` of them; while a store is unfinished, one
    that was repaired since is read again. Returns counts for the summary; a run that computed anything is also in
    MLflow's experiment `extract/DATASET`, with its `inputs`.

    Raises UserError if more images cannot be read, StoreError if another store or another job is in the way, and
    ClusterFault.
    """
    started = time.perf_counter()
    needs = needed(network, read, targets)
    if not all(begun(target.url) for target in targets):  # else it may be that nothing is left to do
        cluster.prepare(*demands(settings), needs)
    writers = {target.url: create(target.url, target.fingerprint, target.rows, grown=True) for target in targets}
    wanted = list({row[:2]: row for target in targets for row in target.rows}.values())
    stamps = {row[:2]: stamp for row, stamp in zip(wanted, read.stamps(wanted), strict=True)}
    bad: dict[str, str] = {}
    samples = {(target.fingerprint.res_px, row[:2]) for target in targets for row in target.rows}
    done: dict[str, Any] = {"stores": list(writers), "samples": len(samples)}
    changed: dict[str, set[int]] = {}
    for target in targets:
        writer = writers[target.url]
        since = changed_rows(writer, current_rows(writer, target.rows), stamps)
        check_same_set(writer, since, target.rows, settings)
        changed |= since
    finished = all(writers[t.url].sealed() and not writers[t.url].missing() for t in targets)
    if finished and not any(writers[t.url].lacks(t.rows) for t in targets) and not (changed and settings.refresh):
        for writer in writers.values():
            bad |= {writer.rows[row].sample_id: reason for row, reason in writer.seal().items()}
            deliver(writer, tracking_uri)
        print(f"nothing to do: {', '.join(writers)}", file=sys.stderr)
        tell_changed(changed)
        return {**done, "computed": 0, "bytes": 0, "quarantined": len(bad), "changed": len(changed), "seconds": 0.0}
    cluster.prepare(*demands(settings), needs)
    with ExitStack() as stack:
        locks = [stack.enter_context(locked(writers[url].folder)) for url in sorted(writers)]
        # Once more, as another job may have been there until the locks were ours.
        writers = {target.url: create(target.url, target.fingerprint, target.rows, grown=True) for target in targets}
        name = "+".join(f"{target.fingerprint.feature}@{target.fingerprint.res_px}" for target in targets)
        params = asdict(settings) | {"samples": len(samples)}
        for target in targets:
            params |= {f"store.{target.fingerprint.feature}.{target.fingerprint.res_px}": redacted(target.url)}
        from pipelines import tracking

        about = About("extract", dataset, name, params, inputs)
        with tracking.running(tracking_uri, about, outbox=Outbox(targets[0].url)) as run:
            if any(writers[t.url].lacks(t.rows) for t in targets):
                cluster.connect(*demands(settings))  # before a store that is whole is opened again
            writers = {t.url: extend(writers[t.url], t.rows) for t in targets}
            listed = {text(row.sample_id) for target in targets for row in target.rows}
            images = len({row.source for target in targets for row in target.rows})
            targets = [Target(t.url, t.fingerprint, current_rows(writers[t.url], t.rows)) for t in targets]
            changed = {}
            for target in targets:
                writer = writers[target.url]
                bad |= known_bad(writer, target.rows, read)
                since = changed_rows(writer, target.rows, stamps)
                changed |= since
                for shard in sorted(set().union(*since.values())) if settings.refresh else ():
                    writer.invalidate(shard)
            if not settings.refresh:
                tell_changed(changed)
            missing = {url: writer.missing() for url, writer in writers.items()}
            items = plan_items(targets, missing, stamps)
            computed = sum(len(unit.rows) for item in items for unit in item.units)
            show_plan(writers, missing, items)
            for url, writer in writers.items():
                if missing[url] and writer.sealed():  # after a repair that was stopped half-way
                    writer.unseal()
            check_bad(bad, listed, images, settings)
            builds = {url: writer.build_id for url, writer in writers.items()}
            written, notes, told = 0, [], (time.perf_counter(), 0)
            with closing(Progress(computed, settings)) as progress, cluster.watched(progress.lose):
                for unit in run_units(network, read, builds, items, settings) if items else ():
                    progress.add(unit.images)
                    progress.log_lost(run)
                    written += unit.bytes
                    bad |= unit.bad
                    notes += unit.notes
                    now, images_done = time.perf_counter(), progress.bar.n
                    if now > told[0] + TOLD_EVERY_SECONDS:
                        rate, told = (images_done - told[1]) / (now - told[0]), (now, images_done)
                        run.log(images_done, images_per_second=rate, gigabytes=written / 1e9)
                        run.measure_machine(images_done)
                        run.flush()
                    check_bad(bad, listed, images, settings)
                    for lock in locks:
                        lock.check()
            for lock in locks:
                lock.beat()
                lock.check()
            for writer in writers.values():
                writer.seal()
            seconds = round(time.perf_counter() - started, 1)
            run.log(0, computed=computed, bytes=written, quarantined=len(bad), seconds=seconds)
    for sample_id, reason in sorted(bad.items()):
        print(f"quarantined {sample_id!r}: {reason}", file=sys.stderr)
    for said in notes[:NOTES_SHOWN]:
        print(f"note: {redacted_text(said)}", file=sys.stderr)
    if len(notes) > NOTES_SHOWN:
        print(f"note: and {len(notes) - NOTES_SHOWN} more images", file=sys.stderr)
    counts = {"computed": computed, "bytes": written, "quarantined": len(bad)}
    return {**done, **counts, "changed": 0 if settings.refresh else len(changed), "seconds": seconds}


def current_rows(writer: ShardWriter, rows: Sequence[Row]) -> list[Row]:
    """The store's rows, with the sources that this job knows: the data may have moved since the plan was written."""
    known = {(text(row.sample_id), row.view): row for row in rows}
    return [known.get(row[:2], row) for row in writer.rows]


def changed_rows(
    writer: ShardWriter, rows: Sequence[Row], stamps: Mapping[tuple[str, int], str]
) -> dict[str, set[int]]:
    """Images that have changed since their shards were written, and the shards. `rows` are the store's."""
    done = sorted(set(range(num_shards(len(rows)))) - set(writer.missing()))
    changed: dict[str, set[int]] = {}
    for shard, marker in writer.markers(done).items():
        inside = shard_rows(shard, len(rows))
        for row, planned, stamp in zip(
            rows[inside.start : inside.stop],
            writer.rows[inside.start : inside.stop],
            marker.stamp if marker else (),
            strict=False,  # a store of an earlier release has no stamps
        ):
            moved = text(redacted(row.source)) != planned.source
            if not same_file(stamp, stamps.get(row[:2], ""), moved):
                changed.setdefault(row.sample_id, set()).add(shard)
    return changed


def check_same_set(
    writer: ShardWriter, changed: Mapping[str, set[int]], rows: Sequence[Row], settings: Extraction
) -> None:
    """Raise StoreError if most photographs of the same names are others: another set, rather than one that changed."""
    common = {row.sample_id for row in rows} - {row.sample_id for row in writer.lacks(rows)}
    if len(common) > 1 and 2 * len(changed) > len(common) and not settings.refresh:
        raise StoreError(
            f"{writer.url}: {len(changed)} of {len(common)} photographs are others than those that were extracted; "
            "choose another --store for another data set, or --refresh this one"
        )


def tell_changed(changed: Mapping[str, set[int]]) -> None:
    """Name images that have changed."""
    if changed:
        print(
            f"note: {len(changed)} images have changed since they were extracted (the first: {next(iter(changed))}); "
            "--refresh computes them again",
            file=sys.stderr,
        )


def deliver(writer: ShardWriter, tracking_uri: str) -> None:
    """Send MLflow what an earlier run of this store could not."""
    outbox = Outbox(writer.url)
    if outbox.waiting():
        from pipelines import tracking

        tracking.deliver(tracking_uri, outbox)


def run_units(
    network: NetworkPlan, read: Read, builds: Mapping[str, str], items: Sequence[Item], settings: Extraction
) -> Iterator[Written]:
    """The Ray Data job: each unit as it is written. `builds` are the stores' build ids.

    Raises a task's or an actor's error, and ClusterFault if Ray itself breaks down; finished shards stay.
    """
    cluster.connect(*demands(settings))
    import ray.data
    from ray.data import ActorPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray_messages.divert_loggers()
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    # Tasks and actors ask for different amounts, else Ray Data would run the former inside the latter.
    loaded = data.flat_map(read, num_cpus=settings.decode_cpus)
    finished = loaded.map_batches(
        Extract,
        batch_size=1,
        compute=ActorPoolStrategy(
            size=settings.actors, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        num_cpus=settings.actor_cpus,
        num_gpus=settings.actor_gpus,
        fn_constructor_args=(network, builds, settings),
    )
    finished.set_name("extract " + " ".join(url.rsplit("/", 1)[-1] for url in builds))
    with cluster.faults():
        for row in finished.iter_rows():
            yield row["outcome"].get()


def demands(settings: Extraction) -> tuple[dict[str, float], str, str]:
    """What a job asks of a cluster, what that is for, and what to do where there is less."""
    amounts = {
        "CPU": settings.actors * settings.actor_cpus + settings.decode_cpus,
        "GPU": settings.actors * settings.actor_gpus,
    }
    cure = "lower --actors, --actor-cpus, --actor-gpus or --decode-cpus"
    return amounts, f"{settings.actors} actors and a decoding task", cure


def needed(network: NetworkPlan, read: Read, targets: Sequence[Target]) -> cluster.Needs:
    """What the job needs on every node."""
    return cluster.Needs(
        written=tuple(target.url for target in targets), read=(read.place(targets[0].rows),), weights=network.weights
    )


def begun(url: str) -> bool:
    """Whether a store is there, finished or not."""
    return ARRAY in open_folder(url).names("")


class Progress:
    """A progress bar, and once each actor has finished a shard, a line with the time that is left."""

    def __init__(self, images: int, settings: Extraction, title: str = "extracting"):
        starting = f"starting {settings.actors} actor{'s' if settings.actors > 1 else ''} (loading torch)"
        self.bar = tqdm(total=images, unit="img", desc=starting, mininterval=1, file=sys.stderr)
        self.title, self.actors, self.units = title, settings.actors, 0
        self.first = (0.0, 0)
        self.lost: list[str] = []
        """Nodes of the cluster that died meanwhile."""

    def lose(self, line: str) -> None:
        """Say what the cluster lost, and from where the job goes on."""
        self.lost.append(line)
        done = f"{self.bar.n} of {self.bar.total} images are written"
        self.bar.write(
            f"note: {line}; {done}, what that node was at is computed again on others, as often as need be",
            file=sys.stderr,
        )

    def log_lost(self, run: "Run") -> None:
        """Tell MLflow of the nodes that were lost, if any."""
        if self.lost:
            run.log(self.bar.n, lost_nodes=len(self.lost))
            run.file("\n".join(self.lost).encode(), "lost.txt")

    def add(self, images: int) -> None:
        """A unit of that many images is written."""
        if self.units == 0:
            self.bar.set_description(self.title, refresh=False)
        self.bar.update(images)
        self.units += 1
        now = time.monotonic()
        if self.units == 1:
            self.first = (now, self.bar.n)
        elif self.units == 1 + self.actors:
            rate = (self.bar.n - self.first[1]) / max(now - self.first[0], 1e-6)
            left = timedelta(seconds=max(1, round((self.bar.total - self.bar.n) / rate)))
            self.bar.write(f"about {left} to go, at {rate:.1f} images a second", file=sys.stderr)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


def known_bad(writer: ShardWriter, rows: Sequence[Row], read: Read) -> dict[str, str]:
    """Images that an earlier run quarantined, and why. Shards with one that can be read by now become missing.

    `rows` are this job's, as the data may have moved since the plan was written.
    """
    shards = sorted(set(range(num_shards(len(rows)))) - set(writer.missing()))
    bad: dict[Row, tuple[int, str]] = {}
    for shard, marker in writer.markers(shards).items():
        if marker is None:
            writer.invalidate(shard)
        else:
            inside = shard_rows(shard, len(rows))
            bad |= {rows[inside[slot]]: (shard, reason) for slot, reason in marker.quarantine.items()}
    with ThreadPoolExecutor() as pool:
        repaired = [row for row, good in zip(bad, pool.map(read.readable, bad), strict=True) if good]
    again = {bad[row][0] for row in repaired}
    for shard in again:
        writer.invalidate(shard)
    return {row.sample_id: reason for row, (shard, reason) in bad.items() if shard not in again}


def check_bad(bad: Mapping[str, str], listed: Collection[str], images: int, settings: Extraction) -> None:
    """Raise UserError if more images than allowed are quarantined, of those that the job lists."""
    counted = {image_id: reason for image_id, reason in bad.items() if image_id in listed}
    if len(counted) > settings.max_bad_share * images:
        first = next(iter(counted.values()))
        raise UserError(
            f"{len(counted)} of {images} images cannot be read, more than --max-bad-share {settings.max_bad_share:g} "
            f"(the first: {first}); repair or remove them, or raise the share, and rerun"
        )


def show_plan(writers: Mapping[str, ShardWriter], missing: Mapping[str, Sequence[int]], items: Sequence[Item]) -> None:
    """Say what is to be done, before it is begun."""
    for url, writer in writers.items():
        shards, rows = num_shards(len(writer.rows)), len(writer.rows)
        todo = sum(len(shard_rows(shard, rows)) for shard in missing[url])
        size = writer.nbytes / rows * todo
        print(
            f"{url}: {rows} samples, {shards - len(missing[url])} of {shards} shards done, "
            f"{todo} samples to compute, {size / 1e9:.2f} GB to write",
            file=sys.stderr,
        )
    images = len({row.source for item in items for unit in item.units for row in unit.rows})
    print(f"{images} images to read", file=sys.stderr)
