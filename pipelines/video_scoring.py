"""DAVIS: the object of a video's first frame in its later ones, scored by J and F."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fsdino.data.davis import DavisDataset, Video
from fsdino.data.views import draw_view
from fsdino.video import boundary_f, jaccard, share_pixels, statistics
from pipelines.scoring import Scorer, enlarged
from pipelines.scoring_plan import ScoringPlan

BATCH = 8


class Supports:
    """What a video's objects look like: its first frame, and then the latest confident ones."""

    def __init__(self, plan: ScoringPlan, late: Tensor, masks: Tensor):
        self.first, self.plan = (late, masks), plan
        self.later: list[tuple[Tensor, Tensor]] = []

    def of(self, position: int) -> tuple[Tensor, Tensor]:
        """Features `1 k c g g` and masks `1 k s s` of an object."""
        frames = [self.first, *self.later]
        late = torch.stack([frame[0] for frame in frames])
        masks = torch.stack([frame[1][position] for frame in frames])
        shown = masks.flatten(1).any(1)
        return late[shown][None], masks[shown][None]

    def add(self, late: Tensor, masks: Tensor) -> None:
        """A frame that is confident of every object it shows."""
        self.later = [*self.later, (late, masks)][-self.plan.memory :]


def score(plan: ScoringPlan) -> dict[str, Any]:
    """`j`, `f`, `j_and_f` (means over objects), `j_recall`, `f_recall`, `j_decay`, `f_decay`, and `per_object`.

    As the organisers count: all frames but a video's first and last, void as background, objects those of the first
    frame; several share the pixels by the largest logit.
    """
    dataset = plan.dataset
    assert isinstance(dataset, DavisDataset)
    scorer = Scorer(plan)
    measures: dict[str, tuple[list[float], list[float]]] = {}
    videos = dataset.videos
    with torch.inference_mode(), tqdm(total=len(videos), unit="video", desc="evaluating", file=sys.stderr) as bar:
        for video in videos:
            for name, of_object in _video(scorer, dataset, video).items():
                measures[name] = of_object
            bar.update()
    per_object = {name: {"j": statistics(j), "f": statistics(f)} for name, (j, f) in measures.items()}
    found: dict[str, Any] = {}
    for key in ("j", "f"):
        for field in ("mean", "recall", "decay"):
            values = [getattr(of[key], field) for of in per_object.values()]
            found[key if field == "mean" else f"{key}_{field}"] = float(np.mean(values))
    found["j_and_f"] = (found["j"] + found["f"]) / 2
    listed = {name: {key: round(of[key].mean, 6) for key in of} for name, of in per_object.items()}
    return {**found, "per_object": listed}


def _video(scorer: Scorer, dataset: DavisDataset, video: Video) -> dict[str, tuple[list[float], list[float]]]:
    """J and F of every object in all frames but the first and the last."""
    plan, loader = scorer.job, scorer.loader
    view = draw_view(loader.view_seed, video.frames[0], plan.rules.test_view)
    late = _features(scorer, video.frames[:1])[0][0]
    drawn = [loader.mask(video.frames[0], plan.rules.test_view, class_id) == 1 for class_id in video.objects]
    masks = torch.from_numpy(np.array(drawn)).float().to(scorer.device)
    supports = Supports(plan, late, masks)
    encodings = [scorer.method.encode(*supports.of(i)) for i in range(len(video.objects))]
    found: dict[str, tuple[list[float], list[float]]] = {dataset.class_names[c - 1]: ([], []) for c in video.objects}
    step = 1 if plan.memory else BATCH
    frames = video.frames[1:-1]
    for at in range(0, len(frames), step):
        part = frames[at : at + step]
        features, query = _features(scorer, part)
        found_by = [scorer.method.segment(encoding, features, query).mask_logits[:, 0] for encoding in encodings]
        logits = torch.stack(found_by, 1).float()
        for position, frame in enumerate(part):
            truths = [dataset.mask(frame, class_id) == 1 for class_id in video.objects]
            size = truths[0].shape
            extent = view.extent(size)
            large = enlarged(logits[position], extent, size, plan.rules.align_corners).cpu().numpy()
            owner = share_pixels(large)
            for number, (class_id, truth) in enumerate(zip(video.objects, truths, strict=True), start=1):
                j, f = found[dataset.class_names[class_id - 1]]
                j.append(jaccard(owner == number, truth))
                f.append(boundary_f(owner == number, truth))
            if plan.masks:
                _save(Path(plan.masks), frame, owner)
            if plan.memory and confident(large, owner, plan.memory_confidence):
                own = [(owner == number).astype(np.uint8) for number in range(1, len(large) + 1)]
                shown = np.array([view.label(mask, masks.shape[-1]) == 1 for mask in own])
                supports.add(features[position], torch.from_numpy(shown).float().to(scorer.device))
                encodings = [scorer.method.encode(*supports.of(i)) for i in range(len(video.objects))]
    return found


def confident(logits: np.ndarray, owner: np.ndarray, least: float) -> bool:
    """Whether a frame is sure of every object that it found, and found one: mean probability over each one's pixels."""
    found = [number for number in range(1, len(logits) + 1) if (owner == number).any()]
    sure = [float((1 / (1 + np.exp(-logits[number - 1][owner == number]))).mean()) for number in found]
    return bool(found) and min(sure) >= least


def _features(scorer: Scorer, frames: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Late features of frames, and what queries bring besides."""
    views, loader = [scorer.job.rules.test_view] * len(frames), scorer.loader
    query = None if loader.query is None else loader.query.rows(frames, views).float()
    return loader.late.rows(frames, views).float(), query


def _save(folder: Path, frame: str, owner: np.ndarray) -> None:
    path = folder / f"{frame}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(owner.astype(np.uint8)).save(path)
