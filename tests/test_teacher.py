import numpy as np
import pytest
import torch
from segment_anything import sam_model_registry

from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.encoder import to_input
from fsdino.errors import UserError
from fsdino.segmenter import Segmenter
from fsdino.specs import teacher_spec
from fsdino.state import sam_decoder_state
from fsdino.teacher import build_teacher


@pytest.mark.slow
@torch.no_grad()
def test_sam_from_pixels_is_segment_anythings_own_embedding(tmp_path):
    """ViT-B at 1024 px, official key names, against a network of segment-anything that we only load."""
    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]().eval()
    for parameter in sam.image_encoder.parameters():  # relative positions start at zero
        parameter += 0.02 * torch.randn_like(parameter)
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    teacher = build_teacher("sam_vit_b", str(tmp_path / "sam.pth"))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1024, 1024, 3), dtype=np.uint8)
    seen = sam.preprocess(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())
    ours = to_input(pixels, teacher.mean, teacher.std)
    torch.testing.assert_close(ours, seen, atol=1e-6, rtol=0)  # mean and std on the scale of 1 instead of 255
    assert torch.equal(teacher(seen), sam.image_encoder(seen))
    assert teacher(seen).shape == (1, 256, 64, 64) and teacher_spec("sam_vit_b").input_px(518) == 1024
    expected = sam.image_encoder(seen)
    assert (teacher(ours) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_teacher_keeps_its_own_side_whatever_the_student_sees():
    teacher, spec = build_teacher("tiny_sam"), teacher_spec("tiny_sam")
    assert teacher(torch.randn(2, 3, 128, 128)).shape == (2, spec.layer.channels, spec.grid(70), spec.grid(70))
    assert spec.input_px(70) == 128 and teacher_spec("sam_vit_h").grid(518) == 64


def test_sams_normalisation_is_imagenets_on_the_scale_of_bytes():
    teacher = build_teacher("tiny_sam")
    assert [round(255 * m, 3) for m in teacher.mean] == [123.675, 116.28, 103.53]
    assert [round(255 * s, 3) for s in teacher.std] == [58.395, 57.12, 57.375]


@torch.no_grad()
@pytest.mark.parametrize("res", [96, 400, 80])
def test_the_offline_teacher_has_normalised_positions_on_the_grid_it_states(res):
    teacher, spec = build_teacher("tf_efficientnet_lite2"), teacher_spec("tf_efficientnet_lite2")
    out = teacher(torch.randn(1, 3, res, res))
    assert out.shape == (1, 352, spec.grid(res), spec.grid(res))
    torch.testing.assert_close(out.mean(1), torch.zeros_like(out[:, 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(1, unbiased=False), torch.ones_like(out[:, 0]), atol=1e-3, rtol=0)


def test_an_unknown_teacher_is_a_users_mistake():
    with pytest.raises(UserError, match="--teacher clip: no such teacher"):
        build_teacher("clip")


@pytest.mark.slow
def test_sams_checkpoint_fills_every_part_of_the_decoder(tmp_path):
    """At full size, under random weights and the official names."""
    sam = sam_model_registry["vit_b"]()
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    state = sam_decoder_state("sam_vit_b", str(tmp_path / "sam.pth"))
    segmenter = Segmenter(
        SegmenterConfig(variant="compact", sam_decoder="sam_vit_b"), SegmenterShape(768, 768, grid=37)
    )
    missing, unknown = segmenter.load_state_dict(state, strict=False)
    assert not unknown
    assert {key.split(".")[0] for key in missing} == {"adapter", "prompt", "similarity_scale"}
    assert torch.equal(segmenter.decoder.mask_tokens.weight, sam.mask_decoder.mask_tokens.weight)
    assert torch.equal(segmenter.positional_encoding(64), sam.prompt_encoder.get_dense_pe())


def test_an_unknown_decoder_checkpoint_is_a_users_mistake():
    with pytest.raises(UserError, match="--sam-decoder vit_h: no such checkpoint; known are sam_vit_h"):
        sam_decoder_state("vit_h")
