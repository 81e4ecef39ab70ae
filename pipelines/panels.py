"""Picture panels: rows of equal squares with a caption over each column."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fsdino.data.dataset import Dataset
from fsdino.data.episodes import Episode
from fsdino.data.views import draw_view

if TYPE_CHECKING:
    from fsdino.segmenter import Prediction

CELL_PX = 224
EPISODE_COLUMNS = ("support", "support mask", "query", "truth", "prior", "prediction")
GAP_PX = 4
CAPTION_PX = 18
POINTS = ((0.3, 0.3), (0.5, 0.5), (0.7, 0.6))  # where similarity is shown: shares of width and height
MASK_COLOUR = np.array([255, 40, 90], np.float32)
TINT = 0.45
ROWS = 256  # of a picture that are worked on at once, where a whole one might have hundreds of megapixels
COLOURS = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (86, 180, 233),
    (230, 159, 0),
    (170, 170, 170),
)
"""Of several classes: those of Okabe and Ito, which colour-blind readers tell apart, and a grey."""


def overlay(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The image as a cell, with the mask tinted and outlined; what is outside stays as it is.

    `mask` is a 0/1 mask at any size, or logits above 0 on it, which are enlarged bilinearly as they are for scoring.
    """
    if mask.dtype == np.float32:
        inside = np.asarray(Image.fromarray(mask).resize((CELL_PX, CELL_PX), Image.Resampling.BILINEAR)) > 0
    else:
        white = Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))
        inside = np.asarray(white.resize((CELL_PX, CELL_PX), Image.Resampling.BOX)) > 127
    pixels = np.asarray(cell(image), np.float32)
    tinted = np.where(inside[..., None], (1 - TINT) * pixels + TINT * MASK_COLOUR, pixels)
    tinted[_outline(inside)] = MASK_COLOUR
    return Image.fromarray(tinted.astype(np.uint8))


def overlaid(image: Image.Image, masks: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """The image at its own size with masks (n, h, w), each tinted, outlined and captioned in a colour of its own."""
    drawn = image.convert("RGB")
    width = max(2, round(min(image.size) / 250))
    for first in range(0, image.height, ROWS):
        pixels = np.array(drawn.crop((0, first, image.width, min(first + ROWS, image.height))))
        above = min(first, width)  # what an outline needs to see of its neighbours
        for number, mask in enumerate(masks):
            colour = np.array(COLOURS[number % len(COLOURS)], np.float32)
            inside = mask[first : first + ROWS]
            pixels[inside] = ((1 - TINT) * pixels[inside] + TINT * colour).round().astype(np.uint8)
            edge = _outline(mask[first - above : first + ROWS + width], width)
            pixels[edge[above : above + len(pixels)]] = colour
        drawn.paste(Image.fromarray(pixels), (0, first))
    draw, size = ImageDraw.Draw(drawn), max(12, round(min(image.size) / 25))
    font = ImageFont.load_default(size)
    for number, (mask, caption) in enumerate(zip(masks, captions, strict=True)):
        if not mask.any():
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top, right, bottom = draw.textbbox((0, 0), caption, font)
        x = float(np.clip(columns[0], 0, max(0, image.width - (right - left) - 8)))
        y = float(np.clip(rows[0] - (bottom - top) - 10, 0, max(0, image.height - (bottom - top) - 8)))
        fill = COLOURS[number % len(COLOURS)]
        draw.rectangle((x, y, x + right - left + 8, y + bottom - top + 8), fill=fill)
        bright = sum(c * w for c, w in zip(fill, (0.3, 0.59, 0.11), strict=True)) > 140
        draw.text((x + 4 - left, y + 4 - top), caption, fill="black" if bright else "white", font=font)
    return drawn


def _outline(inside: np.ndarray, width: int = 2) -> np.ndarray:
    """Pixels of the mask with a pixel outside it within some steps; the image's own border is no edge."""
    core = inside
    for _ in range(width):
        padded = np.pad(core, 1, mode="edge")
        core = core & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return inside & ~core


def cell(image: Image.Image) -> Image.Image:
    """The image at a cell's size."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image.resize((CELL_PX, CELL_PX), Image.Resampling.BILINEAR, reducing_gap=2.0)


def heat(probability: np.ndarray) -> Image.Image:
    """A map in [0, 1] as grey values, enlarged bilinearly."""
    grey = Image.fromarray((np.clip(probability, 0, 1) * 255).astype(np.uint8))
    return grey.resize((CELL_PX, CELL_PX), Image.Resampling.BILINEAR).convert("RGB")


def marked(image: Image.Image, x: float, y: float) -> Image.Image:
    """The image with a cross at a point, given as shares of width and height."""
    square = cell(image)
    draw, at, reach = ImageDraw.Draw(square), (x * CELL_PX, y * CELL_PX), 8
    draw.line([at[0] - reach, at[1], at[0] + reach, at[1]], fill="red", width=3)
    draw.line([at[0], at[1] - reach, at[0], at[1] + reach], fill="red", width=3)
    return square


def curve(names: Sequence[str], values: Sequence[float], what: str, where: str) -> Image.Image:
    """One value for each name, as a line with points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(len(names)), values, marker="o")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(f"layer of {where}")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)


def panel(columns: Sequence[str], rows: Sequence[Sequence[Image.Image | None]]) -> Image.Image:
    """All rows under the columns' captions; None leaves a cell empty."""
    step = CELL_PX + GAP_PX
    canvas = Image.new("RGB", (len(columns) * step + GAP_PX, len(rows) * step + GAP_PX + CAPTION_PX), "white")
    draw = ImageDraw.Draw(canvas)
    for x, caption in enumerate(columns):
        draw.text((x * step + GAP_PX, 3), caption, fill="black")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image is not None:
                canvas.paste(cell(image), (x * step + GAP_PX, y * step + GAP_PX + CAPTION_PX))
    return canvas


def beside(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """Panels of the same episodes by several methods as one: support, truth, and each method's prediction."""
    step = CELL_PX + GAP_PX
    first = next(iter(pictures.values()))
    count = (first.height - CAPTION_PX - GAP_PX) // step

    def cells(picture: Image.Image, caption: str) -> list[Image.Image]:
        x = EPISODE_COLUMNS.index(caption) * step + GAP_PX
        tops = (y * step + GAP_PX + CAPTION_PX for y in range(count))
        return [picture.crop((x, top, x + CELL_PX, top + CELL_PX)) for top in tops]

    columns = [cells(first, "support mask"), cells(first, "truth")]
    columns += [cells(picture, "prediction") for picture in pictures.values()]
    return panel(("support", "truth", *pictures), list(zip(*columns, strict=True)))


def embeddings(images: Sequence[Image.Image], teacher: np.ndarray, student: np.ndarray) -> Image.Image:
    """Images with teacher and student embeddings (n, g, g, e) in the colours of one PCA of the teacher's, and with
    the self-similarity of both at a few points (Fig. 2)."""
    flat = teacher.reshape(-1, teacher.shape[-1]).astype(np.float64)
    mean = flat.mean(0)
    _, _, axes = np.linalg.svd(flat - mean, full_matrices=False)
    low, high = np.percentile((flat - mean) @ axes[:3].T, (2, 98), axis=0)

    def colours(one: np.ndarray) -> Image.Image:
        shares = ((one - mean) @ axes[:3].T - low) / (high - low)
        small = Image.fromarray((np.clip(shares, 0, 1) * 255).astype(np.uint8))
        return small.resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST)

    def cosines_with(one: np.ndarray, x: float, y: float) -> Image.Image:
        """Cosines of all positions with the one at a point, stretched to [0, 1]."""
        unit = one / np.linalg.norm(one, axis=-1, keepdims=True).clip(1e-6)
        cosines = unit @ unit[int(y * one.shape[0]), int(x * one.shape[1])]
        return heat((cosines - cosines.min()) / max(float(np.ptp(cosines)), 1e-6))

    rows: list[list[Image.Image | None]] = []
    for image, t, s in zip(images, teacher, student, strict=True):
        pca: list[Image.Image | None] = [colours(t), colours(s)]
        for x, y in POINTS:
            rows.append([marked(image, x, y), *pca, cosines_with(t, x, y), cosines_with(s, x, y)])
            pca = [None, None]
    return panel(("image", "teacher", "student", "teacher, cosine with cross", "student"), rows)


def episodes(dataset: Dataset, view_seed: int, drawn: Sequence[Episode], predicted: "Prediction") -> Image.Image:
    """Support, its mask, query, truth, prior and prediction of each episode (its first support)."""
    rows = []
    for i, episode in enumerate(drawn):
        (query, truth), (support, mask) = (
            _seen(dataset, view_seed, image_id, view, episode.class_id)
            for image_id, view in zip((episode.query, episode.supports[0]), episode.views, strict=False)
        )
        prior = None if predicted.prior_logits is None else predicted.prior_logits[i, 0].float().sigmoid().cpu().numpy()
        logits = predicted.mask_logits[i, 0].float().cpu().numpy()
        cells = [support, overlay(support, mask), query, overlay(query, truth)]
        rows.append([*cells, None if prior is None else heat(prior), overlay(query, logits)])
    return panel(EPISODE_COLUMNS, rows)


def _seen(dataset: Dataset, view_seed: int, image_id: str, view: int, class_id: int) -> tuple[Image.Image, np.ndarray]:
    drawn = draw_view(view_seed, image_id, view)
    image = drawn.image(dataset.image(image_id))
    return image, drawn.label(dataset.mask(image_id, class_id), 2 * CELL_PX) == 1
