"""The data set of a job under its protocol: opened, its images checked against the stores, left-out images reported."""

import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from upath import UPath

from feature_store import FeatureStore
from fsdino.data.dataset import Dataset, Split, differing_sizes, open_dataset
from fsdino.data.episodes import EpisodeSampler
from fsdino.data.lists import parse_ids
from fsdino.data.pairs import of_pairs, read_pairs
from fsdino.data.photographs import file_stamps, list_photographs, set_name
from fsdino.data.protocols import ImageClasses, Protocol, protocol_of
from fsdino.data.views import PLAIN
from fsdino.errors import DataError, UserError, reachable
from fsdino.preprocess import shown_size
from pipelines import stores
from pipelines.recipes import Benchmark, Photographs, Places
from pipelines.runs import Input

T = TypeVar("T")
TOLD = 20
OF_SCORING = ("scored_at", "align_corners", "scores_void")  # rules that flags may override
FOLDERS = ("JPEGImages", "SegmentationClassAug", "images", "masks", "train2014", "val2014", "train2017", "val2017")


@dataclass(frozen=True)
class Listing:
    """What a protocol or lists of one's own say may train or test."""

    images: dict[str, ImageClasses]
    pairs: list[tuple[str, int]] | None = None


@dataclass(frozen=True)
class Images:
    """What episodes are drawn from."""

    listed: dict[str, ImageClasses]
    pairs: list[tuple[str, int]] | None
    left_out: dict[str, int]
    """Images that are left out, by reason: without features, or of the list with labels that cannot be used."""


def sampler_of(images: Images, rules: Protocol, **how: Any) -> EpisodeSampler:
    """Episodes of these images, drawn as the protocol says; `how` are EpisodeSampler's own settings."""
    return EpisodeSampler(
        images.listed, order=rules.order, pairs=images.pairs, repeats_supports=rules.repeats_supports, **how
    )


def dataset_of(places: Places) -> Dataset:
    """The data set that the settings name, with lists of one's own. Raises UserError as `open_dataset`."""
    dataset = open_dataset(places.data, places.dataset)
    dataset.skip_bad = places.skip_bad
    lists: dict[Split, str | None] = {"train": places.train_list, "val": places.test_list}
    for split, place in lists.items():
        if place is not None:
            path = UPath(place)
            with reachable(path):
                try:
                    dataset.lists[split] = parse_ids(place, path.read_bytes(), FOLDERS, None)
                except FileNotFoundError:
                    raise DataError(f"{place}: expected a list of images, found nothing there") from None
    return dataset


def rules_of(benchmark: Benchmark, dataset: Dataset) -> Protocol:
    """The protocol for a data set, single rules overridden by flags."""
    rules = protocol_of(benchmark.protocol).of(dataset)
    given = {name: value for name in OF_SCORING if (value := getattr(benchmark, name)) is not None}
    if benchmark.pairs is not None:  # what is listed stands in the lists
        given |= {"min_pixels": 0, "listed_on_grid": False, "drops_novel": False, "draws_any_pixel": False}
    return replace(rules, **given)


def listing(
    dataset: Dataset,
    rules: Protocol,
    fold: int | None,
    split: Split,
    pairs: str | None,
    held_out: Collection[int] = (),
    validating: bool = False,
) -> Listing:
    """Images that train or test a fold, or train all classes. Base classes that are held out do not train;
    `validating`, they are all there is. Raises UserError for a fold that does not exist, and for labels that cannot be
    used, unless they are skipped."""
    dataset.novel(fold)
    training = split == "train"
    if pairs is not None:
        if fold is None:
            raise UserError("--pairs, --fold none: lists exist for folds only; name a fold, or leave --pairs out")
        listed = [p for p in read_pairs(pairs, dataset, fold, training) if (p[1] in held_out) == validating]
        return Listing(of_pairs(listed), listed)
    if validating:
        return Listing(rules.validation_images(dataset, fold, held_out))
    return Listing(rules.training_images(dataset, fold, held_out) if training else rules.test_images(dataset, fold))


def usable(
    dataset: Dataset, rules: Protocol, fold: int | None, split: Split, listed: Listing, opened: Sequence[FeatureStore]
) -> Images:
    """Those of the images whose labels are of their photographs' sizes, and whose features every store has.

    Raises UserError if an image is not in a store, or a label of another size; with `--skip-bad` such labels are left
    out instead, and named.
    """
    training = split == "train"
    images = stores.without_quarantined(listed.images, opened)
    left_out = {"quarantined": len(listed.images) - len(images)}
    if opened:
        stores.check_images(images, PLAIN if training else rules.test_view, *opened)
    sizes = stores.sizes_of(opened[0], images) if opened else _sizes_of_photographs(dataset, images)
    wrong = differing_sizes(dataset, split, sizes) | (images.keys() - sizes.keys())
    images = {image_id: classes for image_id, classes in images.items() if image_id not in wrong}
    of_split = set(dataset.ids(split))
    bad = {image_id: reason for image_id, reason in dataset.skipped.items() if image_id in of_split}
    left_out["bad_labels"] = len(bad)
    for reason in list(bad.values())[:TOLD]:
        print(f"skipped: {reason}", file=sys.stderr)
    if len(bad) > TOLD:
        print(f"skipped: and {len(bad) - TOLD} more images", file=sys.stderr)
    if dataset.skip_bad:
        images = _supported(dataset, images)
    if not training:
        _check_classes(dataset, fold, images)
    pairs = listed.pairs
    if pairs is not None:
        pairs = [(i, class_id) for i, class_id in pairs if i in images and class_id in images[i].listed]
    return Images(images, pairs, left_out)


def data_input(dataset: Dataset, split: Split, images: Iterable[str]) -> Input:
    """A split of the data set as MLflow lists what a run read; `images` are those in use."""
    profile = {"split": split, "listed": len(dataset.ids(split)), "used": len(list(images)), "kind": dataset.kind}
    context = "training" if split == "train" else "test"
    return Input(dataset.name, dataset.list_digest(split), str(dataset.root), context, profile)


def _sizes_of_photographs(dataset: Dataset, images: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(width, height) of photographs as they are shown. Raises UserError for one that cannot be read, or skips it."""

    def size(image_id: str) -> tuple[int, int] | None:
        try:
            return shown_size(dataset.source(image_id))
        except UserError as error:
            if not dataset.skip_bad:
                raise
            dataset.skipped[image_id] = error.args[0]
            return None

    wanted = list(images)
    with ThreadPoolExecutor() as pool:
        return {i: found for i, found in zip(wanted, pool.map(size, wanted), strict=True) if found is not None}


def _check_classes(dataset: Dataset, fold: int | None, images: Mapping[str, ImageClasses]) -> None:
    """Raise DataError if a novel class has no image, since the mean over classes would be another; or say so."""
    listed = {class_id for of_image in images.values() for class_id in of_image.listed}
    missing = [dataset.class_names[class_id - 1] for class_id in dataset.novel(fold) if class_id not in listed]
    if missing and images and not dataset.skip_bad:
        raise DataError(
            f"fold {fold}: expected test images of every class, got none for {', '.join(missing[:8])}, so scores would "
            "be of fewer classes; add images, or drop those classes with --skip-bad"
        )
    for name in missing if dataset.skip_bad else ():
        print(f"skipped: class {name}: no usable image shows it", file=sys.stderr)


def _supported(dataset: Dataset, images: Mapping[str, ImageClasses]) -> dict[str, ImageClasses]:
    """Without classes that a single image is listed for: they have no supports."""
    counts: dict[int, int] = {}
    for of_image in images.values():
        for class_id in of_image.listed:
            counts[class_id] = counts.get(class_id, 0) + 1
    kept = {class_id for class_id, count in counts.items() if count > 1}
    for class_id in sorted(set(counts) - kept):
        print(f"skipped: class {dataset.class_names[class_id - 1]}: one usable image shows it", file=sys.stderr)
    cut = {
        image_id: ImageClasses(
            tuple(c for c in of_image.listed if c in kept), tuple(c for c in of_image.drawn if c in kept)
        )
        for image_id, of_image in images.items()
    }
    return {image_id: of_image for image_id, of_image in cut.items() if of_image.listed}


def photographs_digest(dataset: Dataset, images: Sequence[str]) -> str:
    """Eight hex digits of which photographs these are, by what changes when a file does."""
    stamps = file_stamps([dataset.source(image_id) for image_id in images])
    return hashlib.sha256(json.dumps(sorted(stamps.items())).encode()).hexdigest()[:8]


def photographs_name(photographs: Photographs) -> str:
    """What a set of plain photographs is called."""
    assert photographs.images is not None
    return set_name(photographs.images, photographs.share, photographs.share_seed)


def listed(photographs: Photographs, skip_bad: bool) -> dict[str, str]:
    """Plain photographs by their ids; values are paths or URLs. Archives that are damaged are an error, or named."""
    assert photographs.images is not None
    skipped: dict[str, str] | None = {} if skip_bad else None
    found = list_photographs(photographs.images, photographs.share, photographs.share_seed, skipped)
    for reason in (skipped or {}).values():
        print(f"skipped: {reason}", file=sys.stderr)
    return found
