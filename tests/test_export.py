"""A checkpoint in half the bytes."""

import json

import pytest
import torch

from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.errors import UserError
from fsdino.segmenter import Segmenter
from tests.conftest import run

SHAPE = SegmenterShape(early_channels=6, late_channels=10, grid=6, embedding_channels=32)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    Segmenter(SegmenterConfig(variant="compact"), SHAPE).save(tmp_path / "whole", fold=3)
    return tmp_path / "whole"


def test_an_exported_checkpoint_is_half_as_large_and_loads_as_float32(checkpoint, tmp_path):
    done = run("export", "--checkpoint", checkpoint, "--to", tmp_path / "half")
    before, after = Segmenter.load(checkpoint)[0], Segmenter.load(tmp_path / "half")[0]
    rounded = {key: value.half().float() for key, value in before.state_dict().items()}
    for key, value in after.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, rounded[key])
    changed = max(float((v - rounded[k]).norm() / v.norm().clamp_min(1e-12)) for k, v in before.state_dict().items())
    assert done["changed"] == pytest.approx(changed) and 0 < changed < 1e-3
    sizes = [(folder / "segmenter.safetensors").stat().st_size for folder in (checkpoint, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0] and json.loads((tmp_path / "half" / "segmenter.json").read_text())["fold"] == 3


def test_weights_beyond_halves_and_the_same_folder_are_refused(checkpoint, tmp_path):
    large, _ = Segmenter.load(checkpoint)
    with torch.no_grad():
        next(large.decoder.parameters()).fill_(1e6)
    large.save(tmp_path / "large")
    with pytest.raises(UserError, match="float16's range"):
        run("export", "--checkpoint", tmp_path / "large", "--to", tmp_path / "half")
    assert not (tmp_path / "half").exists()
    with pytest.raises(UserError, match="another folder"):
        run("export", "--checkpoint", checkpoint, "--to", checkpoint)
