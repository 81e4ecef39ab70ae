"""Running encoder and teacher over images and comparing them layer by layer: the work of `analyze_layers`."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fsdino.data.dataset import Dataset
from fsdino.encoder import build_encoder, to_input
from fsdino.preprocess import resize_square
from fsdino.similarity import agreement, self_similarity
from fsdino.specs import teacher_spec
from fsdino.teacher import build_teacher
from pipelines import cluster, panels
from pipelines.recipes import Backbone, Device, Teaching

SHOWN = 3


def compare(
    dataset: Dataset, chosen: Sequence[str], backbone: Backbone, teaching: Teaching, device: Device
) -> tuple[dict[str, float], Image.Image]:
    """Mean agreement of each layer, by its name, and maps at a few points of the first images."""
    where = cluster.device_of(device)
    encoder: Any = build_encoder(backbone.encoder, backbone.encoder_weights)
    teacher: Any = build_teacher(teaching.teacher, teaching.teacher_weights)
    encoder.to(where), teacher.to(where)
    sides = (backbone.res, teacher_spec(teaching.teacher).input_px(backbone.res))
    scores: dict[str, list[float]] = {}
    shown: list[list[Image.Image | None]] = []
    with torch.inference_mode():
        for image_id in tqdm(chosen, unit="img", file=sys.stderr):
            image = dataset.image(image_id)
            squares = [resize_square(image, side)[None] for side in sides]
            layers = encoder.layer_maps(to_input(squares[0], encoder.mean, encoder.std).to(where))
            target = teacher(to_input(squares[1], teacher.mean, teacher.std).to(where))
            for name, features in layers.items():
                scores.setdefault(name, []).append(float(agreement(features, target)[0]))
            if len(shown) < SHOWN * len(panels.POINTS):
                shown += maps_at_points(image, target, layers)
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    return means, panels.panel(("image", "teacher", *means), shown)


def maps_at_points(image: Image.Image, teacher: Tensor, layers: dict[str, Tensor]) -> list[list[Image.Image | None]]:
    """A row for each of a few points: its cosines with all positions, for the teacher and each layer."""
    grid = min(teacher.shape[-1], next(iter(layers.values())).shape[-1])
    maps = [self_similarity(F.adaptive_avg_pool2d(x.float(), grid))[0] for x in (teacher, *layers.values())]
    rows: list[list[Image.Image | None]] = []
    for x, y in panels.POINTS:
        at = int(y * grid) * grid + int(x * grid)
        row: list[Image.Image | None] = [panels.marked(image, x, y)]
        row += [panels.heat(_stretched(similarity[at]).reshape(grid, grid).cpu().numpy()) for similarity in maps]
        rows.append(row)
    return rows


def _stretched(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min()).clamp_min(1e-6)
