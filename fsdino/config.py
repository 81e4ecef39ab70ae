"""What can be chosen about a segmenter. Each switch names the paper's literal value; docs/method.md has the table."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fsdino import paper
from fsdino.errors import UserError


@dataclass(frozen=True)
class SegmenterConfig:
    """The switches of the method: the paper's segmenter, its ablations, and our departures from it."""

    variant: Literal["compact", "4d"] = "4d"
    """Dense prompt: the similarity map (compact), or the prior mask of the 4D correlation."""
    semantic_prompt: bool = True
    """Semantic visual prompt as the sparse prompt; off: SAM's empty one (Table 4, first row)."""
    adapter: Literal["distilled", "joint", "random"] = "distilled"
    """What computes image embeddings: the distilled adapter (the paper's), or, for ablation, a random one that is
    trained along with the segmenter, or a random one that stays as it is."""
    sam_decoder: str | None = None
    """Teacher whose checkpoint initialises the decoder (the paper's is sam_vit_h); none: random weights."""
    contrast: bool = False
    """Let the support's background weigh against its foreground, in prototype and correlation; off: the paper's."""
    refine: bool = False
    """Add the similarity map at full grid to the 4D prior's logits; off: the paper's, where it enters at half the
    grid alone."""
    support_weights: Literal["mask", "share"] = "mask"
    """Weight of a support position in the correlation: the mask alone (mask, Eq. 3), or divided by the object's size
    (share), so that small and large objects have the same total."""
    similarity: Literal["cosine", "unit"] = "cosine"
    """The similarity map that is added to the correlation: as it is (cosine, the paper's), or scaled, and without
    `contrast` centred, to unit variance within its image (unit)."""
    neighbours: bool = False
    """Add to the dense prompt what the support positions nearest to each query position say; off: the paper's."""
    self_support: bool = False
    """With `neighbours`: let the query's own positions then vote for those that resemble them; off: the paper's."""
    presence: bool = False
    """With `neighbours`: score whether a query shows the class at all, and leave its mask empty if it does not seem to;
    off: the paper's, whose tests always show it."""
    fuse: bool = False
    """Add the dense prompt's logits to the decoder's; off: the paper's, where the decoder has the last word."""
    upscaling: Literal["transposed", "bilinear"] = "transposed"
    """How the decoder enlarges: by SAM's transposed convolutions, or bilinear behind convolutions, for a decoder that
    starts at random."""
    decoder_mlp: Literal[512, 1024, 2048] = 2048
    """Width between the two layers of each MLP of the decoder's transformer, which nothing but its three tokens pass:
    SAM's 2048 are 40 % of a model of `offline`."""
    start: Literal["pytorch", "he"] = "he"
    """Initial weights of the correlation's layers: PyTorch's default, which the paper does not change, or He's, without
    which a fresh prior is the same all over the image."""

    @property
    def sam_extras(self) -> bool:
        """Whether SAM's IoU head and three further mask tokens are kept, which its checkpoint needs."""
        return self.sam_decoder is not None

    def record(self) -> dict[str, Any]:
        """What tells it from others: all switches, but for those of a later release that are off."""
        off = dict.fromkeys(("neighbours", "self_support", "presence", "fuse"), False)
        later = {**off, "upscaling": "transposed", "decoder_mlp": 2048}
        return {key: value for key, value in asdict(self).items() if later.get(key, ...) != value}

    def check(self) -> None:
        """Raises UserError for switches that exclude each other."""
        for name in ("self_support", "presence"):
            if getattr(self, name) and not self.neighbours:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: rests on what --neighbours finds; turn that on as well, or --no-{flag}")
        if self.sam_decoder is not None and self.upscaling != "transposed":
            raise UserError("--upscaling bilinear: SAM's decoder has transposed convolutions; leave out --sam-decoder")
        if self.sam_decoder is not None and self.decoder_mlp != 2048:
            raise UserError(f"--decoder-mlp {self.decoder_mlp}: SAM's decoder has 2048; leave out --sam-decoder")


@dataclass(frozen=True)
class SegmenterShape:
    """Sizes that follow from encoder and teacher. Weights fit exactly if config and shape are equal."""

    early_channels: int
    late_channels: int
    grid: int
    """Side of the feature grid, in positions."""
    embedding_channels: int = paper.EMBEDDING_CHANNELS
    late_groups: tuple[int, ...] = ()
    """Channels of each group of the late features (stages of a CNN), in their order; none: one group."""
