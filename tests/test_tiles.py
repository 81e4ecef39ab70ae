"""Tiles of large photographs: invariants of the blend, and the predictor's against crops that are segmented by hand."""

import itertools
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fsdino import Predictor
from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.errors import UserError
from fsdino.segmenter import Segmenter
from fsdino.tiles import blended, boxes
from fsdino.weights import weights_digest
from pipelines.recipes import RECIPES
from tests.conftest import ROOT

RNG = np.random.default_rng(0)
LARGE = Image.fromarray(RNG.integers(0, 256, (90, 160, 3), dtype=np.uint8))
PHOTO = Image.fromarray(RNG.integers(0, 256, (48, 90, 3), dtype=np.uint8))
MASK = np.zeros((48, 90), np.uint8)
MASK[10:40, 20:50] = 255


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    segmenter = Segmenter(SegmenterConfig(variant="compact"), SegmenterShape(48, 48, 5, 32))
    origin = {"backbone": asdict(RECIPES["tiny"]().backbone), "late": {"weights": weights_digest("tiny_vit")}}
    segmenter.save(folder, **origin)
    return folder


@pytest.mark.parametrize("height, width, side, overlap", [(90, 160, 64, 0.25), (64, 64, 64, 0.5), (33, 500, 100, 0.0)])
def test_tiles_cover_the_photograph_and_share_what_they_should(height, width, side, overlap):
    found = boxes(height, width, side, overlap)
    covered = np.zeros((height, width), int)
    for box in found:
        assert 0 <= box.top <= height - box.height and 0 <= box.left <= width - box.width
        covered[box.top : box.top + box.height, box.left : box.left + box.width] += 1
    assert covered.min() == 1
    lefts = sorted({box.left for box in found})
    shared = [a + found[0].width - b for a, b in itertools.pairwise(lefts)]
    assert all(pixels >= overlap * found[0].width - 1 for pixels in shared)


def test_tiles_that_cannot_be_are_refused():
    for side, overlap in ((16, 0.25), (64, 0.95), (64, -0.1)):
        with pytest.raises(UserError, match="expected at least 32 px"):
            boxes(90, 160, side, overlap)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_tiles_of_one_map_blend_into_that_map_without_a_seam(overlap):
    field = torch.from_numpy(RNG.normal(size=(2, 90, 160)).astype(np.float32))
    found = boxes(90, 160, 64, overlap)
    tiles = [(b, field[:, b.top : b.top + b.height, b.left : b.left + b.width]) for b in found]
    result = blended(torch.zeros(2, 20, 20), 90, 160, tiles, overlap)
    torch.testing.assert_close(result.float(), field / 2, atol=2e-3, rtol=0)


def test_the_whole_is_enlarged_as_a_photograph_without_tiles_is():
    whole = torch.from_numpy(RNG.normal(size=(2, 20, 20)).astype(np.float32))
    tiles = [(box, torch.zeros(2, 20, 20)) for box in boxes(90, 160, 64, 0.25)]
    expected = F.interpolate(whole[None], size=(90, 160), mode="bilinear", align_corners=False)[0] / 2
    torch.testing.assert_close(blended(whole, 90, 160, tiles, 0.25).float(), expected, atol=2e-3, rtol=0)


def test_a_photograph_in_tiles_is_the_mean_of_the_whole_and_its_crops(checkpoint):
    predictor = Predictor.load(checkpoint)
    classes = [predictor.register([PHOTO], [mask], name) for mask, name in ((MASK, "cat"), (255 - MASK, "rest"))]

    def logits(image, **tiles):
        predictor.set_image(image, **tiles)
        return next(predictor.logits(classes))[0].float()

    whole, crops = logits(LARGE), [logits(LARGE.crop((x, 0, x + 80, 80))) for x in (0, 80)]
    found = logits(LARGE.crop((0, 0, 160, 80)), tile_px=80, overlap=0.0)
    expected = (logits(LARGE.crop((0, 0, 160, 80))) + torch.cat(crops, 2)) / 2
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    assert torch.equal(logits(LARGE, tile_px=160), whole), "a photograph no larger than a tile has none"
    masks, scores = predictor.segment(classes)
    assert masks.shape == (2, 90, 160) and scores.shape == (2,)


LARGEST = """
import resource, sys
import numpy as np
from PIL import Image
from pipelines import predict
from pipelines.cli import call
folder, checkpoint = sys.argv[1:]
Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((16000, 12000)).save(
    f"{folder}/large.jpg"
)
call(predict.Settings, predict.job, ["--checkpoint", checkpoint, "--support", f"{folder}/photo.png", "--mask",
    f"{folder}/mask.png", "--query", f"{folder}/large.jpg", "--tile", "1024", "--out", f"{folder}/out",
    "--format", "mask", "overlay", "probability", "labels"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@pytest.mark.slow
def test_192_megapixels_are_segmented_in_less_than_four_gigabytes(checkpoint, tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    line = [sys.executable, "-c", LARGEST, str(tmp_path), str(checkpoint)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.splitlines()[-1]) < 4.0
    Image.MAX_IMAGE_PIXELS = 10**9
    with Image.open(tmp_path / "out" / "large.png") as mask:
        assert mask.size == (16000, 12000)
