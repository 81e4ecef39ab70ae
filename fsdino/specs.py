"""What each encoder and teacher is: layers, channels and grids, known without building the network or loading torch.

The classes in encoder.py and teacher.py compute what these describe; a test compares every pair.
"""

from dataclasses import dataclass
from typing import Any, Literal

from fsdino import paper
from fsdino.errors import UserError

Norm = Literal["none", "final", "l2", "channel"]


@dataclass(frozen=True)
class Layer:
    """One layer's output."""

    name: str
    norm: Norm
    """What is applied behind it: the network's final norm, L2 or layer norm over channels, or nothing."""
    channels: int
    groups: tuple[int, ...] = ()
    """Channels of each of the stages that it is made of; empty: one group."""


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder's features."""

    name: str
    stride_px: int
    early: Layer
    late: Layer

    def grid(self, res_px: int) -> int:
        """Side of the feature grid for a square input. Raises UserError if the encoder cannot take that side."""
        if res_px < self.stride_px or res_px % self.stride_px:
            below = max(res_px - res_px % self.stride_px, self.stride_px)
            raise UserError(f"--res {res_px}: {self.name} needs a multiple of {self.stride_px}; {below} is one")
        return res_px // self.stride_px


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher's embedding."""

    name: str
    stride_px: int
    layer: Layer
    side_px: int | None
    """The one side that the teacher takes; None: the student's."""

    def input_px(self, res_px: int) -> int:
        """Side of the square that the teacher sees when the student sees `res_px`."""
        return self.side_px or res_px

    def grid(self, res_px: int) -> int:
        """Side of the embedding then; its last position may lie partly outside the image."""
        return -(-self.input_px(res_px) // self.stride_px)


@dataclass(frozen=True)
class Vit:
    """A ViT of timm: its name there, and its shape."""

    timm: str
    width: int
    depth: int
    patch_px: int


_SIZES = {"s": ("small", 384, 12), "b": ("base", 768, 12), "l": ("large", 1024, 24), "g": ("giant", 1536, 40)}
DINOV2 = {
    f"dinov2_vit{letter}14{reg}": Vit(f"vit_{size}_patch14_{'reg4_' if reg else ''}dinov2", width, depth, 14)
    for letter, (size, width, depth) in _SIZES.items()
    for reg in ("", "_reg")
}
DINOV3 = {
    f"dinov3_vit{letter}16": Vit(f"vit_{_SIZES[letter][0]}_patch16_dinov3", *_SIZES[letter][1:], 16) for letter in "sbl"
}
TINY_VIT = Vit("", 48, 4, 14)
LITE = {
    "tf_efficientnet_lite0": (40, 80, 112, 192, 320),
    "tf_efficientnet_lite1": (40, 80, 112, 192, 320),
    "tf_efficientnet_lite2": (48, 88, 120, 208, 352),
}
"""EfficientNet-Lite's channels behind its blocks 2 (stride 8), 3 and 4 (16), 5 and 6 (32)."""
SAM = {"sam_vit_h": "vit_h", "sam_vit_l": "vit_l", "sam_vit_b": "vit_b"}
"""Our names of SAM's sizes to segment-anything's."""


def encoder_spec(name: str, early_norm: bool = False, late_norm: bool = True) -> EncoderSpec:
    """The features of the encoder called `name`; `early_norm` and `late_norm` as in `build_encoder`.

    Raises UserError if there is no such encoder, or if it has no norm to switch.
    """
    vit = TINY_VIT if name == "tiny_vit" else (DINOV2 | DINOV3).get(name)
    if vit is not None:
        early, late = min(paper.EARLY_LAYER, vit.depth) - 1, vit.depth - 1
        return EncoderSpec(
            name,
            vit.patch_px,
            Layer(f"block{early}", "final" if early_norm else "none", vit.width),
            Layer(f"block{late}", "final" if late_norm else "none", vit.width),
        )
    if name not in LITE:
        known = ", ".join([*DINOV2, *DINOV3, *LITE, "tiny_vit"])
        raise UserError(f"--encoder {name}: no such encoder; known are {known}")
    if early_norm or not late_norm:
        raise UserError(f"--early-norm, --no-late-norm: {name} has no final norm to apply or to leave out")
    stride8, *stages = LITE[name]
    of_stages = Layer("blocks3+blocks4+blocks5+blocks6", "l2", sum(stages), tuple(stages))
    return EncoderSpec(name, 16, Layer("stride8", "l2", stride8), of_stages)


def check_layer(record: dict[str, Any]) -> None:
    """Raises UserError if this release computes other late features than a checkpoint was trained on."""
    backbone, trained_on = record["backbone"], record["late"]
    layer = encoder_spec(backbone["encoder"], backbone["early_norm"], backbone["late_norm"]).late
    if trained_on.get("layer", layer.name) != layer.name:
        raise UserError(
            f"the checkpoint was trained on {backbone['encoder']}'s {trained_on['layer']}, and this release computes "
            f"{layer.name}; train it again"
        )


def teacher_spec(name: str) -> TeacherSpec:
    """The embedding of the teacher called `name`. Raises UserError if there is no such teacher."""
    if name in SAM:
        return TeacherSpec(name, 16, Layer("neck", "none", paper.EMBEDDING_CHANNELS), 1024)
    if name == "tiny_sam":
        return TeacherSpec(name, 16, Layer("neck", "none", 32), 128)
    if name in LITE:
        return TeacherSpec(name, 32, Layer("stride32", "channel", LITE[name][-1]), None)
    raise UserError(f"--teacher {name}: no such teacher; known are {', '.join([*SAM, *LITE, 'tiny_sam'])}")
