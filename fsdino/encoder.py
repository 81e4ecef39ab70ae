"""Frozen image encoders behind one contract: an image in, `early` and `late` features on one grid out.

A new backbone is a line in specs.py, a line in `build_encoder`, and a class here if its forward is new.
"""

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fsdino import paper, specs
from fsdino.errors import UserError
from fsdino.state import efficientnet_lite_state, load_state
from fsdino.weights import check_digest, weights_file

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """`early` feeds the adapter, `late` the prompts; both on the same grid."""

    early: Float[Tensor, "b c g g"]
    late: Float[Tensor, "b d g g"]


@runtime_checkable  # tests check annotations while they run
class Encoder(Protocol):
    """What extraction and prediction need of an encoder."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, x: Float[Tensor, "b 3 r r"]) -> Features:
        """Features of a normalised batch."""
        ...

    def early(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b c g g"]:
        """The early features alone, as cheaply as the encoder can."""
        ...

    def layer_maps(self, x: Float[Tensor, "b 3 r r"]) -> dict[str, Tensor]:
        """The output of every layer or stage by its name, from the first to the last, without any norm."""
        ...


class _VitEncoder(nn.Module):
    """What encoders made of a ViT of timm share: `early` is block 3 (index 2), `late` the last block.

    `early_norm` and `late_norm` say whether the final norm is applied to each; by default to `late` alone.
    """

    vit: Any

    def __init__(self, vit: Any, name: str, early_norm: bool, late_norm: bool):
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.name, self.early_norm, self.late_norm = name, early_norm, late_norm
        self.patch_px = vit.patch_embed.patch_size[0]
        self.late_index = len(vit.blocks) - 1
        self.early_index = min(paper.EARLY_LAYER - 1, self.late_index)


class DinoV2Encoder(_VitEncoder):
    """DINOv2, plain or with registers, with the official code's position embeddings at any multiple of the patch."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, vit: Any, name: str, early_norm: bool = False, late_norm: bool = True):
        super().__init__(vit, name, early_norm, late_norm)
        self._positions: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, x: Float[Tensor, "b 3 r r"]) -> Features:
        """Features of a normalised batch."""
        early = late = self._early_tokens(x)
        for block in self.vit.blocks[self.early_index + 1 :]:
            late = block(late)
        return Features(self._map(early, self.early_norm), self._map(late, self.late_norm))

    def early(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b c g g"]:
        """The early features alone, for a quarter of the work."""
        return self._map(self._early_tokens(x), self.early_norm)

    def layer_maps(self, x: Float[Tensor, "b 3 r r"]) -> dict[str, Tensor]:
        """Every block's output, numbered from 1 as the paper does."""
        tokens, maps = self._embedded(x), {}
        for number, block in enumerate(self.vit.blocks, start=1):
            tokens = block(tokens)
            maps[str(number)] = self._map(tokens, norm=False)
        return maps

    def _early_tokens(self, x: Tensor) -> Tensor:
        tokens = self._embedded(x)
        for block in self.vit.blocks[: self.early_index + 1]:
            tokens = block(tokens)
        return tokens

    def _embedded(self, x: Tensor) -> Tensor:
        """The tokens that the first block gets."""
        vit = self.vit
        patches = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)
        first = [vit.cls_token.expand(len(x), -1, -1)]
        positions = self._position(x.shape[-1] // self.patch_px)  # at full precision under autocast, as the official
        if vit.reg_token is not None:  # timm adds the class token's position to the token itself
            first.append(vit.reg_token.expand(len(x), -1, -1))
            return torch.cat([*first, patches + positions], dim=1)
        return torch.cat([*first, patches], dim=1) + positions

    def _position(self, grid: int) -> Tensor:
        """The position embedding at a grid."""
        table = self.vit.pos_embed
        key = (grid, table.device)
        if key not in self._positions:
            resize = position_embedding if self.vit.reg_token is None else register_position_embedding
            self._positions[key] = resize(table, grid)
        return self._positions[key]

    def _map(self, tokens: Tensor, norm: bool) -> Tensor:
        """Patch tokens behind class token and registers, as a square map."""
        patches = (self.vit.norm(tokens) if norm else tokens)[:, self.vit.num_prefix_tokens :]
        grid = math.isqrt(patches.shape[1])
        return patches.transpose(1, 2).unflatten(2, (grid, grid))


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


def register_position_embedding(table: Float[Tensor, "1 n c"], grid: int) -> Float[Tensor, "1 m c"]:
    """As position_embedding, for the models with registers, whose table is without the class token here: to the very
    size, bicubic with antialiasing."""
    side = math.isqrt(table.shape[1])
    if side == grid:
        return table
    patches = table.transpose(1, 2).unflatten(2, (side, side)).float()
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True)
    return patches.flatten(2).transpose(1, 2).to(table.dtype)


class TimmVitEncoder(_VitEncoder):
    """Any other ViT of timm, through timm's own forward: all that a new family of backbones takes."""

    def __init__(self, vit: Any, name: str, early_norm: bool = False, late_norm: bool = True):
        super().__init__(vit, name, early_norm, late_norm)
        self.mean, self.std = vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"]

    def forward(self, x: Float[Tensor, "b 3 r r"]) -> Features:
        """Features of a normalised batch."""
        early, late = self._layers(x, [self.early_index, self.late_index])
        return Features(self._normed(early, self.early_norm), self._normed(late, self.late_norm))

    def early(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b c g g"]:
        """The early features alone."""
        return self._normed(self._layers(x, [self.early_index])[0], self.early_norm)

    def layer_maps(self, x: Float[Tensor, "b 3 r r"]) -> dict[str, Tensor]:
        """Every block's output, numbered from 1."""
        maps = self._layers(x, list(range(self.late_index + 1)))
        return {str(number): features for number, features in enumerate(maps, start=1)}

    def _layers(self, x: Tensor, indices: list[int]) -> list[Tensor]:
        return self.vit.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True)

    def _normed(self, features: Tensor, norm: bool) -> Tensor:
        return self.vit.norm(features.movedim(1, -1)).movedim(-1, 1) if norm else features


class EfficientNetLiteEncoder(nn.Module):
    """EfficientNet-Lite on the stride-16 grid: `early` is the stride-8 stage, `late` the two stages each of strides 16
    and 32.

    Each stage is L2-normalised over its channels, so all parts of `late` weigh the same in a cosine.
    """

    mean = std = (0.5, 0.5, 0.5)
    net: Any

    def __init__(self, model_name: str):
        super().__init__()
        self.name = model_name
        self.net = timm.create_model(model_name, pretrained=False, num_classes=0)
        self.net.load_state_dict(efficientnet_lite_state(model_name, self.net))
        self.net.eval().requires_grad_(False)

    def forward(self, x: Float[Tensor, "b 3 r r"]) -> Features:
        """Features of a normalised batch."""
        _, _, stride8, *stages = self._stages(x)
        size = stages[0].shape[-1]
        stages = [F.interpolate(s, size=(size, size), mode="bilinear", align_corners=False) for s in stages]
        early = F.adaptive_avg_pool2d(stride8, size)
        return Features(F.normalize(early, dim=1), torch.cat([F.normalize(s, dim=1) for s in stages], dim=1))

    def early(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b c g g"]:
        """The early features alone, for a third of the work."""
        grid = -(-x.shape[-1] // 16)
        return F.normalize(F.adaptive_avg_pool2d(self._stages(x, 3)[-1], grid), dim=1)

    def layer_maps(self, x: Float[Tensor, "b 3 r r"]) -> dict[str, Tensor]:
        """The output of each group of blocks on its own grid, called by its number and its stride."""
        strides = (2, 4, 8, 16, 16, 32, 32)
        return {f"blocks {n}, stride {strides[n]}": stage for n, stage in enumerate(self._stages(x))}

    def _stages(self, x: Tensor, count: int = 7) -> list[Tensor]:
        """What each of the first groups of blocks puts out."""
        x, stages = self.net.bn1(self.net.conv_stem(x)), []
        for blocks in self.net.blocks[:count]:
            x = blocks(x)
            stages.append(x)
        return stages


def build_encoder(
    name: str, weights: str | None = None, seed: int = 0, early_norm: bool = False, late_norm: bool = True
) -> Encoder:
    """The encoder called `name`, frozen, with the publisher's weights or those that `weights` names.

    `weights` is a local file or a hub id, `hf:ORGANISATION/NAME`, under the publisher's names or timm's. `early_norm`
    and `late_norm`: apply the ViT's final norm to the layer. `tiny_vit` is a four-block ViT of DINOv2's architecture
    with random weights from `seed`, for tests.
    """
    specs.encoder_spec(name, early_norm, late_norm)
    if name in specs.DINOV2:
        vit = timm.create_model(specs.DINOV2[name].timm, pretrained=False, num_classes=0)
        load_state(vit, name, weights, convert=_dinov2_to_timm)
        return DinoV2Encoder(vit, name, early_norm, late_norm)
    if name in specs.DINOV3:
        vit = timm.create_model(specs.DINOV3[name].timm, pretrained=False, num_classes=0, dynamic_img_size=True)
        load_state(vit, name, weights)
        return TimmVitEncoder(vit, name, early_norm, late_norm)
    weights_file(name, weights)
    if name in specs.LITE:
        return EfficientNetLiteEncoder(name)
    return DinoV2Encoder(_tiny_vit(seed), name, early_norm, late_norm)


def encoder_of_checkpoint(record: dict[str, Any], weights: str | None = None) -> Encoder:
    """The encoder that a segmenter was trained on, from its checkpoint's record; `weights` as in `build_encoder`.

    Raises UserError if the weights are others.
    """
    if "backbone" not in record or "late" not in record:
        raise UserError(
            "the checkpoint does not say which encoder it was trained on; use one written by train_episodic"
        )
    trained_on = record["backbone"]
    name, weights = trained_on["encoder"], weights or trained_on["encoder_weights"]
    check_digest(name, weights, record["late"]["weights"])
    specs.check_layer(record)
    return build_encoder(name, weights, early_norm=trained_on["early_norm"], late_norm=trained_on["late_norm"])


def to_input(
    pixels: UInt8[np.ndarray, "b r r 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "b 3 r r"]:
    """Pixels 0-255 to a network's input: scaled to [0, 1], then normalised by its own `mean` and `std`."""
    x = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _dinov2_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's published names and layout to timm's.

    The mask token is only used in pre-training; ViT-g's SwiGLU has other names; with registers, timm keeps the class
    token's position in the token itself. A state that is timm's already stays as it is.
    """
    state = {key: value for key, value in state.items() if key != "mask_token"}
    if {"register_tokens", "cls_token", "pos_embed"} <= state.keys():
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    names = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def _tiny_vit(seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit: Any = timm.models.vision_transformer.VisionTransformer(
            img_size=56, patch_size=14, embed_dim=48, depth=4, num_heads=4, init_values=1.0, num_classes=0
        )
        # timm starts positions near zero; these make them count, as in a trained network.
        nn.init.normal_(vit.pos_embed, std=0.5)
    return vit
