"""The light segmenter of Fig. 3: adapter, prompts, correlation and decoder behind two calls.

`encode_support` turns K annotated images into a small bundle; `segment` finds that class in any query.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fsdino import checkpoint, paper
from fsdino.adapter import BottleneckAdapter
from fsdino.correlation import CorrelationPrior
from fsdino.decoder import MaskDecoder, PositionalEncoding, mask_downscaling
from fsdino.errors import UserError
from fsdino.prompts import (
    SemanticVisualPrompt,
    contrast_prototype,
    mask_to_grid,
    masked_mean,
    prototype_similarity,
)
from fsdino.weights import from_hub


@dataclass(frozen=True)
class SegmenterConfig:
    """The shape of a segmenter; two equal configs have interchangeable weights."""

    early_channels: int
    late_channels: int
    grid: int
    """Side of the feature grid, in positions."""
    embedding_channels: int = paper.EMBEDDING_CHANNELS
    variant: Literal["compact", "4d"] = "4d"
    """compact: the similarity map prompts the decoder. 4d: the prior mask of the 4D correlation does."""
    contrast: bool = False
    """Let the support's background weigh against its foreground, in prototype and correlation; off: the paper's."""
    refine: bool = False
    """Add the similarity map at full grid to the prior's logits, so that the 4D correlation refines it; off: the
    paper's, where the map enters at half the grid alone."""
    semantic_prompt: bool = True
    """SVP as the sparse prompt; off means SAM's empty one (Table 4, first row)."""
    joint_adapter: bool = False
    """Train the adapter along with the rest instead of keeping it frozen after distillation, for ablation."""
    sam_extras: bool = True
    """Keep SAM's IoU head and three further mask tokens (needed to reproduce SAM's checkpoint)."""


class SupportEncoding(NamedTuple):
    """A class, registered: all that its supports tell, averaged over shots."""

    prototype: Float[Tensor, "b c"]
    prompt: Float[Tensor, "b t e"]
    kernel: Float[Tensor, "b k c"] | None

    def save(self, folder: str | Path, **origin) -> None:
        """Write `support.safetensors` and `support.json`; `origin` is JSON on what was registered with which model.

        Only the model that made an encoding can use it.
        """
        state = {name: value for name, value in self._asdict().items() if value is not None}
        checkpoint.save(folder, "support", state, origin)

    @classmethod
    def load(cls, folder: str | Path) -> tuple["SupportEncoding", dict]:
        """The saved encoding and its JSON record. Raises UserError if the folder holds none."""
        state, record = checkpoint.read(folder, "support")
        return cls(state["prototype"], state["prompt"], state.get("kernel")), record


class Prediction(NamedTuple):
    """Logits at 4 times the grid. The prior is None in the compact variant, which has nothing to supervise there."""

    prior_logits: Float[Tensor, "b 1 m m"] | None
    mask_logits: Float[Tensor, "b 1 m m"]


class Segmenter(nn.Module):
    """Adapter (frozen after distillation unless `joint_adapter`), meta-visual prompts and SAM's decoder."""

    def __init__(self, config: SegmenterConfig):
        super().__init__()
        self.config = config
        self.origin: dict[str, Any] = {}  # what a checkpoint's record says beyond the config: encoder, fold, scores
        width = config.embedding_channels
        self.adapter = BottleneckAdapter(config.early_channels, width).requires_grad_(config.joint_adapter)
        self.prompt = SemanticVisualPrompt(config.late_channels, width) if config.semantic_prompt else None
        self.correlation = None
        if config.variant == "4d":
            self.correlation = CorrelationPrior(config.grid, contrast=config.contrast, small=config.refine)
        direct = config.variant == "compact" or config.refine
        self.similarity_scale = nn.Parameter(torch.tensor(paper.SIMILARITY_SCALE)) if direct else None
        self.mask_downscaling = mask_downscaling(width)
        self.encoding = PositionalEncoding(width)
        self.decoder = MaskDecoder(width, sam_extras=config.sam_extras)

    def embed(self, early: Float[Tensor, "b c g g"]) -> Float[Tensor, "b e g g"]:
        """The stand-in for SAM's image embedding; training reads it baked from the feature store."""
        return self.adapter(early)

    def encode_support(self, late: Float[Tensor, "b k c g g"], masks: Float[Tensor, "b k h w"]) -> SupportEncoding:
        """Encode K shots of B classes. `masks` are 0/1 at any size; each needs at least one set pixel.

        Every part is the mean over shots of single-shot encodings, so K copies of one support equal one.
        """
        batch, shots = late.shape[:2]
        flat = late.flatten(0, 1)
        weights = mask_to_grid(masks.flatten(0, 1).to(flat.dtype), late.shape[-1])

        def mean_over_shots(x: Tensor) -> Tensor:
            return x.unflatten(0, (batch, shots)).mean(1)

        prototype = contrast_prototype if self.config.contrast else masked_mean
        if self.prompt is None:
            prompt = flat.new_zeros(batch, 0, self.config.embedding_channels)
        else:
            prompt = mean_over_shots(self.prompt(flat, weights))
        return SupportEncoding(
            prototype=mean_over_shots(prototype(flat, weights)),
            prompt=prompt,
            kernel=None if self.correlation is None else mean_over_shots(self.correlation.kernel(flat, weights)),
        )

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
        dense = self.mask_downscaling(dense_logits)
        mask = self.decoder(embedding, self.encoding(late.shape[-1]), support.prompt, dense)
        return Prediction(prior_logits=None if self.correlation is None else dense_logits, mask_logits=mask)

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
        """Write `segmenter.safetensors` and `segmenter.json`: config, and `origin` (JSON on where it comes from)."""
        checkpoint.save(folder, "segmenter", self.state_dict(), {"config": asdict(self.config), **origin})

    @classmethod
    def load(cls, folder: str | Path) -> tuple["Segmenter", dict]:
        """The saved segmenter in eval mode, and its JSON record. Raises UserError if the folder is no checkpoint."""
        state, record = checkpoint.read(folder, "segmenter")
        try:
            model = cls(SegmenterConfig(**record["config"]))
            model.load_state_dict(state)
        except (KeyError, TypeError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{folder}: expected a segmenter's checkpoint, got another's ({first})") from None
        model.origin = {key: value for key, value in record.items() if key not in ("config", "format_version")}
        return model.eval(), record
