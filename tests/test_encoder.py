import pytest
import timm
import torch
import torch.nn.functional as F

from fsdino.encoder import build_encoder, position_embedding
from fsdino.errors import UserError


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
        build_encoder(name).grid(res)


def test_an_unknown_encoder_is_a_users_mistake():
    with pytest.raises(UserError, match="--encoder resnet: no such encoder; known are dinov2_vits14"):
        build_encoder("resnet")


def test_weights_of_another_seed_have_another_digest():
    assert build_encoder("tiny_vit", seed=0).digest == build_encoder("tiny_vit", seed=0).digest
    assert build_encoder("tiny_vit", seed=0).digest != build_encoder("tiny_vit", seed=1).digest


def test_published_dinov2_keys_load_and_the_mask_token_is_ignored(tmp_path):
    """The published files have timm's keys plus `mask_token`; ViT-S at full size, random weights."""
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    torch.save(vit.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "published.pth")
    encoder = build_encoder("dinov2_vits14", str(tmp_path / "published.pth"))
    assert encoder.grid(518) == 37 and encoder.late_channels == 384
    assert torch.equal(encoder.vit.blocks[5].attn.qkv.weight, vit.blocks[5].attn.qkv.weight)


@torch.no_grad()
def test_efficientnet_stages_are_normalised_on_the_stride_16_grid():
    encoder = build_encoder("tf_efficientnet_lite0")
    early, late = encoder(torch.randn(2, 3, 112, 112))
    assert early.shape == (2, 40, 7, 7) and late.shape == (2, 112 + 320, 7, 7)
    torch.testing.assert_close(early.norm(dim=1), torch.ones(2, 7, 7))
    torch.testing.assert_close(late[:, :112].norm(dim=1), torch.ones(2, 7, 7))
    torch.testing.assert_close(late[:, 112:].norm(dim=1), torch.ones(2, 7, 7))


@torch.no_grad()
def test_carried_imagenet_weights_classify_nothing_at_random():
    """Right tensors in the right places: a flat image and a noisy one give quite different features."""
    encoder = build_encoder("tf_efficientnet_lite0")
    flat, noisy = torch.zeros(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    raw = [stage.abs().mean().item() for stage in encoder.net(torch.cat([flat, noisy]))]
    assert all(0.05 < level < 20 for level in raw), raw
