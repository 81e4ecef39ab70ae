"""Masks and labels in the forms in which people have them; every picture is drawn here."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from fsdino.data.masks import read_label, read_mask, voc_colours
from fsdino.errors import DataWarning, UserError

SIZE = (200, 150)
DISC = Image.new("L", SIZE, 0)
ImageDraw.Draw(DISC).ellipse((60, 30, 130, 110), fill=255)
TRUTH = np.array(DISC) > 0


def palette_image(indices, colours):
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def with_alpha(colour, alpha):
    image = colour.convert("RGB").convert("RGBA")
    image.putalpha(alpha)
    return image


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8))
SAME = {
    "0 and 255": DISC,
    "0 and 1": Image.fromarray(TRUTH.astype(np.uint8)),
    "0 and 1 in 16 bits": Image.fromarray(TRUTH.astype(np.uint16)),
    "0 and 65535": Image.fromarray(TRUTH.astype(np.uint16) * 65535),
    "one bit": DISC.convert("1"),
    "white in colour": DISC.convert("RGB"),
    "red on black": Image.merge("RGB", (DISC, Image.new("L", SIZE), Image.new("L", SIZE))),
    "yellow on purple": Image.composite(Image.new("RGB", SIZE, "yellow"), Image.new("RGB", SIZE, "purple"), DISC),
    "20 and 230": DISC.point(lambda v: 230 if v else 20),
    "floats": Image.fromarray(TRUTH.astype(np.float32)),
    "alpha of white": with_alpha(Image.new("L", SIZE, 255), DISC),
    "alpha of black": with_alpha(Image.new("L", SIZE, 0), DISC),
    "alpha of grey with alpha": Image.merge("LA", (Image.new("L", SIZE, 255), DISC)),
    "colour and alpha agree": with_alpha(DISC, DISC),
    "colour behind one alpha": with_alpha(DISC, Image.new("L", SIZE, 255)),
    "palette of black and white": palette_image(TRUTH, [(0, 0, 0), (255, 255, 255)]),
    "palette whose index 0 is white": palette_image(~TRUTH, [(255, 255, 255), (0, 0, 0)]),
    "palette of greys": palette_image(TRUTH * 255, [(v, v, v) for v in range(256)]),
    "one class in VOC's palette": palette_image(TRUTH * 8, voc_colours().tolist()),
}


@pytest.mark.parametrize("name", SAME)
def test_the_object_is_the_same_in_every_form(tmp_path, name):
    kind = "mask.tif" if name == "floats" else "mask.png"
    SAME[name].save(tmp_path / kind)
    mask = read_mask(tmp_path / kind, SIZE)
    assert mask.dtype == np.uint8 and np.array_equal(mask, TRUTH)


SOFT = {
    "saved as JPEG": (DISC, "mask.jpg", {"quality": 75}),
    "with grey edges": (DISC.filter(ImageFilter.GaussianBlur(2)), "mask.png", {}),
    "with grey edges in colour": (DISC.filter(ImageFilter.GaussianBlur(2)).convert("RGB"), "mask.png", {}),
    "in colour saved as JPEG": (SAME["yellow on purple"], "mask.jpg", {"quality": 75}),
}


@pytest.mark.parametrize("name", SOFT)
def test_soft_edges_are_cut_at_half_of_the_range_with_a_note(tmp_path, name):
    image, file, how = SOFT[name]
    image.save(tmp_path / file, **how)
    with pytest.warns(DataWarning, match="those that reach half of the range are the object"):
        mask = read_mask(tmp_path / file, SIZE)
    assert (mask != TRUTH).mean() < 0.005


def class_map():
    numbers = np.where(TRUTH, 8, 0).astype(np.uint8)
    numbers[120:145, 140:195] = 15
    numbers[:3] = 255
    return numbers


@pytest.mark.parametrize("kind", ["palette", "grey", "VOC's colours"])
def test_a_label_of_several_classes_needs_the_number_of_one(tmp_path, kind):
    numbers, path = class_map(), tmp_path / "mask.png"
    images = {
        "palette": palette_image(numbers, [(i * 37 % 256, i * 91 % 256, i * 153 % 256) for i in range(256)]),
        "grey": Image.fromarray(numbers),
        "VOC's colours": Image.fromarray(voc_colours()[numbers]),
    }
    images[kind].save(path)
    with pytest.raises(UserError, match="got values 8, 15, 255; choose one with --mask-value"):
        read_mask(path, SIZE)
    mask = read_mask(path, SIZE, 8)
    assert np.array_equal(mask == 1, TRUTH & (numbers == 8)) and np.array_equal(mask == 255, numbers == 255)
    with pytest.raises(UserError, match="expected pixels of --mask-value 9, got values 0, 8, 15, 255"):
        read_mask(path, SIZE, 9)


def refused(tmp_path, image, match, size=SIZE):
    image.save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=match):
        read_mask(tmp_path / "mask.png", size)


def test_what_shows_no_object_or_nothing_else_is_refused(tmp_path):
    refused(tmp_path, Image.new("L", SIZE), "at least one foreground pixel, got none")
    refused(tmp_path, Image.new("L", SIZE, 255), "covers the whole image")
    refused(tmp_path, Image.new("RGBA", SIZE, (255, 255, 255, 255)), "covers the whole image")


def test_what_can_be_read_in_two_ways_is_refused(tmp_path):
    other = Image.new("L", SIZE, 0)
    ImageDraw.Draw(other).rectangle((5, 5, 50, 50), fill=255)
    refused(tmp_path, with_alpha(other, DISC), "its colours and its transparency show different objects")
    refused(tmp_path, with_alpha(PHOTO, DISC), "its colours and its transparency show different objects")


def test_a_turned_mask_is_said_to_be_turned(tmp_path):
    refused(tmp_path, DISC, r"size 150x200, got 200x150 \(turned by a quarter\)", SIZE[::-1])


def test_an_inverted_mask_is_pointed_out(tmp_path):
    small = np.ones((100, 100), np.uint8)
    small[40:50, 40:50] = 0
    Image.fromarray(small).save(tmp_path / "mask.png")
    with pytest.warns(DataWarning, match="covers 99% of the image; if the object is what is left, invert it"):
        read_mask(tmp_path / "mask.png", (100, 100))


NUMBERS = np.zeros((40, 60), np.uint8)
NUMBERS[5:20, 5:30], NUMBERS[20:35, 30:55], NUMBERS[18:20, 30:55] = 1, 12, 255


def test_vocs_colours_are_those_of_its_development_kit():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0), 15: (192, 128, 128)}
    known |= {12: (64, 0, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {number: tuple(voc_colours()[number].tolist()) for number in known} == known


def test_a_label_gives_the_same_numbers_in_every_form(tmp_path):
    forms = {
        "palette": palette_image(NUMBERS, [(0, 0, 0)] + [(9, 9, i) for i in range(1, 256)]),
        "grey": Image.fromarray(NUMBERS),
        "sixteen bits": Image.fromarray(NUMBERS.astype(np.uint16)),
        "three equal channels": Image.fromarray(NUMBERS).convert("RGB"),
        "VOC's colours": Image.fromarray(voc_colours()[NUMBERS]),
        "VOC's colours, opaque": Image.fromarray(voc_colours()[NUMBERS]).convert("RGBA"),
    }
    for name, image in forms.items():
        image.save(tmp_path / "label.png")
        assert np.array_equal(read_label(tmp_path / "label.png"), NUMBERS), name


def test_a_label_of_other_colours_is_refused_with_advice_that_is_right(tmp_path):
    colours = voc_colours()[NUMBERS]
    colours[0, 0] = (255, 0, 0)
    Image.fromarray(colours).save(tmp_path / "label.png")
    with pytest.raises(UserError, match=r"got the colour \(255, 0, 0\); replace each colour by its class number"):
        read_label(tmp_path / "label.png")


def test_labels_that_hold_no_class_numbers_are_refused(tmp_path):
    with_alpha(Image.fromarray(NUMBERS), Image.fromarray(NUMBERS)).save(tmp_path / "label.png")
    with pytest.raises(UserError, match="got transparency"):
        read_label(tmp_path / "label.png")
    Image.fromarray(NUMBERS.astype(np.uint16) * 100).save(tmp_path / "label.png")
    with pytest.raises(UserError, match="expected class numbers 0 to 255, got 25500"):
        read_label(tmp_path / "label.png")
    Image.fromarray(NUMBERS.astype(np.float32)).save(tmp_path / "label.tif")
    with pytest.raises(UserError, match="got floats"):
        read_label(tmp_path / "label.tif")


def test_objects_of_several_colours_are_never_taken_for_one(tmp_path):
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[5:20, 5:20], pixels[30:50, 30:50] = (255, 0, 0), (0, 255, 0)
    refused(tmp_path, Image.fromarray(pixels), "one object, got 3 colours; save it with one channel", (80, 60))


def test_mask_value_is_a_palettes_index_whatever_its_colours(tmp_path):
    numbers = np.zeros((60, 80), np.uint8)
    numbers[5:20, 5:20], numbers[30:50, 30:50], numbers[0] = 2, 6, 255
    Image.fromarray(numbers).convert("P").save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="got values 2, 6, 255"):
        read_mask(tmp_path / "mask.png", (80, 60))
    mask = read_mask(tmp_path / "mask.png", (80, 60), 6)
    assert np.array_equal(mask == 1, numbers == 6) and np.array_equal(mask == 255, numbers == 255)


def test_labels_that_can_be_read_in_two_ways_are_refused(tmp_path):
    palette_image(NUMBERS == 12, [(0, 0, 0), (64, 0, 128)]).save(tmp_path / "label.png")
    with pytest.raises(UserError, match="its palette shows other numbers than it holds"):
        read_label(tmp_path / "label.png")
    same = palette_image(NUMBERS, voc_colours().tolist())
    same.save(tmp_path / "label.png")
    assert np.array_equal(read_label(tmp_path / "label.png"), NUMBERS)
    three = Image.fromarray(np.where(NUMBERS == 1, 64, 0).astype(np.uint8)).convert("RGB")
    three.save(tmp_path / "label.png")
    assert set(np.unique(read_label(tmp_path / "label.png"))) == {0, 64}  # equal channels are numbers


def test_a_palette_is_judged_by_the_colours_that_are_used(tmp_path):
    palette_image(~TRUTH, [(255, 255, 255), (0, 0, 0), (255, 0, 0)]).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png", SIZE), TRUTH)


def test_grey_of_few_bits_is_read_as_it_was_written(tmp_path):
    Image.fromarray(NUMBERS % 2).save(tmp_path / "label.png", bits=4)
    with Image.open(tmp_path / "label.png") as four:
        assert np.asarray(four).max() in (1, 17)
    assert np.array_equal(read_label(tmp_path / "label.png"), NUMBERS % 2)
    Image.fromarray(NUMBERS > 0).save(tmp_path / "label.png")
    assert np.array_equal(read_label(tmp_path / "label.png"), NUMBERS > 0)


def test_thin_classes_and_jpegs_of_classes_are_never_a_soft_edge(tmp_path):
    thin = np.zeros((40, 60), np.uint8)
    thin[5:35, 18:20] = thin[5:35, 22:24] = 255
    thin[5:35, 20:22] = 2
    refused(tmp_path, Image.fromarray(thin), "got values 2, 255; choose one", (60, 40))
    three = np.zeros(SIZE[::-1], np.uint8)
    three[20:70, 20:90], three[80:140, 100:180] = 127, 255
    for quality in (50, 75, 95):
        Image.fromarray(three).save(tmp_path / "mask.jpg", quality=quality)
        with pytest.raises(UserError, match="expected a mask of one object"):
            read_mask(tmp_path / "mask.jpg", SIZE)
    noisy = Image.fromarray(three).resize((800, 600))
    noisy.save(tmp_path / "mask.jpg", quality=30)
    with pytest.raises(UserError, match="as a JPEG or soft edges have"):
        read_mask(tmp_path / "mask.jpg", (800, 600), 127)


def test_a_class_that_covers_all_but_void_is_refused(tmp_path):
    half = np.full((40, 60), 8, np.uint8)
    half[:20] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="covers the whole image"):
        read_mask(tmp_path / "mask.png", (60, 40), 8)


def test_odd_palettes_and_transparent_greys_are_refused_or_right(tmp_path):
    grey = DISC.point(lambda v: 255 - v)
    grey.save(tmp_path / "mask.png", transparency=255)
    with pytest.raises(UserError, match="its colours and its transparency show different objects"):
        read_mask(tmp_path / "mask.png", SIZE)
    DISC.save(tmp_path / "mask.png", exif=b"Exif\0\0garbage")
    with pytest.raises(UserError, match="expected a readable image"):
        read_mask(tmp_path / "mask.png", SIZE)
