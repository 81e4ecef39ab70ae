"""Frozen image encoders behind one contract: an image in, `early` and `late` features on one grid out.

A new timm backbone is one class here and one line in `build_encoder`.
"""

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fsdino import paper
from fsdino.errors import UserError
from fsdino.weights import efficientnet_lite_state, load_state, state_digest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """`early` feeds the adapter, `late` the prompts; both on the same grid."""

    early: Float[Tensor, "b c g g"]
    late: Float[Tensor, "b d g g"]


@runtime_checkable
class Encoder(Protocol):
    """What extraction and prediction need of an encoder."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    early_channels: int
    late_channels: int
    digest: str
    """Hash of the weights: features of different weights never mix."""
    layers: str
    """Which layers and norms `early` and `late` are, for the store's fingerprint."""

    def grid(self, res_px: int) -> int:
        """Side of the feature grid for a square input; UserError if the encoder cannot take that side."""
        ...

    def __call__(self, x: Float[Tensor, "b 3 r r"]) -> Features:
        """Features of a normalised batch."""
        ...

    def early(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b c g g"]:
        """The early features alone, as cheaply as the encoder can."""
        ...


class DinoV2Encoder(nn.Module):
    """A DINOv2 ViT of timm: `early` is block 3 (index 2) before the final norm, `late` the last block after it."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    vit: Any

    def __init__(self, vit: Any, name: str):
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.name = name
        self.early_channels: int = vit.embed_dim
        self.late_channels: int = vit.embed_dim
        self.patch_px = vit.patch_embed.patch_size[0]
        self.early_index = min(paper.EARLY_LAYER, len(vit.blocks)) - 1
        self.layers = f"early=block{self.early_index} late=block{len(vit.blocks) - 1}+norm"
        self.digest = state_digest(vit)

    def grid(self, res_px: int) -> int:
        """Patches along a side."""
        below = res_px - res_px % self.patch_px
        if below != res_px:
            raise UserError(f"--res {res_px}: {self.name} needs a multiple of {self.patch_px}; {below} is one")
        return res_px // self.patch_px

    def forward(self, x: Float[Tensor, "b 3 r r"]) -> Features:
        """Features of a normalised batch."""
        early = late = self._early_tokens(x)
        for block in self.vit.blocks[self.early_index + 1 :]:
            late = block(late)
        return Features(self._map(early), self._map(self.vit.norm(late)))

    def early(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b c g g"]:
        """The early features alone, for a quarter of the work."""
        return self._map(self._early_tokens(x))

    def _early_tokens(self, x: Tensor) -> Tensor:
        vit = self.vit
        tokens = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)
        cls = vit.cls_token.expand(len(x), -1, -1)
        table = position_embedding(vit.pos_embed, x.shape[-1] // self.patch_px)
        tokens = torch.cat([cls, tokens], dim=1) + table.to(tokens.dtype)
        for block in vit.blocks[: self.early_index + 1]:
            tokens = block(tokens)
        return tokens

    @staticmethod
    def _map(tokens: Tensor) -> Tensor:
        """Patch tokens behind the class token as a square map."""
        grid = math.isqrt(tokens.shape[1] - 1)
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))


def position_embedding(table: Float[Tensor, "1 n c"], grid: int) -> Float[Tensor, "1 m c"]:
    """DINOv2's table (class token first) at another grid: bicubic without antialiasing, with the offset of 0.1 that
    its code adds to the scale so that rounding never loses a row."""
    side = math.isqrt(table.shape[1] - 1)
    if side == grid:
        return table
    patches = table[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()
    scale = (grid + 0.1) / side
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class EfficientNetLiteEncoder(nn.Module):
    """EfficientNet-Lite on the stride-16 grid: `early` is the stride-8 stage, `late` the stride-16 and -32 stages.

    Each stage is L2-normalised over its channels, so both halves of `late` weigh the same in a cosine.
    """

    mean = std = (0.5, 0.5, 0.5)
    net: Any
    layers = "early=stride8 late=stride16,stride32, each L2-normalised"

    def __init__(self, model_name: str):
        super().__init__()
        self.name = model_name
        self.net = timm.create_model(model_name, pretrained=False, features_only=True)
        channels = self.net.feature_info.channels()
        self.net.load_state_dict(efficientnet_lite_state(model_name, self.net))
        self.net.eval().requires_grad_(False)
        self.early_channels, self.late_channels = channels[2], channels[3] + channels[4]
        self.digest = state_digest(self.net)

    def grid(self, res_px: int) -> int:
        """Stride-16 positions along a side."""
        if res_px % 16:
            raise UserError(f"--res {res_px}: {self.name} needs a multiple of 16; {res_px - res_px % 16} is one")
        return res_px // 16

    def forward(self, x: Float[Tensor, "b 3 r r"]) -> Features:
        """Features of a normalised batch."""
        _, _, s8, s16, s32 = self.net(x)
        size = s16.shape[-2:]
        s32 = F.interpolate(s32, size=size, mode="bilinear", align_corners=False)
        early = F.adaptive_avg_pool2d(s8, size)
        late = torch.cat([F.normalize(s16, dim=1), F.normalize(s32, dim=1)], dim=1)
        return Features(F.normalize(early, dim=1), late)

    def early(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b c g g"]:
        """The early features alone."""
        return self(x).early


DINOV2_TIMM = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
}


def build_encoder(name: str, weights: str | None = None, seed: int = 0) -> Encoder:
    """The encoder called `name`, frozen, with the publisher's weights or those of the local file `weights`.

    `tiny_vit` is a four-block ViT of DINOv2's architecture with random weights from `seed`, for tests.
    """
    if name in DINOV2_TIMM:
        vit = timm.create_model(DINOV2_TIMM[name], pretrained=False, num_classes=0)
        load_state(vit, name, weights, convert=_dinov2_to_timm)
        return DinoV2Encoder(vit, name)
    if name == "tiny_vit":
        return DinoV2Encoder(_tiny_vit(seed), name)
    if name in ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"):
        return EfficientNetLiteEncoder(name)
    known = ", ".join(
        [*DINOV2_TIMM, "tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2", "tiny_vit"]
    )
    raise UserError(f"--encoder {name}: no such encoder; known are {known}")


def _dinov2_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's published keys are timm's, apart from a token that is only used in pre-training."""
    return {key: value for key, value in state.items() if key != "mask_token"}


def _tiny_vit(seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit: Any = timm.models.vision_transformer.VisionTransformer(
            img_size=56, patch_size=14, embed_dim=48, depth=4, num_heads=4, init_values=1.0, num_classes=0
        )
        # timm starts positions near zero; these make them count, as in a trained network.
        nn.init.normal_(vit.pos_embed, std=0.5)
    return vit
