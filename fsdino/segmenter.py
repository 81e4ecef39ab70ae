"""The light segmenter of Fig. 3: adapter, prompts, correlation and decoder behind two calls.

`encode_support` turns K annotated images into a small bundle; `segment` finds that class in any query.
"""

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fsdino import checkpoint, paper
from fsdino.adapter import BottleneckAdapter
from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.correlation import CorrelationPrior
from fsdino.decoder import MaskDecoder, PositionalEncoding, mask_downscaling
from fsdino.errors import UserError
from fsdino.neighbours import Annotated, NeighbourPrior
from fsdino.presence import Presence, evidence
from fsdino.prompts import (
    SemanticVisualPrompt,
    contrast_prototype,
    mask_to_grid,
    masked_mean,
    prototype_similarity,
)
from fsdino.weights import from_hub


class SupportEncoding(NamedTuple):
    """A class, registered: all that its supports tell, averaged over shots but for `annotated`."""

    prototype: Float[Tensor, "b c"]
    prompt: Float[Tensor, "b t e"]
    kernel: Float[Tensor, "b k c"] | None
    annotated: Annotated | None = None
    """The positions themselves, for `neighbours`."""

    def expand(self, queries: int) -> "SupportEncoding":
        """For so many queries: one class for all of them, or already one for each."""
        return self._each(lambda part: part.expand(queries, *part.shape[1:]))

    def to(self, device: torch.device) -> "SupportEncoding":
        """The class on a device."""
        return self._each(lambda part: part.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "SupportEncoding":
        return SupportEncoding(
            change(self.prototype),
            change(self.prompt),
            None if self.kernel is None else change(self.kernel),
            None if self.annotated is None else Annotated(*map(change, self.annotated)),
        )


class Prediction(NamedTuple):
    """Logits at 4 times the grid. The prior is None in the compact variant without `neighbours`, where there is nothing
    to supervise."""

    prior_logits: Float[Tensor, "b 1 m m"] | None
    mask_logits: Float[Tensor, "b 1 m m"]
    presence: Float[Tensor, "b"] | None = None
    """Probability that the query shows the class, where the model scores it."""

    def emptied(self, threshold: float) -> "Prediction":
        """Without masks of classes that are less probable than the threshold: their logits are at most -1."""
        if self.presence is None:
            return self
        absent = (self.presence < threshold)[:, None, None, None]
        return self._replace(mask_logits=torch.where(absent, self.mask_logits.clamp(max=-1), self.mask_logits))


class Segmenter(nn.Module):
    """Adapter (frozen after distillation unless it is `joint`), meta-visual prompts and SAM's decoder."""

    def __init__(self, config: SegmenterConfig, shape: SegmenterShape):
        super().__init__()
        config.check()
        self.config, self.shape = config, shape
        self.origin: dict[str, Any] = {}  # what a checkpoint's record says beyond the config: encoder, fold, training
        width = shape.embedding_channels
        self.adapter = BottleneckAdapter(shape.early_channels, width).requires_grad_(config.adapter == "joint")
        self.prompt = SemanticVisualPrompt(shape.late_channels, width) if config.semantic_prompt else None
        self.correlation = None
        if config.variant == "4d":
            self.correlation = CorrelationPrior(
                shape.grid,
                contrast=config.contrast,
                small=config.refine,
                support_weights=config.support_weights,
                similarity=config.similarity,
                start=config.start,
            )
        self.neighbours = None
        groups = shape.late_groups or (shape.late_channels,)
        if config.neighbours:
            self.neighbours = NeighbourPrior(groups, self_support=config.self_support)
        self.presence = None if not config.presence else Presence(len(groups))
        direct = config.variant == "compact" or config.refine
        self.similarity_scale = nn.Parameter(torch.tensor(paper.SIMILARITY_SCALE)) if direct else None
        self.mask_downscaling = mask_downscaling(width)
        self.positional_encoding = PositionalEncoding(width)
        self.decoder = MaskDecoder(
            width, mlp_dim=config.decoder_mlp, sam_extras=config.sam_extras, upscaling=config.upscaling
        )

    def embed(self, early: Float[Tensor, "b c g g"]) -> Float[Tensor, "b e g g"]:
        """The stand-in for SAM's image embedding; training reads it baked from the feature store."""
        return self.adapter(early)

    def encode_support(
        self,
        late: Float[Tensor, "b k c g g"],
        masks: Float[Tensor, "b k h w"],
        void: Float[Tensor, "b k h w"] | None = None,
    ) -> SupportEncoding:
        """Encode K shots of B classes. `masks` are 0/1 at any size; each needs at least one set pixel. `void`, of the
        same size, is 1 on pixels that are neither the class nor its background.

        Every part but the annotated positions is the mean over shots of single-shot encodings, so K copies of one
        support equal one.
        """
        batch, shots = late.shape[:2]
        flat = late.flatten(0, 1)

        def on_grid(mask: Tensor) -> Tensor:
            return mask_to_grid(mask.flatten(0, 1).to(flat.dtype), late.shape[-1])

        def mean_over_shots(x: Tensor) -> Tensor:
            return x.unflatten(0, (batch, shots)).mean(1)

        weights = on_grid(masks)
        rest = None if void is None else (1 - weights - on_grid(void)).clamp_min(0)
        if self.config.contrast:
            prototype = contrast_prototype(flat, weights, rest)
        else:
            prototype = masked_mean(flat, weights)
        if self.prompt is None:
            prompt = flat.new_zeros(batch, 0, self.shape.embedding_channels)
        else:
            prompt = mean_over_shots(self.prompt(flat, weights))
        kernel = None
        if self.correlation is not None:
            kernel = mean_over_shots(self.correlation.kernel(flat, weights, rest))
        annotated = None
        if self.neighbours is not None:
            shares = (x.unflatten(0, (batch, shots)) for x in (weights, 1 - weights if rest is None else rest))
            annotated = self.neighbours.annotated(late, *shares)
        return SupportEncoding(mean_over_shots(prototype), prompt, kernel, annotated)

    def segment(
        self, late: Float[Tensor, "b c g g"], embedding: Float[Tensor, "b e g g"], support: SupportEncoding
    ) -> Prediction:
        """Find each support's class in its query; logits above 0 are the class."""
        similarity = prototype_similarity(support.prototype, late)
        dense_logits = torch.zeros(())
        if self.similarity_scale is not None:
            dense_logits = self.similarity_scale * F.interpolate(
                similarity, scale_factor=paper.PRIOR_UPSCALE, mode="bilinear", align_corners=False
            )
        if self.correlation is not None:
            assert support.kernel is not None
            dense_logits = dense_logits + self.correlation(support.kernel, late, similarity)
        if self.neighbours is not None:
            assert support.annotated is not None
            of_neighbours = self.neighbours(support.annotated, late, dense_logits)
            dense_logits = dense_logits + F.interpolate(
                of_neighbours, scale_factor=paper.PRIOR_UPSCALE, mode="bilinear", align_corners=False
            )
        dense = self.mask_downscaling(dense_logits)
        mask = self.decoder(embedding, self.positional_encoding(late.shape[-1]), support.prompt, dense)
        if self.config.fuse:
            mask = mask + dense_logits
        is_prior = self.correlation is not None or self.neighbours is not None
        prior, presence = dense_logits if is_prior else None, None
        if self.presence is not None and not self.training:
            assert self.neighbours is not None and support.annotated is not None
            presence = self.presence(evidence(self.neighbours.groups, support.annotated, late, mask))
        return Prediction(prior, mask, presence)

    @property
    def threshold(self) -> float:
        """The presence score from which a class counts as shown; 0 where the model has none."""
        return 0.0 if self.presence is None else float(self.presence.threshold)

    def save_pretrained(self, folder: str | Path) -> None:
        """As `save`, by the name that the ecosystem knows it by; with what it was loaded with."""
        self.save(folder, **self.origin)

    @classmethod
    def from_pretrained(cls, place: str | Path) -> "Segmenter":
        """The segmenter of a folder, or of a repository of the Hugging Face hub (`organisation/name`), in eval mode.

        Raises UserError if there is none, or if it is of an unknown version.
        """
        if Path(place).is_dir():
            return cls.load(place)[0]
        if not re.fullmatch(r"(hf:)?[\w.-]+/[\w.-]+", str(place)):
            raise UserError(
                f"{place}: expected a checkpoint's folder, or ORGANISATION/NAME on the hub; found no folder"
            )
        repository = "hf:" + str(place).removeprefix("hf:")
        paths = [from_hub(f"{repository}/{file}") for file in checkpoint.files("segmenter")]
        return cls.load(paths[0].parent)[0]

    def save(self, folder: str | Path, **origin) -> None:
        """Write `segmenter.safetensors` and `segmenter.json`: config, shape and `origin` (JSON on where it is from)."""
        record = {"config": asdict(self.config), "shape": asdict(self.shape), **origin}
        checkpoint.save(folder, "segmenter", self.state_dict(), record)

    @classmethod
    def load(cls, folder: str | Path) -> tuple["Segmenter", dict]:
        """The saved segmenter in eval mode, and its JSON record. Raises UserError if the folder is no checkpoint."""
        state, record = checkpoint.read(folder, "segmenter")
        try:
            groups = tuple(record["shape"].get("late_groups", ()))  # JSON has lists
            shape = SegmenterShape(**record["shape"] | {"late_groups": groups})
            model = cls(SegmenterConfig(**record["config"]), shape)
            model.load_state_dict(state)
        except (KeyError, TypeError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{folder}: expected a segmenter's checkpoint, got another's ({first})") from None
        model.origin = {
            key: value for key, value in record.items() if key not in ("config", "shape", "format_version", "sha256")
        }
        return model.eval(), record
