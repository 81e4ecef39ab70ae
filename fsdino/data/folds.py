"""Which classes a fold tests, and which of its images may train (protocols `pfenet` in the docs)."""

from collections.abc import Mapping

from fsdino.errors import UserError


def novel_classes(fold: int, num_classes: int, num_folds: int = 4) -> list[int]:
    """The classes fold f tests: PASCAL-5i's consecutive blocks, 5f+1 ... 5f+5 for 20 classes (ids start at 1)."""
    if not 0 <= fold < num_folds:
        raise UserError(f"--fold {fold}: expected 0 to {num_folds - 1}")
    per_fold = num_classes // num_folds
    return list(range(fold * per_fold + 1, (fold + 1) * per_fold + 1))


def base_images(
    pixels: Mapping[str, Mapping[int, int]], novel: list[int], min_pixels: int, keep_novel: bool = False
) -> dict[str, list[int]]:
    """Images that may train, each with the base classes that count in it.

    `pixels` maps an image to its classes' pixel counts. An image with a single novel pixel is dropped, as HDMNet does
    (`keep_novel` keeps it, as HSNet does: novel pixels are background then).
    """
    images = {}
    for image_id, counts in pixels.items():
        if not keep_novel and any(class_id in novel for class_id in counts):
            continue
        classes = [c for c, n in counts.items() if c not in novel and n >= min_pixels]
        if classes:
            images[image_id] = sorted(classes)
    return images


def novel_images(pixels: Mapping[str, Mapping[int, int]], novel: list[int], min_pixels: int) -> dict[str, list[int]]:
    """Images that test the fold, each with the novel classes that count in it."""
    images = {i: sorted(c for c, n in counts.items() if c in novel and n >= min_pixels) for i, counts in pixels.items()}
    return {image_id: classes for image_id, classes in images.items() if classes}
