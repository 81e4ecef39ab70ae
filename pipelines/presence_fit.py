"""Fitting of the presence score, on episodes of the classes that a segmenter was trained on.

Half of the queries show the class and half do not. A class's scores come from a regression without its episodes, and so
does the threshold: the largest that costs at most LOSS of mIoU.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fsdino import paper
from fsdino.data.episodes import Episode, EpisodeSampler
from fsdino.data.views import PLAIN
from fsdino.episodic import EpisodeBatch, segment_batch
from fsdino.presence import evidence
from fsdino.segmenter import Segmenter

PARTS = 4  # of the classes, each left out once
LOSS = 0.0075  # mIoU in [0, 1]
WEIGHT = 1e-2  # of the regression's penalty on large weights


class Seen(NamedTuple):
    """Episodes, as the segmenter saw them."""

    evidence: np.ndarray
    """(n, e)."""
    classes: np.ndarray
    """(n,)."""
    counts: np.ndarray
    """(n, 3): pixels of the intersection of mask and truth, of their union, and of the truth."""


def episodes(
    sampler: EpisodeSampler, lacking: Mapping[str, Sequence[int]], first: int, count: int
) -> tuple[list[Episode], list[Episode]]:
    """Training episodes from the index `first` on whose query shows the class, and as many whose query lacks it (see
    `EpisodeSampler.lacking`); all alike seen as they are, so that nothing else tells them apart."""
    showing, views = sampler.with_absent(0.0, {}), (PLAIN,) * (1 + sampler.shots)
    spread = max(1, len(lacking) // count)
    return (
        [replace(showing.episode(first + i).plain(), views=views) for i in range(count)],
        [replace(sampler.absent(i * spread, lacking), views=views) for i in range(count)],
    )


@torch.inference_mode()
def seen(segmenter: Segmenter, batches: Iterable[EpisodeBatch], device: torch.device) -> Seen:
    """What a segmenter, which has `neighbours`, makes of episodes with labels."""
    assert segmenter.neighbours is not None
    found, classes, counts = [], [], []
    for batch in batches:
        batch = batch.to(device)
        assert batch.query_labels is not None
        support = segmenter.encode_support(batch.support_late, batch.support_masks)
        assert support.annotated is not None
        logits = segment_batch(segmenter, batch, support).mask_logits
        of_batch = evidence(segmenter.neighbours.groups, support.annotated, batch.query_late, logits)
        found.append(of_batch.cpu().numpy())
        size = batch.query_labels.shape[-2:]
        mask = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)[:, 0] > 0
        valid, truth = batch.query_labels != paper.VOID, batch.query_labels == 1
        pixels = [(mask & truth), (mask | truth) & valid, truth]
        counts.append(torch.stack([x.sum((1, 2)) for x in pixels], 1).cpu().numpy())
        classes += [episode.class_id for episode in batch.episodes]
    return Seen(np.concatenate(found), np.array(classes), np.concatenate(counts))


def fit(segmenter: Segmenter, present: Seen, absent: Seen) -> dict[str, float]:
    """Set the segmenter's presence score. Share of absent classes whose masks are then empty, and mIoU lost, on these
    episodes, each scored without its class."""
    assert segmenter.presence is not None
    shows = np.concatenate([np.ones(len(present.classes)), np.zeros(len(absent.classes))])
    inputs = np.concatenate([present.evidence, absent.evidence]).astype(np.float64)
    classes = np.concatenate([present.classes, absent.classes])
    scores = np.empty(len(shows))
    known = np.unique(classes)
    for part in range(min(PARTS, len(known))):
        out = np.isin(classes, known[part::PARTS])
        scores[out] = Regression(inputs[~out], shows[~out])(inputs[out])
    of_present, of_absent = scores[shows == 1], scores[shows == 0]
    whole = miou(present, np.ones(len(of_present), bool))
    costs = {candidate: whole - miou(present, of_present >= candidate) for candidate in scores}
    threshold = max((float(candidate) for candidate, cost in costs.items() if cost <= LOSS), default=0.0)
    final = Regression(inputs, shows)
    for name, value in final.parts.items():
        getattr(segmenter.presence, name).copy_(torch.as_tensor(value))
    segmenter.presence.threshold.fill_(threshold)
    return {
        "presence_threshold": round(threshold, 4),
        "absent_empty": round(float((of_absent < threshold).mean()), 4),
        "presence_miou_lost": round(whole - miou(present, of_present >= threshold), 4),
    }


class Regression:
    """Logistic regression on standardised inputs."""

    def __init__(self, inputs: np.ndarray, shows: np.ndarray):
        mean, deviation = inputs.mean(0), inputs.std(0) + 1e-6
        x, y = torch.from_numpy((inputs - mean) / deviation), torch.from_numpy(shows)
        weight = torch.zeros(inputs.shape[1], dtype=torch.double, requires_grad=True)
        bias = torch.zeros((), dtype=torch.double, requires_grad=True)
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimiser.zero_grad()
            value = F.binary_cross_entropy_with_logits(x @ weight + bias, y) + WEIGHT * weight.square().sum()
            value.backward()
            return value

        optimiser.step(loss)  # type: ignore[arg-type]
        self.parts = {
            "mean": mean,
            "deviation": deviation,
            "weight": weight.detach().numpy(),
            "bias": bias.item(),
        }

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Probabilities."""
        parts = self.parts
        return 1 / (1 + np.exp(-(((inputs - parts["mean"]) / parts["deviation"]) @ parts["weight"] + parts["bias"])))


def miou(episodes: Seen, kept: np.ndarray) -> float:
    """mIoU in [0, 1] of episodes whose masks are emptied where `kept` (n,) is False."""
    found = []
    for class_id in np.unique(episodes.classes):
        of = episodes.classes == class_id
        intersection, union, truth = episodes.counts[of].T
        found.append((intersection * kept[of]).sum() / max(1, np.where(kept[of], union, truth).sum()))
    return float(np.mean(found))
