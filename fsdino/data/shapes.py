"""Generated photographs for demos and tests, in VOC's layout: textured objects over textured backgrounds.

A class is an outline with a texture. Colours of objects and backgrounds come from one distribution, so colour tells
nothing; an image holds several objects of different classes, which occlude each other at very different sizes.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from fsdino import paper
from fsdino.errors import UserError

Plane = Float[np.ndarray, "h w"]
Outline = Callable[[Plane, Plane], Bool[np.ndarray, "h w"]]
Texture = Callable[[Plane, Plane], Plane]

RADIUS_SHARE = (0.1, 0.32)  # of the image's side, log-uniform: areas differ by a factor of ten
OBJECTS = (2, 4)
BORDER_PX = 2  # void, as around VOC's objects
TEST_SHARE = 0.25
COMPLETE = "generated.json"


def _polygon(u: Plane, v: Plane, corners: int) -> Bool[np.ndarray, "h w"]:
    wedge = 2 * np.pi / corners
    angle = np.mod(np.arctan2(v, u) + wedge / 2, wedge) - wedge / 2
    return np.hypot(u, v) * np.cos(angle) < np.cos(wedge / 2)


def _heart(u: Plane, v: Plane) -> Bool[np.ndarray, "h w"]:
    x, y = 1.2 * u, -1.2 * v + 0.1
    return (x**2 + y**2 - 0.8) ** 3 < x**2 * y**3 * 1.2


def _arrow(u: Plane, v: Plane) -> Bool[np.ndarray, "h w"]:
    return ((np.abs(v) < 0.3) & (np.abs(u) < 0.95)) & (u < 0.1) | ((u >= 0.1) & (np.abs(v) < 1 - u) & (u < 1))


OUTLINES: dict[str, Outline] = {
    "disc": lambda u, v: np.hypot(u, v) < 0.95,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.82,
    "triangle": lambda u, v: _polygon(u, v, 3),
    "star": lambda u, v: np.hypot(u, v) < 0.65 + 0.35 * np.cos(5 * np.arctan2(v, u)),
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.32) & (np.maximum(np.abs(u), np.abs(v)) < 0.95),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) < 0.26,
    "crescent": lambda u, v: (np.hypot(u, v) < 0.98) & (np.hypot(u - 0.5, v) > 0.7),
    "hexagon": lambda u, v: _polygon(u, v, 6),
    "heart": _heart,
    "arrow": _arrow,
    "dome": lambda u, v: (np.hypot(u, v + 0.3) < 0.98) & (v < 0.35),
    "hourglass": lambda u, v: (np.abs(u) < np.maximum(np.abs(v), 0.2)) & (np.abs(v) < 0.92),
}
TEXTURES: dict[str, Texture] = {
    "dots": lambda u, v: (np.hypot(np.sin(9 * u), np.sin(9 * v)) < 0.75) * 1.0,
    "stripes": lambda u, v: (np.sin(20 * u) > 0) * 1.0,
    "checks": lambda u, v: (np.sin(11 * u) * np.sin(11 * v) > 0) * 1.0,
    "rings": lambda u, v: (np.sin(22 * np.hypot(u, v)) > 0) * 1.0,
    "mesh": lambda u, v: (np.minimum(np.abs(np.sin(10 * u)), np.abs(np.sin(10 * v))) < 0.3) * 1.0,
    "zigzag": lambda u, v: (np.sin(16 * (v + 0.25 * np.abs(np.mod(4 * u, 2) - 1))) > 0) * 1.0,
    "spokes": lambda u, v: (np.sin(14 * np.arctan2(v, u)) > 0) * 1.0,
    "waves": lambda u, v: 0.5 + 0.5 * np.sin(18 * v + 3 * np.sin(6 * u)),
    "bricks": lambda u, v: ((np.mod(5 * v, 1) < 0.2) | (np.mod(3 * u + 0.5 * (np.floor(5 * v) % 2), 1) < 0.12)) * 1.0,
    "bands": lambda u, v: 0.5 + 0.5 * np.sin(7 * (u + v)),
    "diamonds": lambda u, v: (np.sin(9 * (u + v)) + np.sin(9 * (u - v)) > 0.4) * 1.0,
    "crosses": lambda u, v: ((np.abs(np.sin(8 * u)) < 0.25) ^ (np.abs(np.sin(8 * v)) < 0.25)) * 1.0,
}
CLASSES = [f"{outline}-{texture}" for outline, texture in zip(OUTLINES, TEXTURES, strict=True)]


def write_shapes(root: str | Path, num_images: int, seed: int, side_px: int = 400) -> None:
    """Write a data set of 12 classes, three to a fold; a quarter of the images are for testing.

    Image i depends on (seed, i) alone, so a larger set begins with the smaller one's images. Takes 30 ms an image; a
    complete set is left as it is. Raises UserError if the folder already holds something else.
    """
    root = Path(root)
    lists = root / "ImageSets" / "Segmentation"
    listed = root / "classes.txt"
    ours = listed.exists() and listed.read_text().splitlines() == CLASSES
    if root.exists() and any(root.iterdir()) and not ours:
        raise UserError(f"{root}: expected an empty folder for generated data, found other files; choose another")
    drawn_from, complete = {"seed": seed, "side_px": side_px}, root / COMPLETE
    written = json.loads(complete.read_text()) if complete.exists() else None
    if written is not None and {**written, "images": 0} != {**drawn_from, "images": 0}:
        raise UserError(
            f"{root}: expected images of seed {seed}, side {side_px}, got others ({written}); choose another folder"
        )
    if written == {**drawn_from, "images": num_images}:
        return
    root.mkdir(parents=True, exist_ok=True)
    listed.write_text("\n".join(CLASSES) + "\n")  # first: it marks the folder as ours, should the rest be interrupted
    for folder in (root / "JPEGImages", root / "SegmentationClassAug", lists):
        folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(_write_one, root, seed, side_px), range(num_images), chunksize=16))
    names = [_name(i) for i in range(num_images)]
    every = round(1 / TEST_SHARE)
    (lists / "val.txt").write_text("".join(f"{n}\n" for n in names[::every]))
    (lists / "train_aug.txt").write_text("".join(f"{n}\n" for i, n in enumerate(names) if i % every))
    complete.write_text(json.dumps({**drawn_from, "images": num_images}) + "\n")


def draw_image(seed: int, index: int, side_px: int) -> tuple[UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"]]:
    """Image and label (class ids from 1, 255 on borders) of one index."""
    rng = np.random.default_rng([seed, index])
    pixels = _background(rng, side_px)
    label = np.zeros((side_px, side_px), np.uint8)
    for class_id in rng.choice(len(CLASSES), rng.integers(OBJECTS[0], OBJECTS[1] + 1), replace=False) + 1:
        _paint(rng, pixels, label, int(class_id))
    noisy = pixels + rng.normal(0, 6, pixels.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), label


def _paint(
    rng: np.random.Generator, pixels: Float[np.ndarray, "s s 3"], label: UInt8[np.ndarray, "s s"], class_id: int
):
    side = len(label)
    radius = side * np.exp(rng.uniform(*np.log(RADIUS_SHARE)))
    x, y = rng.uniform(0.8 * radius, side - 0.8 * radius, 2)
    reach = radius * 1.5 + BORDER_PX
    top, bottom = max(int(y - reach), 0), min(int(y + reach) + 1, side)
    left, right = max(int(x - reach), 0), min(int(x + reach) + 1, side)
    v, u = np.mgrid[top:bottom, left:right].astype(np.float64)
    angle = rng.uniform(-0.5, 0.5)
    u, v = (u - x) / radius, (v - y) / radius
    u, v = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    name = CLASSES[class_id - 1]
    outline, texture = name.split("-")
    inside = OUTLINES[outline](u, v)
    shading = 1 - 0.25 * (u + v)[..., None] / 2
    colours = _colours(rng)
    painted = (colours[0] + (colours[1] - colours[0]) * TEXTURES[texture](u, v)[..., None]) * shading
    window = (slice(top, bottom), slice(left, right))
    pixels[window] = np.where(inside[..., None], painted, pixels[window])
    border = BORDER_PX / radius
    grown = OUTLINES[outline](u / (1 + border), v / (1 + border)) | inside
    shrunk = OUTLINES[outline](u * (1 + border), v * (1 + border)) & inside
    label[window] = np.where(shrunk, class_id, np.where(grown, paper.VOID, label[window]))


def _background(rng: np.random.Generator, side: int) -> Float[np.ndarray, "s s 3"]:
    """Two colours mixed by smooth noise, with a fainter, finer noise over it."""
    cells = int(rng.integers(3, 12))
    coarse = Image.fromarray(rng.random((cells, cells)).astype(np.float32)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    fine = Image.fromarray(rng.random((side // 6, side // 6)).astype(np.float32)).resize(
        (side, side), Image.Resampling.BILINEAR
    )
    first, second = _colours(rng)
    mix = np.clip(np.asarray(coarse), 0, 1)[..., None]
    return first + (second - first) * mix + 50 * (np.asarray(fine)[..., None] - 0.5)


def _colours(rng: np.random.Generator) -> Float[np.ndarray, "2 3"]:
    """Two colours that differ enough to show a texture."""
    first = rng.uniform(20, 235, 3)
    second = np.where(first > 127, first - rng.uniform(60, 110, 3), first + rng.uniform(60, 110, 3))
    return np.stack([first, second])


def _name(index: int) -> str:
    return f"shapes_{index:06d}"


def _write_one(root: Path, seed: int, side_px: int, index: int) -> None:
    pixels, label = draw_image(seed, index, side_px)
    Image.fromarray(pixels).save(root / "JPEGImages" / f"{_name(index)}.jpg", quality=92)
    Image.fromarray(label).save(root / "SegmentationClassAug" / f"{_name(index)}.png")
