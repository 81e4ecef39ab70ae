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

from fsdino.encoder import IMAGENET_MEAN, IMAGENET_STD, LITE
from fsdino.errors import UserError
from fsdino.weights import efficientnet_lite_state, load_state, own_weights_only, state_digest


@runtime_checkable
class Teacher(Protocol):
    """What extraction needs of a teacher."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels: int
    digest: str
    layers: str

    def input_px(self, res_px: int) -> int:
        """Side of the square the teacher sees when the student sees `res_px`."""
        ...

    def grid(self, res_px: int) -> int:
        """Side of the embedding for an input of `input_px(res_px)`."""
        ...

    def __call__(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b e t t"]:
        """The embedding of a normalised batch."""
        ...


class SamTeacher(nn.Module):
    """SAM's image encoder on the square-resized image, so that its grid lies on the student's."""

    # SAM states these on the 0-255 scale: 123.675 116.28 103.53 and 58.395 57.12 57.375.
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    layers = "neck"
    image_encoder: Any

    def __init__(self, image_encoder: Any, name: str):
        super().__init__()
        self.image_encoder = image_encoder.eval().requires_grad_(False)
        self.name = name
        self.side_px: int = image_encoder.img_size
        self.channels: int = image_encoder.neck[-1].weight.shape[0]
        self.digest = state_digest(image_encoder)

    def input_px(self, res_px: int) -> int:
        """SAM's own side, whatever the student sees."""
        return self.side_px

    def grid(self, res_px: int) -> int:
        """Patches of 16 px along SAM's own side."""
        return self.side_px // 16

    def forward(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b e t t"]:
        """The neck's output."""
        return self.image_encoder(x)


class EfficientNetLiteTeacher(nn.Module):
    """The last feature map (stride 32) of an EfficientNet-Lite, layer-normalised over channels as SAM's neck ends."""

    mean = std = (0.5, 0.5, 0.5)
    layers = "stride32, channel layer norm"
    net: Any

    def __init__(self, model_name: str):
        super().__init__()
        self.name = model_name
        self.net = timm.create_model(model_name, pretrained=False, features_only=True, out_indices=(4,))
        self.net.load_state_dict(efficientnet_lite_state(model_name, self.net))
        self.net.eval().requires_grad_(False)
        self.channels: int = self.net.feature_info.channels()[-1]
        self.digest = state_digest(self.net)

    def input_px(self, res_px: int) -> int:
        """The student's side."""
        return res_px

    def grid(self, res_px: int) -> int:
        """Stride-32 positions, the last one partly outside where the side is no multiple of 32."""
        return -(-res_px // 32)

    def forward(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b e t t"]:
        """The last stage, each position with mean 0 and variance 1 over channels."""
        (last,) = self.net(x)
        return F.layer_norm(last.movedim(1, -1), (self.channels,)).movedim(-1, 1)


SAM_REGISTRY = {"sam_vit_h": "vit_h", "sam_vit_l": "vit_l", "sam_vit_b": "vit_b"}


def build_teacher(name: str, weights: str | None = None, seed: int = 0) -> Teacher:
    """The teacher called `name`, frozen, with the publisher's weights or those of the local file `weights`.

    `tiny_sam` is a two-block SAM encoder with random weights from `seed`, for tests.
    """
    if name in SAM_REGISTRY:
        sam = sam_model_registry[SAM_REGISTRY[name]]()
        load_state(sam, name, weights)
        return SamTeacher(sam.image_encoder, name)
    if name == "tiny_sam":
        own_weights_only(name, weights)
        return SamTeacher(_tiny_sam(seed), name)
    if name in LITE:
        own_weights_only(name, weights)
        return EfficientNetLiteTeacher(name)
    known = ", ".join([*SAM_REGISTRY, *LITE, "tiny_sam"])
    raise UserError(f"--teacher {name}: no such teacher; known are {known}")


def sam_decoder_state(name: str, weights: str | None = None) -> dict[str, Tensor]:
    """SAM's mask decoder, mask downscaling and Gaussian matrix, under the names of `Segmenter`."""
    if name not in SAM_REGISTRY:
        raise UserError(f"--sam-decoder {name}: no such checkpoint; known are {', '.join(SAM_REGISTRY)}")
    sam = sam_model_registry[SAM_REGISTRY[name]]()
    load_state(sam, name, weights)
    state = {f"decoder.{key}": value for key, value in sam.mask_decoder.state_dict().items()}
    state |= {f"mask_downscaling.{key}": v for key, v in sam.prompt_encoder.mask_downscaling.state_dict().items()}
    state["encoding.gaussian"] = sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    return state


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
