"""What is scored: a trained segmenter or a training-free method, each as two calls, `encode` and `segment`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fsdino import baselines
from fsdino.episodic import EpisodeBatch
from fsdino.matching import matching_logits
from fsdino.peak import PeakPrompt
from fsdino.segmenter import Prediction, Segmenter

SIMILARITY = {
    "prototype": baselines.prototype_logits,
    "two-prototype": baselines.two_prototype_logits,
    "nearest": baselines.nearest_logits,
}


class Method(Protocol):
    """Finds a class that supports show in queries."""

    def encode(self, late: Tensor, masks: Tensor) -> Any:
        """What B classes look like: late features `b k c g g` of K supports and their masks `b k s s`."""
        ...

    def segment(self, encoding: Any, late: Tensor, query: Tensor | None) -> Prediction:
        """Logits for B queries, of one class each, or all of the one class; `query` are embeddings, or early
        features."""
        ...


@dataclass(frozen=True)
class Trained:
    """A segmenter."""

    segmenter: Segmenter
    precision: Callable[[], AbstractContextManager]
    empties: bool = True
    """Whether masks of classes that the query does not seem to show are left empty, where the model scores that."""

    def encode(self, late: Tensor, masks: Tensor) -> Any:
        """See Method."""
        with self.precision():
            return self.segmenter.encode_support(late, masks)

    def segment(self, encoding: Any, late: Tensor, query: Tensor | None) -> Prediction:
        """See Method."""
        assert query is not None
        joint = self.segmenter.config.adapter == "joint"
        with self.precision():
            embedding = self.segmenter.embed(query) if joint else query
            found = self.segmenter.segment(late, embedding, encoding.expand(len(late)))
        return found.emptied(self.segmenter.threshold) if self.empties else found


@dataclass(frozen=True)
class TrainingFree:
    """A function of supports, masks and query."""

    logits: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

    def encode(self, late: Tensor, masks: Tensor) -> Any:
        """See Method."""
        return late, masks

    def segment(self, encoding: Any, late: Tensor, query: Tensor | None) -> Prediction:
        """See Method."""
        supports, masks = (part.expand(len(late), *part.shape[1:]) for part in encoding)
        return Prediction(prior_logits=None, mask_logits=self.logits(supports, masks, late, query))


def similarity(name: str) -> TrainingFree:
    """A method of the similarity map: prototype, two-prototype or nearest."""
    return TrainingFree(lambda late, masks, query, _: SIMILARITY[name](late, masks, query))


def matching(basis: Tensor) -> TrainingFree:
    """INSID3's matching, with the directions of position."""
    return TrainingFree(lambda late, masks, query, _: matching_logits(late, masks, query, basis))


def peak_prompt(state: dict[str, Tensor]) -> PeakPrompt:
    """SAM's decoder for point prompts, with the weights of a checkpoint."""
    prompt = PeakPrompt().eval()
    prompt.load_state_dict(state)
    return prompt


def peak(prompt: PeakPrompt) -> TrainingFree:
    """The similarity map's peak as a point prompt of SAM's decoder."""

    def logits(late: Tensor, masks: Tensor, query: Tensor, embedding: Tensor | None) -> Tensor:
        assert embedding is not None
        return prompt(late, masks, query, embedding)

    return TrainingFree(logits)


def predict(method: Method, batch: EpisodeBatch, vote: bool) -> Prediction:
    """What a method finds in a batch: one map of logits for each query, or one for each of its supports (`b k m m`) if
    they are to vote."""
    if not vote or batch.support_late.shape[1] == 1:
        encoding = method.encode(batch.support_late, batch.support_masks)
        return method.segment(encoding, batch.query_late, batch.query_input)
    single = []
    for shot in range(batch.support_late.shape[1]):
        encoding = method.encode(batch.support_late[:, shot : shot + 1], batch.support_masks[:, shot : shot + 1])
        single.append(method.segment(encoding, batch.query_late, batch.query_input))
    return Prediction(single[0].prior_logits, torch.cat([p.mask_logits for p in single], 1))
