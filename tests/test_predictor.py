"""The predictor against the encoder and segmenter called by hand."""

import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fsdino import ClassEncoding, Predictor
from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.encoder import build_encoder, to_input
from fsdino.errors import UserError
from fsdino.preprocess import resize_square
from fsdino.segmenter import Segmenter
from fsdino.weights import weights_digest
from pipelines.recipes import RECIPES
from tests.conftest import ROOT

RES = 70
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 90, 3), dtype=np.uint8))
OTHER = Image.fromarray(np.random.default_rng(1).integers(0, 256, (33, 57, 3), dtype=np.uint8))
MASK = np.zeros((48, 90), np.uint8)
MASK[10:40, 20:50] = 255


@pytest.fixture(scope="module", params=["compact", "4d"])
def checkpoint(request, tmp_path_factory):
    """As train_episodic writes it, with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    segmenter = Segmenter(SegmenterConfig(variant=request.param), SegmenterShape(48, 48, 5, 32))
    origin = {"backbone": asdict(RECIPES["tiny"]().backbone), "late": {"weights": weights_digest("tiny_vit")}}
    segmenter.save(folder, **origin)
    return folder


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor.load(checkpoint)


@torch.inference_mode()
def by_hand(checkpoint, supports, masks, query):
    segmenter, encoder = Segmenter.load(checkpoint)[0], build_encoder("tiny_vit")

    def features(image):
        return encoder(to_input(resize_square(image, RES)[None], encoder.mean, encoder.std))

    late = torch.cat([features(image).late for image in supports])[None]
    masks = torch.stack([F.adaptive_avg_pool2d(torch.from_numpy(m > 0).float()[None], 5)[0] for m in masks])[None]
    found = features(query)
    logits = segmenter.segment(found.late, segmenter.embed(found.early), segmenter.encode_support(late, masks))
    return F.interpolate(logits.mask_logits, size=query.size[::-1], mode="bilinear")[0, 0]


def test_masks_and_scores_are_those_of_the_segmenter_at_the_images_own_size(checkpoint, predictor):
    cat = predictor.register([PHOTO], [MASK], "cat")
    dog = predictor.register([PHOTO, PHOTO], [MASK, MASK.max() - MASK], "dog")
    predictor.set_image(OTHER)
    masks, scores = predictor.segment([cat, dog])
    assert masks.shape == (2, 33, 57) and (cat.shots, dog.shots) == (1, 2)
    for i, of_class in enumerate(([MASK], [MASK, 255 - MASK])):
        logits = by_hand(checkpoint, [PHOTO] * len(of_class), of_class, OTHER)
        assert np.array_equal(masks[i], (logits > 0).numpy())
        inside = logits.sigmoid()[logits > 0]
        assert scores[i] == pytest.approx(float(inside.mean()) if len(inside) else 0, abs=1e-5)


def test_a_batch_of_images_is_segmented_as_each_of_them_alone(predictor):
    cat = predictor.register([PHOTO], [MASK])
    predictor.set_images([PHOTO, OTHER])
    together = predictor.segment_batch([cat])
    for image, segmentation in zip((PHOTO, OTHER), together, strict=True):
        predictor.set_image(image)
        alone = predictor.segment([cat])
        assert segmentation.masks.shape == (1, *image.size[::-1])
        assert (segmentation.masks != alone.masks).mean() < 0.01  # a batch sums in another order
        np.testing.assert_allclose(segmentation.scores, alone.scores, atol=1e-3)


def test_a_class_is_kept_in_one_file(predictor, tmp_path):
    cat = predictor.register([PHOTO], [MASK], "cat")
    cat.save(tmp_path / "cats" / "cat.safetensors")
    kept = ClassEncoding.load(tmp_path / "cats" / "cat.safetensors")
    assert (kept.name, kept.shots, kept.segmenter) == ("cat", 1, predictor.digest)
    predictor.set_image(OTHER)
    one, other = next(predictor.logits([cat]))[0], next(predictor.logits([kept]))[0]
    assert torch.equal(one, other)


def test_photographs_and_masks_may_be_files(predictor, tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    files = predictor.register([tmp_path / "photo.png"], [str(tmp_path / "mask.png")])
    assert torch.equal(files.support.prototype, predictor.register([PHOTO], [MASK]).support.prototype)
    predictor.set_image(str(tmp_path / "photo.png"))
    assert predictor.segment([files]).masks.shape == (1, 48, 90)


def test_void_in_a_mask_is_no_background(predictor):
    void = MASK.copy()
    void[MASK == 255] = 1
    void[:, 72:] = 255
    late = predictor._features([PHOTO])[0][None]
    shares = [F.adaptive_avg_pool2d(torch.from_numpy(void == v).float()[None], 5)[None] for v in (1, 255)]
    with torch.inference_mode():
        expected = predictor.segmenter.encode_support(late, *shares)
    for one, other in zip(predictor.register([PHOTO], [void]).support, expected, strict=True):
        assert one is other is None or torch.allclose(one, other, atol=1e-5)
    for wrong, said in ((np.full_like(MASK, 7), "100% object"), (np.arange(90) % 9 * np.ones_like(MASK), "one value")):
        with pytest.raises(UserError, match=said):
            predictor.register([PHOTO], [wrong])


def test_mistakes_are_told_in_one_line(predictor, tmp_path):
    cat = predictor.register([PHOTO], [MASK], "cat")
    other = ClassEncoding("cat", 1, cat.support, "another")
    predictor.set_image(PHOTO)
    (tmp_path / "no.safetensors").write_bytes(b"x")
    for call, said in (
        (
            lambda: predictor.register([PHOTO], []),
            "expected photographs and one mask for each, got 1 photographs and 0",
        ),
        (lambda: predictor.register([PHOTO], [MASK[:9]]), r"expected a mask .* of \(48, 90\).* got \(9, 90\)"),
        (lambda: predictor.register([PHOTO], [0 * MASK]), "an object and its background, got one with 0% object"),
        (lambda: predictor.segment([]), "expected at least one class"),
        (lambda: predictor.segment([other]), "class 'cat' was registered with another segmenter"),
        (lambda: ClassEncoding.load(tmp_path / "none"), "expected a class file, found none"),
        (lambda: ClassEncoding.load(tmp_path / "no.safetensors"), "expected a class file, got another"),
        (lambda: Predictor.load(tmp_path), "expected a checkpoint with segmenter.json, found none"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    predictor.set_images([PHOTO, OTHER])
    with pytest.raises(UserError, match="expected one image from set_image, got 2"):
        predictor.segment([cat])


def test_the_package_loads_torch_only_when_the_predictor_is_asked_for():
    code = "import sys, fsdino; assert 'torch' not in sys.modules; fsdino.Predictor; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_masks_of_the_cpu(checkpoint):
    results = []
    for device in ("cpu", "cuda"):
        predictor = Predictor.load(checkpoint, device)
        cat = predictor.register([PHOTO], [MASK])
        predictor.set_image(OTHER)
        results.append(next(predictor.logits([cat]))[0])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)


def test_photographs_are_ranked_by_leaving_them_out(checkpoint, predictor):
    images = [PHOTO, OTHER, PHOTO.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    masks = [MASK, (np.arange(33 * 57).reshape(33, 57) % 57 < 20).astype(np.uint8), MASK[:, ::-1].copy()]

    def iou(target, supports):
        logits = by_hand(checkpoint, [images[i] for i in supports], [masks[i] for i in supports], images[target])
        found, truth = logits.numpy() > 0, masks[target] > 0
        return (found & truth).sum() / (found | truth).sum()

    ranks = predictor.rank(images, masks)
    for i, (found, helps) in enumerate(ranks):
        others = [j for j in range(3) if j != i]
        assert found == pytest.approx(iou(i, others), abs=2e-3)
        with_it = [iou(j, [k for k in range(3) if k != j]) for j in others]
        without = [iou(j, [k for k in others if k != j]) for j in others]
        assert helps == pytest.approx(np.mean(with_it) - np.mean(without), abs=2e-3)
    assert [rank.helps for rank in predictor.rank(images[:2], masks[:2])] == [None, None]
    with pytest.raises(UserError, match="at least two photographs to compare, got 1"):
        predictor.rank(images[:1], masks[:1])
