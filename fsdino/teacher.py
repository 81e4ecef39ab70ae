"""Frozen teachers: the image embedding that the adapter learns to imitate (Sec. 3.3)."""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from segment_anything.build_sam import sam_model_registry
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from fsdino import specs
from fsdino.encoder import IMAGENET_MEAN, IMAGENET_STD
from fsdino.state import efficientnet_lite_state, load_state
from fsdino.weights import weights_file


@runtime_checkable  # tests check annotations while they run
class Teacher(Protocol):
    """What extraction needs of a teacher."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b e t t"]:
        """The embedding of a normalised batch."""
        ...


class SamTeacher(nn.Module):
    """SAM's image encoder on the square-resized image, so that its grid lies on the student's."""

    # SAM states these on the 0-255 scale: 123.675 116.28 103.53 and 58.395 57.12 57.375.
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    image_encoder: Any

    def __init__(self, image_encoder: Any, name: str):
        super().__init__()
        self.image_encoder = image_encoder.eval().requires_grad_(False)
        self.name = name

    def forward(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b e t t"]:
        """The neck's output."""
        return self.image_encoder(x)


class EfficientNetLiteTeacher(nn.Module):
    """The last feature map (stride 32) of an EfficientNet-Lite, layer-normalised over channels as SAM's neck ends."""

    mean = std = (0.5, 0.5, 0.5)
    net: Any

    def __init__(self, model_name: str):
        super().__init__()
        self.name = model_name
        self.net = timm.create_model(model_name, pretrained=False, features_only=True, out_indices=(4,))
        self.net.load_state_dict(efficientnet_lite_state(model_name, self.net))
        self.net.eval().requires_grad_(False)
        self.channels: int = self.net.feature_info.channels()[-1]

    def forward(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b e t t"]:
        """The last stage, each position with mean 0 and variance 1 over channels."""
        (last,) = self.net(x)
        return F.layer_norm(last.movedim(1, -1), (self.channels,)).movedim(-1, 1)


def build_teacher(name: str, weights: str | None = None, seed: int = 0) -> Teacher:
    """The teacher called `name`, frozen, with the publisher's weights or those of the local file `weights`.

    `tiny_sam` is a two-block SAM encoder with random weights from `seed`, for tests.
    """
    specs.teacher_spec(name)
    if name in specs.SAM:
        sam = sam_model_registry[specs.SAM[name]]()
        load_state(sam, name, weights)
        return SamTeacher(sam.image_encoder, name)
    weights_file(name, weights)
    if name in specs.LITE:
        return EfficientNetLiteTeacher(name)
    return SamTeacher(_tiny_sam(seed), name)


def _tiny_sam(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageEncoderViT(
            img_size=128,
            patch_size=16,
            embed_dim=32,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            out_chans=32,
            qkv_bias=True,
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(1,),
        )
