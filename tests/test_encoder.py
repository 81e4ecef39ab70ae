from functools import partial

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from segment_anything import sam_model_registry

from fsdino.encoder import (
    DinoV2Encoder,
    _dinov2_to_timm,
    build_encoder,
    encoder_of_checkpoint,
    position_embedding,
    to_input,
)
from fsdino.errors import UserError
from fsdino.preprocess import read_image, resize_square
from fsdino.specs import DINOV2, DINOV3, LITE, SAM, encoder_spec, teacher_spec
from fsdino.teacher import build_teacher
from fsdino.weights import weights_digest
from tests import reference_dinov2


@torch.no_grad()
def test_early_is_block_three_without_and_late_the_last_with_the_final_norm():
    encoder = build_encoder("tiny_vit")
    x = torch.randn(2, 3, 56, 56)
    seen = []
    hook = encoder.vit.blocks[2].register_forward_hook(lambda module, args, output: seen.append(output))
    early, late = encoder(x)
    hook.remove()
    assert torch.equal(early, seen[0][:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    expected = encoder.vit.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(late, expected)
    assert not torch.allclose(early, late, atol=0.1)


def test_positions_are_the_table_itself_at_its_own_grid_and_bicubic_elsewhere():
    table = torch.randn(1, 1 + 16, 6)
    assert torch.equal(position_embedding(table, 4), table)
    resized = position_embedding(table, 7)
    grid = table[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    plain = F.interpolate(grid, scale_factor=(7.1 / 4, 7.1 / 4), mode="bicubic")
    assert resized.shape == (1, 50, 6)
    assert torch.equal(resized[:, 0], table[:, 0])
    torch.testing.assert_close(resized[:, 1:].transpose(1, 2).unflatten(2, (7, 7)), plain)


@pytest.mark.parametrize("name, res", [("tiny_vit", 100), ("tf_efficientnet_lite0", 100)])
def test_a_side_that_the_encoder_cannot_take_is_a_users_mistake(name, res):
    with pytest.raises(UserError, match=f"--res {res}: .* needs a multiple of"):
        encoder_spec(name).grid(res)


def test_an_unknown_encoder_is_a_users_mistake():
    with pytest.raises(UserError, match="--encoder resnet: no such encoder; known are dinov2_vits14"):
        build_encoder("resnet")


def test_weights_are_identified_by_their_files_bytes(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"abc")
    digest = weights_digest("dinov2_vits14", tmp_path / "a.pth")
    assert digest == "ba7816bf8f01cfea"  # SHA-256 of "abc", FIPS 180-2
    assert weights_digest("tiny_vit") != weights_digest("tiny_sam")


@pytest.mark.parametrize("name", [*DINOV2, *DINOV3])
def test_a_vits_description_is_that_of_timms_network(name):
    described = (DINOV2 | DINOV3)[name]
    with torch.device("meta"):
        vit = timm.create_model(described.timm, num_classes=0)
    assert (described.width, described.depth) == (vit.embed_dim, len(vit.blocks))
    assert described.patch_px == vit.patch_embed.patch_size[0] == encoder_spec(name).stride_px


@torch.no_grad()
@pytest.mark.parametrize("name", [*LITE, "tiny_vit"])
def test_an_encoders_description_is_what_it_computes(name):
    spec, side = encoder_spec(name), 112
    early, late = build_encoder(name)(torch.randn(1, 3, side, side))
    grid = spec.grid(side)
    assert early.shape == (1, spec.early.channels, grid, grid) and late.shape == (1, spec.late.channels, grid, grid)


@torch.no_grad()
@pytest.mark.parametrize("name", [*LITE, "tiny_sam"])
def test_a_teachers_description_is_what_it_computes(name):
    spec = teacher_spec(name)
    side = spec.input_px(96)
    assert build_teacher(name)(torch.randn(1, 3, side, side)).shape == (1, spec.layer.channels, *[spec.grid(96)] * 2)


@pytest.mark.parametrize("name", SAM)
def test_sams_description_is_that_of_segment_anything(name):
    with torch.device("meta"):
        encoder = sam_model_registry[SAM[name]]().image_encoder
    spec = teacher_spec(name)
    assert (encoder.img_size, encoder.patch_embed.proj.stride[0]) == (spec.side_px, spec.stride_px)
    assert encoder.neck[-1].weight.shape[0] == spec.layer.channels


@pytest.fixture(scope="module", params=["dinov2_vits14", "dinov2_vits14_reg"])
def official(request, tmp_path_factory):
    """ViT-S at full size with random weights under the published names: encoder and state."""
    state = reference_dinov2.random_state("s", registers=4 if request.param.endswith("_reg") else 0)
    path = tmp_path_factory.mktemp("weights") / "published.pth"
    torch.save(state, path)
    return build_encoder(request.param, str(path)), state


@pytest.mark.parametrize("res", [518, 252, 126])
@torch.no_grad()
def test_features_equal_those_of_an_independent_implementation_bit_for_bit(official, res):
    encoder, state = official
    x = torch.randn(1, 3, res, res, generator=torch.Generator().manual_seed(res))
    blocks, late = reference_dinov2.features(state, x, heads=6)
    out = encoder(x)
    assert encoder_spec(encoder.name).grid(res) == res // 14 == out.early.shape[-1]
    assert (out.early - blocks[2]).abs().max() == 0 and (out.late - late).abs().max() == 0
    assert torch.equal(encoder.early(x), out.early)
    assert (blocks[2] - blocks[11]).abs().mean() > 0.1  # layers 3 and 12 are not alike
    # Spelt-out attention sums in another order.
    blocks, late = reference_dinov2.features(state, x, heads=6, fused=False)
    torch.testing.assert_close(out.early, blocks[2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.late, late, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_norms_of_both_layers_can_be_switched(official, tmp_path):
    encoder, state = official
    torch.save(state, tmp_path / "w.pth")
    other = build_encoder(encoder.name, str(tmp_path / "w.pth"), early_norm=True, late_norm=False)
    x = torch.randn(1, 3, 126, 126)
    blocks, _ = reference_dinov2.features(state, x, heads=6)
    normed = F.layer_norm(blocks[2].movedim(1, -1), (384,), state["norm.weight"], state["norm.bias"], 1e-6)
    torch.testing.assert_close(other(x).early, normed.movedim(-1, 1))
    assert torch.equal(other(x).late, blocks[11])
    both = [encoder_spec(encoder.name, early_norm=n, late_norm=not n) for n in (True, False)]
    assert [(s.early.name, s.early.norm, s.late.name, s.late.norm) for s in both] == [
        ("block2", "final", "block11", "none"),
        ("block2", "none", "block11", "final"),
    ]


@pytest.mark.parametrize("kind", ["plain", "reg"])
@torch.no_grad()
def test_vit_g_has_its_own_feed_forward(kind):
    """Two of its forty blocks at full width, as the whole has 4.5 GB."""
    state = reference_dinov2.random_state("g", registers=4 if kind == "reg" else 0, blocks=2)
    timm_name = DINOV2["dinov2_vitg14" if kind == "plain" else "dinov2_vitg14_reg"].timm
    vit = timm.create_model(timm_name, num_classes=0, depth=2)
    vit.load_state_dict(_dinov2_to_timm(state))
    x = torch.randn(1, 3, 70, 70)
    blocks, late = reference_dinov2.features(state, x, heads=24)
    out = DinoV2Encoder(vit, "g")(x)
    assert torch.equal(out.early, blocks[1]) and torch.equal(out.late, late)


def test_positions_of_a_grid_are_made_once(official):
    encoder, _ = official
    encoder(torch.randn(1, 3, 126, 126))
    made = encoder._position(9)
    assert encoder._position(9) is made


@torch.no_grad()
def test_dinov3_satisfies_the_same_contract(tmp_path):
    vit = timm.create_model("vit_small_patch16_dinov3", num_classes=0, dynamic_img_size=True)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "model.safetensors")
    encoder = build_encoder("dinov3_vits16", str(tmp_path / "model.safetensors"))
    x = torch.randn(2, 3, 96, 96)
    out, vit = encoder(x), vit.eval()
    everything = vit.forward_features(x)[:, vit.num_prefix_tokens :]
    assert encoder_spec(encoder.name).grid(96) == 6 and out.early.shape == out.late.shape == (2, 384, 6, 6)
    torch.testing.assert_close(out.late, everything.transpose(1, 2).unflatten(2, (6, 6)))
    assert torch.equal(encoder.early(x), out.early) and not torch.allclose(out.early, out.late, atol=0.1)


@torch.no_grad()
def test_efficientnet_stages_are_normalised_on_the_stride_16_grid():
    encoder = build_encoder("tf_efficientnet_lite0")
    early, late = encoder(torch.randn(2, 3, 112, 112))
    stages = encoder_spec("tf_efficientnet_lite0").late.groups
    assert early.shape == (2, 40, 7, 7) and late.shape == (2, sum(stages), 7, 7) and stages == (80, 112, 192, 320)
    torch.testing.assert_close(early.norm(dim=1), torch.ones(2, 7, 7))
    for stage in late.split(stages, 1):
        torch.testing.assert_close(stage.norm(dim=1), torch.ones(2, 7, 7))


@pytest.mark.real_data
@torch.no_grad()
def test_photographs_have_the_statistics_that_the_carried_weights_expect(voc_root):
    """Right tensors in the right places: each layer's channel means are those that training left in its batch norm.

    Norms behind an expansion are left out, as their means are near zero.
    """
    encoder = build_encoder("tf_efficientnet_lite0")
    paths = sorted((voc_root / "JPEGImages").glob("*.jpg"))[:16]
    x = torch.cat([to_input(resize_square(read_image(p), 224)[None], encoder.mean, encoder.std) for p in paths])
    correlations = {}

    def seen(name, norm, inputs):
        both = torch.stack([inputs[0].mean((0, 2, 3)), norm.running_mean])
        correlations[name] = torch.corrcoef(both)[0, 1].item()

    for name, module in encoder.net.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d) and name.rsplit(".", 1)[-1] in ("bn2", "bn3"):
            module.register_forward_pre_hook(partial(lambda name, norm, inputs: seen(name, norm, inputs), name))
    encoder(x)
    assert len(correlations) == 31 and min(correlations.values()) > 0.9, correlations


@torch.no_grad()
def test_positions_stay_at_full_precision_under_autocast(official):
    """As in the official code, whose tokens are float32 from the first sum on."""
    encoder, state = official
    x = torch.randn(1, 3, 126, 126)
    with torch.autocast("cpu", torch.bfloat16):
        blocks, late = reference_dinov2.features(state, x, heads=6)
        out = encoder(x)
    assert torch.equal(out.early, blocks[2]) and torch.equal(out.late, late)


def test_a_checkpoint_names_its_encoder_and_refuses_other_weights():
    digest = weights_digest("tiny_vit")
    backbone = {"encoder": "tiny_vit", "encoder_weights": None, "early_norm": False, "late_norm": False}
    record = {"backbone": backbone, "late": {}}
    encoder = encoder_of_checkpoint(record | {"late": {"weights": digest}})
    assert (encoder.early_norm, encoder.late_norm) == (False, False)
    with pytest.raises(UserError, match=f"tiny_vit: expected the weights abc that .* got {digest}; name the right"):
        encoder_of_checkpoint(record | {"late": {"weights": "abc"}})
    with pytest.raises(
        UserError, match="trained on tiny_vit's block7, and this release computes block3; train it again"
    ):
        encoder_of_checkpoint(record | {"late": {"weights": digest, "layer": "block7"}})


@pytest.mark.parametrize("name", ["tiny_vit", "tf_efficientnet_lite0"])
def test_weights_are_not_silently_left_out_by_encoders_that_bring_their_own(name):
    with pytest.raises(UserError, match=f"w.pth: {name} brings its own weights"):
        build_encoder(name, "w.pth")
