"""The `paper` recipe at full size on a CPU: DINOv2 ViT-B/14 at 518 px, SAM ViT-H at 1024 px, the segmenter at grid 37.

Random weights under the publishers' file names, and a handful of images; what a GPU would run for hours, in minutes.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import sam_model_registry

from feature_store import FeatureStore
from fsdino.segmenter import Segmenter
from fsdino.weights import PUBLISHED
from tests import reference_dinov2
from tests.conftest import run

TRAIN, TEST = 8, 3
SMALLER = (
    "--no-gpu --actor-gpus 0 --actor-cpus 1 --decode-cpus 0.5 --forward-batch 1 --worker-cpus 1.5 --num-views 2 "
    "--distill-epochs 1 --distill-batch 2 --steps 3 --batch 2 --episodes 3 --folds 0 --methods prototype matching peak"
).split()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Official files with random weights, where downloads are kept."""
    cache = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    torch.save(reference_dinov2.random_state("b"), cache / PUBLISHED["dinov2_vitb14"].url.rsplit("/", 1)[1])
    torch.save(sam_model_registry["vit_h"]().state_dict(), cache / PUBLISHED["sam_vit_h"].url.rsplit("/", 1)[1])
    return cache


@pytest.fixture
def few_images(tmp_path):
    """Squares of four classes: a fold tests one of them."""
    rng, root = np.random.default_rng(0), tmp_path / "squares"
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("one\ntwo\nthree\nfour\n")
    for number in range(TRAIN + TEST):
        label = np.zeros((150, 200), np.uint8)
        label[20:80, 20:80] = 1 if number >= TRAIN else 2 + number % 3
        pixels = np.where(label[..., None] > 0, 40 * label[..., None], rng.integers(0, 256, (150, 200, 3)))
        Image.fromarray(pixels.astype(np.uint8)).save(root / "JPEGImages" / f"{number}.jpg")
        Image.fromarray(label).save(root / "SegmentationClassAug" / f"{number}.png")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "train_aug.txt").write_text("".join(f"{n}\n" for n in range(TRAIN)))
    (lists / "val.txt").write_text("".join(f"{n}\n" for n in range(TRAIN, TRAIN + TEST)))
    return root


@pytest.mark.slow
@pytest.mark.timeout(3600)  # SAM-H takes about a minute an image on one core
def test_the_papers_recipe_runs_from_photographs_to_scores_at_full_size(published, few_images, tmp_path, monkeypatch):
    monkeypatch.setenv("FSDINO_CACHE", str(published))
    monkeypatch.setenv("FSDINO_OFFLINE", "1")
    places = ["--data", few_images, "--store", tmp_path / "stores", "--out", tmp_path / "runs"]
    result = run("reproduce", *places, "--tracking-uri", f"sqlite:///{tmp_path}/m.db", *SMALLER)
    assert set(result["scores"]["1-shot"]) == {"prototype", "matching", "peak", "compact", "4d"}
    stores = tmp_path / "stores" / "squares"
    shapes = {
        "dinov2_vitb14/early@518": (37, 37, 768),
        "dinov2_vitb14/late@518": (37, 37, 768),
        "dinov2_vitb14/early@126": (9, 9, 768),
        "dinov2_vitb14/early@252": (18, 18, 768),
        "sam_vit_h/teacher@1024": (64, 64, 256),
    }
    assert {name: FeatureStore(str(stores / name)).shape for name in shapes} == shapes
    (final,) = (tmp_path / "runs" / "squares" / "dinov2_vitb14@518").glob("fold0-4d-*/final")
    segmenter, record = Segmenter.load(final)
    trained = record["training"]["trained_parameters"]
    sam_only = 552_804 - 3 * 256  # frozen heads that no loss reaches; their three tokens still learn
    assert trained == 5_509_552 - 1_249_408 + 3_923_966 - sam_only
    assert np.isfinite(record["training"]["loss"]) and record["config"]["support_weights"] == "mask"
    sam = torch.load(published / "sam_vit_h_4b8939.pth", mmap=True)
    moved = (segmenter.decoder.mask_tokens.weight - sam["mask_decoder.mask_tokens.weight"]).abs().max()
    assert 0 < moved < 0.01  # the decoder started from SAM's
