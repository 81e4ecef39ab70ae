"""Hundreds of damaged and odd inputs: right, refused in one line, or noted; never a crash, never silently another."""

import io
import json
import random
import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fsdino import checkpoint
from fsdino.data.lists import parse_classes, parse_ids
from fsdino.data.masks import read_label, read_mask, voc_colours
from fsdino.errors import DataWarning, UserError
from fsdino.preprocess import read_image

SIZE = (64, 48)
TRUTH = Image.new("L", SIZE, 0)
ImageDraw.Draw(TRUTH).ellipse((10, 8, 40, 36), fill=255)
MASK = np.array(TRUTH) > 0
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
GREY16 = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (48, 64), dtype=np.uint16))


def damaged(data, rng):
    """Bytes flipped, cut, doubled or overwritten in one to four places."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, len(data)))
        kind = rng.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.randint(1, 200)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 200)]
        elif kind == 3:
            data[at : at + 4] = rng.randbytes(4)
        else:
            del data[rng.randrange(max(1, len(data))) :]
    return bytes(data)


def files(images):
    found = []
    for image, kinds in images:
        for kind in kinds:
            file = io.BytesIO()
            image.save(file, kind)
            found.append(file.getvalue())
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, about damaged metadata
@pytest.mark.parametrize("seed", range(8))
def test_damaged_photographs_masks_and_labels_are_read_or_refused(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "x"
    photographs = files([(PHOTO, ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP")), (GREY16, ("PNG", "TIFF"))])
    labels = files([(TRUTH, ("PNG", "TIFF")), (TRUTH.convert("P"), ("PNG", "GIF")), (TRUTH.convert("RGBA"), ("PNG",))])
    for _ in range(60):
        path.write_bytes(damaged(rng.choice(photographs), rng))
        with np.errstate(all="ignore"):
            outcome = result(lambda: read_image(path))
            assert outcome is None or (outcome.mode == "RGB" and min(outcome.size) > 0)
        path.write_bytes(damaged(rng.choice(labels), rng))
        label = result(lambda: read_label(path))
        assert label is None or (label.dtype == np.uint8 and label.ndim == 2)
        mask = result(lambda: read_mask(path, SIZE))
        assert mask is None or (mask.shape == SIZE[::-1] and 0 < mask.mean() < 1)


def result(read):
    """What it gives, None if it is refused in one line."""
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error)
        return None


def odd_mask(rng):
    """The same object in some form, and whether the form itself is at fault."""
    inside, outside = rng.sample([0, 1, 2, 3, 7, 60, 127, 128, 200, 254, 255], 2)
    if rng.random() < 0.7:
        inside, outside = max(inside, outside), min(inside, outside)
    grey = Image.fromarray(np.where(MASK, inside, outside).astype(np.uint8))
    form = rng.choice(["L", "RGB", "RGBA", "LA", "I;16", "F", "P", "1", "CMYK", "jpeg", "alpha", "voc"])
    if form == "P":
        colours = [rng.randbytes(3) for _ in range(2)]
        image = Image.fromarray(MASK.astype(np.uint8), mode="P")
        image.putpalette(b"".join(colours))
        return image, "PNG"
    if form == "I;16":
        return Image.fromarray(np.asarray(grey).astype(np.uint16) * rng.choice([1, 16, 257])), "PNG"
    if form == "F":
        return Image.fromarray(np.asarray(grey).astype(np.float32) * rng.choice([1, 1 / 255])), "TIFF"
    if form == "jpeg":
        return grey.convert(rng.choice(["L", "RGB"])), "JPEG"
    if form == "alpha":
        image = Image.new("RGBA", SIZE, (*rng.randbytes(3), 255))
        image.putalpha(grey)
        return image, "PNG"
    if form == "voc":
        return Image.fromarray(voc_colours()[np.where(MASK, rng.randint(1, 20), 0)]), "PNG"
    if form == "1":
        return Image.fromarray(MASK), "PNG"
    return grey.convert(form), "TIFF" if form == "CMYK" else "PNG"


@pytest.mark.parametrize("seed", range(4))
def test_a_mask_in_any_form_is_the_object_or_its_complement_by_brightness_or_is_refused(tmp_path, seed):
    """Two values: the brighter is the object, so a darker object gives the complement, as it would look to anyone."""
    rng, path, read = random.Random(seed), tmp_path / "mask", 0
    for _ in range(100):
        image, kind = odd_mask(rng)
        image.save(path, kind, **({"quality": 95} if kind == "JPEG" else {}))
        bright = brightness(image)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            mask = result(lambda: read_mask(path, SIZE))
        if mask is None:
            continue
        read += 1
        expected = MASK if bright[MASK].mean() > bright[~MASK].mean() else ~MASK
        assert (mask != expected).mean() < (0.02 if kind == "JPEG" else 1e-9), (image.mode, kind)
    assert read > 70


def brightness(image):
    """As it looks; of alpha what it lets through."""
    if image.mode in ("F", "I;16"):
        return np.asarray(image).astype(float)
    shown = image.convert("RGBA")
    alpha, colour = np.asarray(shown.getchannel("A")), np.asarray(shown.convert("RGB")).astype(float).sum(-1)
    return alpha.astype(float) if np.ptp(alpha) else colour


@pytest.mark.parametrize("seed", range(4))
def test_damaged_lists_are_read_or_refused_with_a_line_number(seed):
    rng = random.Random(seed)
    good = [
        b"a_1\na_2\nb_1\n",
        b"JPEGImages/a.jpg SegmentationClassAug/a.png\n",
        b"a 1\nb -1\n",
        "ä\nö\n".encode("utf-16"),
    ]
    for _ in range(300):
        data = damaged(rng.choice(good), rng)
        for parse in (parse_ids, parse_classes):
            names = result(lambda parse=parse, data=data: parse("list", data))
            assert names is None or (names and len(set(names)) == len(names) and all(n.strip() for n in names))


def test_damaged_checkpoints_are_refused(tmp_path):
    import torch

    checkpoint.save(tmp_path, "x", {"w": torch.arange(100.0)}, {"config": {"a": 1}})
    rng, whole = random.Random(0), {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for _ in range(200):
        name = rng.choice(sorted(whole))
        broken = damaged(whole[name], rng)
        (tmp_path / name).write_bytes(broken)
        read = result(lambda: checkpoint.read(tmp_path, "x"))
        if read is not None:  # a JSON record has no checksum: what it says of the tensors still has to be right
            assert torch.equal(read[0]["w"], torch.arange(100.0))
            assert name == "x.json" and json.loads(broken)["sha256"] == json.loads(whole["x.json"])["sha256"]
        (tmp_path / name).write_bytes(whole[name])
