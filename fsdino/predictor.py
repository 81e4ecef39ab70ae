"""Masks for your own classes: register a class from annotated photographs once, find it in any photograph.

predictor = Predictor.load()  # or of a checkpoint of your own
cat = predictor.register(["cat1.jpg"], ["cat1.png"])
predictor.set_image("a.jpg")
masks, scores = predictor.segment([cat])
"""

import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fsdino import paper
from fsdino.checkpoint import SHIPPED
from fsdino.data.masks import read_mask
from fsdino.encoder import Encoder, encoder_of_checkpoint, to_input
from fsdino.errors import UserError
from fsdino.neighbours import Annotated, padded
from fsdino.preprocess import Source, read_image, resize_square, to_rgb
from fsdino.presence import lag
from fsdino.prompts import mask_to_grid
from fsdino.segmenter import Prediction, Segmenter, SupportEncoding
from fsdino.state import state_digest
from fsdino.tiles import Box, blended, boxes

Photograph = Image.Image | Source
"""A photograph that is open already, or its path or URL."""
Mask = np.ndarray | Source
"""A mask (h, w) of 0 and one more value, the object's, or its path or URL (see `read_mask`)."""


class Segmentation(NamedTuple):
    """What was found in one image: a mask for each of n classes, and how sure it is."""

    masks: Bool[np.ndarray, "n h w"]
    """At the image's own size."""
    scores: Float[np.ndarray, "n"]
    """Probability in [0, 1] that the image shows the class; the mask is empty if it is below the model's threshold. Of
    a model without `presence`: mean probability over the mask's pixels, in [0.5, 1], or 0 if there are none."""


class Logits(NamedTuple):
    """What was found in one image, before it is cut at 0."""

    mask: Float[Tensor, "n h w"]
    """At the image's own size; float16 if it was looked at in tiles."""
    prior: Float[Tensor, "n m m"] | None
    """At 4 times the grid, where the model has one."""
    scores: Float[np.ndarray, "n"]
    """As in Segmentation."""
    lag: Float[np.ndarray, "n"]
    """What is taken from each class's logits where a pixel that several claim goes to the largest; 0 of a model without
    `presence`."""


class Rank(NamedTuple):
    """What one of a class's photographs is worth to the others."""

    found: float
    """IoU in [0, 1] of its mask, found by the others; low: it shows the class otherwise, or its mask is wrong."""
    helps: float | None
    """By how much the others' IoU is larger with it than without, on average; below 0: it harms. None of two."""


@dataclass(frozen=True)
class ClassEncoding:
    """A registered class: all that its annotated photographs tell the one segmenter that encoded them."""

    name: str
    shots: int
    support: SupportEncoding
    segmenter: str
    """Digest of the segmenter's weights and config."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self._state().values())

    def _state(self) -> dict[str, Tensor]:
        state = {key: value for key, value in self.support._asdict().items() if isinstance(value, Tensor)}
        return state if self.support.annotated is None else state | self.support.annotated._asdict()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with name, shots and segmenter in its header."""
        state = {key: value.cpu().contiguous() for key, value in self._state().items()}
        record = {"name": self.name, "shots": self.shots, "segmenter": self.segmenter}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(state, path, metadata={"class": json.dumps(record)})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from None

    @classmethod
    def load(cls, path: str | Path) -> "ClassEncoding":
        """The class that `save` wrote. Raises UserError if the file is missing or is none."""
        try:
            with safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                record = json.loads((file.metadata() or {})["class"])
            positions = None
            if "features" in state:
                positions = Annotated(*(state[key] for key in Annotated._fields))
            support = SupportEncoding(state["prototype"], state["prompt"], state.get("kernel"), positions)
            return cls(record["name"], record["shots"], support, record["segmenter"])
        except OSError:
            raise UserError(f"{path}: expected a class file, found none; write it with ClassEncoding.save") from None
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path}: expected a class file, got another ({error}); register the class again") from None


class Predictor:
    """An encoder and a segmenter on one device, and the images that they look at."""

    def __init__(self, encoder: Encoder, segmenter: Segmenter, res_px: int, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device {device}: expected a CUDA device on this machine, found none; use cpu")
        network: Any = encoder
        self.encoder: Encoder = network.to(self.device)
        self.segmenter, self.res_px = segmenter.to(self.device).eval(), res_px
        config = json.dumps(segmenter.config.record(), sort_keys=True)
        self.digest = hashlib.sha256(f"{state_digest(segmenter)} {config}".encode()).hexdigest()[:16]
        self._images: list[_Encoded] = []
        self._batched: tuple[Sequence[ClassEncoding], SupportEncoding] | None = None

    @classmethod
    def load(
        cls,
        checkpoint: str | Path = SHIPPED,
        device: str | torch.device = "cpu",
        encoder_weights: str | None = None,
    ) -> "Predictor":
        """The predictor of a segmenter's checkpoint: its folder, or ORGANISATION/NAME on the Hugging Face hub; by
        default the one that comes with the package.

        `encoder_weights` names a local file instead of the publisher's. Raises UserError if the checkpoint is none, or
        if it was trained on an encoder of other weights.
        """
        segmenter = Segmenter.from_pretrained(checkpoint)
        encoder = encoder_of_checkpoint(segmenter.origin, encoder_weights)
        return cls(encoder, segmenter, segmenter.origin["backbone"]["res"], device)

    @torch.inference_mode()
    def register(self, images: Sequence[Photograph], masks: Sequence[Mask], name: str = "") -> ClassEncoding:
        """Encode a class from photographs and their masks, each of its photograph's size.

        A mask's 255 is void if it has pixels of 1 as well: neither the class nor its background. Raises UserError if
        there are none, or not as many of one as of the other, or if a mask is empty, covers its whole photograph, is of
        another size, or can be read in two ways.
        """
        encoded, _, shares, void = self._examples(images, masks)
        late = torch.cat([one.late for one in encoded])
        support = self.segmenter.encode_support(late[None], shares[None], void[None])
        return ClassEncoding(name, len(encoded), support, self.digest)

    @torch.inference_mode()
    def rank(self, images: Sequence[Photograph], masks: Sequence[Mask]) -> list[Rank]:
        """How well each of a class's photographs is found by the others, and whether they need it.

        Raises UserError as `register`, and if there are fewer than two.
        """
        if len(images) < 2:
            raise UserError(f"expected at least two photographs to compare, got {len(images)}")
        encoded, checked, shares, void = self._examples(images, masks)
        late, every = torch.cat([one.late for one in encoded]), range(len(encoded))

        def iou(target: int, out: set[int]) -> float:
            """Of a photograph's mask, found by those that are not left out."""
            rest = [i for i in every if i not in out]
            support = self.segmenter.encode_support(late[None, rest], shares[None, rest], void[None, rest])
            found, mask = self._logits(encoded[target], support).mask[0] > 0, checked[target]
            valid, truth = mask != paper.VOID, mask == 1
            union = ((found | truth) & valid).sum()
            return float((found & truth).sum() / union) if union else 1.0

        alone = [iou(i, {i}) for i in every]
        ranks = []
        for i in every:
            others = [j for j in every if j != i]
            helps = statistics.fmean(alone[j] - iou(j, {i, j}) for j in others) if len(others) > 1 else None
            ranks.append(Rank(alone[i], helps))
        return ranks

    @torch.inference_mode()
    def set_image(self, image: Photograph, tile_px: int | None = None, overlap: float = 0.25) -> None:
        """Encode a photograph; `segment` looks for classes in it.

        With `tile_px`, also tiles of that side in its own pixels, which share `overlap` of it with the next (tiles.py):
        for photographs much larger than the network's square, with small objects.
        """
        opened = _opened(image)
        self.set_images([opened])
        if tile_px is not None and max(opened.size) > tile_px:
            found = boxes(opened.height, opened.width, tile_px, overlap)
            tiles = [(box, self._encoded(_cut(opened, box)).half()) for box in found]
            self._images = [replace(self._images[0], tiles=tiles, overlap=overlap)]

    @torch.inference_mode()
    def set_images(self, images: Sequence[Photograph]) -> None:
        """Encode several photographs in one batch, for `segment_batch`. Raises UserError if there are none."""
        if not images:
            raise UserError("expected at least one photograph, got none")
        opened = [_opened(image) for image in images]
        encoded = zip(*(x.split(1) for x in self._features(opened)), strict=True)
        self._images = [_Encoded(image.size, *features) for image, features in zip(opened, encoded, strict=True)]

    @torch.inference_mode()
    def set_features(
        self, sizes: Sequence[tuple[int, int]], late: Float[Tensor, "b c g g"], early: Float[Tensor, "b e g g"]
    ) -> None:
        """As `set_images`, for photographs of these (width, height) whose features the encoder computed before."""
        encoded = zip(late.split(1), self.segmenter.embed(early).split(1), strict=True)
        self._images = [_Encoded(size, *features) for size, features in zip(sizes, encoded, strict=True)]

    def segment(self, classes: Sequence[ClassEncoding]) -> Segmentation:
        """Each class's mask, (n, height, width) at the size of the image that `set_image` got, and its score (n,).

        Raises UserError if no image or several are set, or if a class was registered with another segmenter.
        """
        if len(self._images) != 1:
            raise UserError(f"expected one image from set_image, got {len(self._images)}; see segment_batch")
        return self.segment_batch(classes)[0]

    def segment_batch(self, classes: Sequence[ClassEncoding]) -> list[Segmentation]:
        """As `segment`, for each of the images that `set_images` got."""
        return [Segmentation((found.mask > 0).numpy(), found.scores) for found in self.logits(classes)]

    def logits(self, classes: Sequence[ClassEncoding]) -> Iterator[Logits]:
        """As `segment_batch`, one image after another, as logits."""
        support = self._support(classes)
        return (self._logits(of_image, support) for of_image in self._images)

    @torch.inference_mode()
    def features(
        self, squares: UInt8[np.ndarray, "b r r 3"]
    ) -> tuple[Float[Tensor, "b c g g"], Float[Tensor, "b e g g"]]:
        """Late features, and what stands in for SAM's embedding, of photographs that are the network's squares already;
        `find` looks for classes in them."""
        found = self.encoder(to_input(squares, self.encoder.mean, self.encoder.std).to(self.device))
        return found.late, self.segmenter.embed(found.early)

    @torch.inference_mode()
    def find(
        self, late: Float[Tensor, "b c g g"], embedding: Float[Tensor, "b e g g"], classes: Sequence[ClassEncoding]
    ) -> list[Prediction]:
        """What the network makes of n classes in each of b images, before it is enlarged to the image's size; masks of
        classes below the presence threshold are emptied already."""
        support = self._support(classes)
        encoded = zip(late.split(1), embedding.split(1), strict=True)
        return [self._predicted(_Encoded((0, 0), *of_image), support) for of_image in encoded]

    @torch.inference_mode()
    def _logits(self, image: "_Encoded", support: SupportEncoding) -> Logits:
        predicted, (width, height) = self._predicted(image, support), image.size
        presence = [predicted.presence]
        if image.tiles:

            def tiles() -> Iterator[tuple[Box, Tensor]]:
                for box, tile in image.tiles:
                    of_tile = self._predicted(tile, support)
                    presence.append(of_tile.presence)
                    yield box, of_tile.mask_logits[:, 0]

            mask = blended(predicted.mask_logits[:, 0], height, width, tiles(), image.overlap)
        else:
            size = (height, width)
            mask = F.interpolate(predicted.mask_logits, size=size, mode="bilinear", align_corners=False)[:, 0].cpu()
        prior, known = predicted.prior_logits, [one for one in presence if one is not None]
        if known:
            shown = torch.stack(known).amax(0).float().cpu()
            scores, behind = shown.numpy(), lag(shown).numpy()
        else:
            scores, behind = self._sureness(mask), np.zeros(len(mask), np.float32)
        return Logits(mask, None if prior is None else prior[:, 0].cpu(), scores, behind)

    def _predicted(self, image: "_Encoded", support: SupportEncoding) -> Prediction:
        """Every class in one square."""
        classes = len(support.prototype)
        late, embedding = (x.float().expand(classes, -1, -1, -1) for x in (image.late, image.embedding))
        return self.segmenter.segment(late, embedding, support).emptied(self.segmenter.threshold)

    def _examples(
        self, images: Sequence[Photograph], masks: Sequence[Mask]
    ) -> tuple[list["_Encoded"], list[Tensor], Float[Tensor, "k g g"], Float[Tensor, "k g g"]]:
        """Photographs of a class encoded, their masks at their size, and the shares of class and void on the grid."""
        if not images or len(images) != len(masks):
            raise UserError(
                f"expected photographs and one mask for each, got {len(images)} photographs and {len(masks)} masks"
            )
        opened = [_opened(image) for image in images]
        checked = [torch.from_numpy(_checked(mask, image)) for mask, image in zip(masks, opened, strict=True)]
        encoded = [self._encoded(image) for image in opened]

        def shares(value: int) -> Tensor:
            grid = encoded[0].late.shape[-1]
            return torch.cat([mask_to_grid((mask == value).float()[None], grid) for mask in checked]).to(self.device)

        return encoded, checked, shares(1), shares(paper.VOID)

    def _encoded(self, image: Image.Image) -> "_Encoded":
        return _Encoded(image.size, *self._features([image]))

    @staticmethod
    def _sureness(logits: Float[Tensor, "n h w"]) -> Float[np.ndarray, "n"]:
        """Scores of masks of a model without `presence`."""
        scores = []
        for of_class in logits:
            total, count = 0.0, 0
            for rows in of_class.split(256):  # a part after another, as a photograph may have 192 million pixels
                inside = rows[rows > 0].float().sigmoid()
                total, count = total + float(inside.double().sum()), count + len(inside)
            scores.append(total / count if count else 0.0)
        return np.array(scores, np.float32)

    def check(self, classes: Sequence[ClassEncoding]) -> None:
        """Raises UserError if there is no class, or one that was registered with another segmenter."""
        if not classes:
            raise UserError("expected at least one class to look for, got none; register one")
        other = [c.name for c in classes if c.segmenter != self.digest]
        if other:
            raise UserError(
                f"class {other[0]!r} was registered with another segmenter than {self.digest}; register it again"
            )

    def _support(self, classes: Sequence[ClassEncoding]) -> SupportEncoding:
        """All classes in one batch; that of the last classes is kept."""
        if self._batched is not None and list(map(id, self._batched[0])) == list(map(id, classes)):
            return self._batched[1]
        self.check(classes)
        supports = [c.support.to(self.device) for c in classes]
        kernels = [s.kernel for s in supports if s.kernel is not None]
        positions = [s.annotated for s in supports if s.annotated is not None]
        batched = SupportEncoding(
            prototype=torch.cat([s.prototype for s in supports]),
            prompt=torch.cat([s.prompt for s in supports]),
            kernel=torch.cat(kernels) if kernels else None,
            annotated=padded(positions) if positions else None,
        )
        self._batched = tuple(classes), batched
        return batched

    def _features(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        return self.features(np.stack([resize_square(image, self.res_px) for image in images]))


@dataclass(frozen=True)
class _Encoded:
    """What a network's square shows of a photograph, or of a tile, and its tiles."""

    size: tuple[int, int]
    """Width and height."""
    late: Float[Tensor, "1 c g g"]
    embedding: Float[Tensor, "1 e g g"]
    tiles: "Sequence[tuple[Box, _Encoded]]" = ()
    overlap: float = 0.0

    def half(self) -> "_Encoded":
        """In half the memory, as a photograph may have hundreds of tiles."""
        return replace(self, late=self.late.half(), embedding=self.embedding.half())


def _cut(image: Image.Image, box: Box) -> Image.Image:
    return image.crop((box.left, box.top, box.left + box.width, box.top + box.height))


def _opened(image: Photograph) -> Image.Image:
    if isinstance(image, np.ndarray):
        raise UserError("expected a photograph as a PIL image, path or URL, got an array; Image.fromarray makes one")
    return to_rgb(image) if isinstance(image, Image.Image) else read_image(image)


def _checked(mask: Mask, image: Image.Image) -> np.ndarray:
    """The mask as 1 on the object, 255 where it is void and 0 elsewhere, of its photograph's size."""
    if not isinstance(mask, np.ndarray):
        return read_mask(mask, image.size)
    if mask.shape != image.size[::-1]:
        raise UserError(f"expected a mask (height, width) of {image.size[::-1]}, got {mask.shape}")
    values = set(np.unique(mask).tolist())
    void = mask == paper.VOID if {1, paper.VOID} <= values <= {0, 1, paper.VOID} else np.zeros(mask.shape, bool)
    if len(values - {0}) > 1 and not void.any():
        raise UserError(f"expected a mask of 0, one value and 255 for void, got {sorted(values)[:8]}")
    inside = (mask != 0) & ~void
    if not inside.any() or inside.all():
        raise UserError(f"expected a mask of an object and its background, got one with {inside.mean():.0%} object")
    return np.where(void, paper.VOID, inside).astype(np.uint8)
