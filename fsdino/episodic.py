"""Episodes as tensors, and what a segmenter makes of a batch of them: prediction and training loss (Eq. 6-8)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from fsdino import paper
from fsdino.data.episodes import Episode
from fsdino.losses import mask_loss
from fsdino.segmenter import Prediction, Segmenter, SupportEncoding


@dataclass(frozen=True)
class EpisodeBatch:
    """B episodes of K shots; features in the stores' channels, channels first (memory stays channels last)."""

    episodes: Sequence[Episode]
    support_late: Float[Tensor, "b k c g g"]
    support_masks: Bool[Tensor, "b k s s"] | Float[Tensor, "b k s s"]
    """0 or 1; void counts as 0."""
    query_late: Float[Tensor, "b c g g"]
    query_input: Float[Tensor, "b e g g"] | None
    """Embeddings, or early features where no frozen adapter made any; None if no store was given."""
    query_labels: UInt8[Tensor, "b s s"] | None
    """1 the class, 0 elsewhere, 255 void; None where nothing is trained."""

    def to(self, device: torch.device) -> "EpisodeBatch":
        """The batch on a device, features as float32; cast there, so that halves travel."""

        def moved(x: Tensor) -> Tensor:
            x = x.to(device)
            return x if x.dtype == torch.uint8 else x.to(torch.float32)  # labels stay as they are

        return EpisodeBatch(
            self.episodes,
            moved(self.support_late),
            moved(self.support_masks),
            moved(self.query_late),
            None if self.query_input is None else moved(self.query_input),
            None if self.query_labels is None else moved(self.query_labels),
        )

    def scored_pixels(self) -> Float[Tensor, ""]:
        """Number of the queries' pixels that are not void."""
        assert self.query_labels is not None
        return (self.query_labels != paper.VOID).sum().float()


def segment_batch(segmenter: Segmenter, batch: EpisodeBatch, support: SupportEncoding | None = None) -> Prediction:
    """What a segmenter finds in the queries of a batch, which bring what its config asks for; `support` if the supports
    are encoded already."""
    assert batch.query_input is not None
    if support is None:
        support = segmenter.encode_support(batch.support_late, batch.support_masks)
    joint = segmenter.config.adapter == "joint"
    embedding = segmenter.embed(batch.query_input) if joint else batch.query_input
    return segmenter.segment(batch.query_late, embedding, support)


class EpisodeLoss(nn.Module):
    """The training objective as one module, so that DDP sees every gradient."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batch: EpisodeBatch, pixels: Float[Tensor, ""] | None = None) -> dict[str, Tensor]:
        """`loss` (Eq. 8) and its parts `final`, and `prior` where the variant has one; `pixels` as in `mask_loss`."""
        assert batch.query_labels is not None
        predicted = segment_batch(self.segmenter, batch)
        losses = {"final": mask_loss(predicted.mask_logits, batch.query_labels, pixels)}
        if predicted.prior_logits is not None:
            losses["prior"] = mask_loss(predicted.prior_logits, batch.query_labels, pixels)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}
