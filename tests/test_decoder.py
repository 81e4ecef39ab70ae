"""Our decoder against segment-anything's own, under equal random weights."""

import torch
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from segment_anything.modeling import PromptEncoder, TwoWayTransformer

from fsdino.decoder import MaskDecoder, PositionalEncoding, mask_downscaling


def sam_pair(grid):
    torch.manual_seed(0)
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
    theirs = SamMaskDecoder(transformer_dim=256, transformer=transformer).eval()
    prompts = PromptEncoder(256, (grid, grid), (grid * 16, grid * 16), 16).eval()
    ours = MaskDecoder(256).eval()
    ours.load_state_dict(theirs.state_dict())
    downscaling = mask_downscaling(256).eval()
    downscaling.load_state_dict(prompts.mask_downscaling.state_dict())
    encoding = PositionalEncoding(256)
    encoding.gaussian.data.copy_(prompts.pe_layer.positional_encoding_gaussian_matrix)
    return theirs, prompts, ours, downscaling, encoding


@torch.no_grad()
def test_one_image_is_decoded_as_segment_anything_does_up_to_the_last_product():
    """Which has one row in ours and four in theirs, and so adds in another order."""
    theirs, prompts, ours, downscaling, encoding = sam_pair(64)
    embedding, sparse, prior = torch.randn(1, 256, 64, 64), torch.randn(1, 3, 256), torch.randn(1, 1, 256, 256)
    assert torch.equal(encoding(64), prompts.get_dense_pe())
    dense = downscaling(prior)
    assert torch.equal(dense, prompts.mask_downscaling(prior))
    expected, _ = theirs(
        image_embeddings=embedding,
        image_pe=prompts.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    torch.testing.assert_close(ours(embedding, encoding(64), sparse, dense), expected, rtol=0, atol=5e-7)
    tokens = torch.cat([ours.iou_token.weight, ours.mask_tokens.weight])[None]
    out, image = ours.transformer(embedding + dense, encoding(64), torch.cat([tokens, sparse], dim=1))
    upscaled = ours.output_upscaling(image.transpose(1, 2).unflatten(2, (64, 64)))
    rows = torch.stack([mlp(out[:, 1 + i]) for i, mlp in enumerate(ours.output_hypernetworks_mlps)], dim=1)
    assert torch.equal((rows @ upscaled.flatten(2)).unflatten(2, (256, 256))[:, :1], expected)


@torch.no_grad()
def test_a_batch_of_pairs_is_decoded_as_each_pair_alone_on_a_grid_of_37():
    theirs, prompts, ours, _, encoding = sam_pair(37)
    embedding, sparse, dense = torch.randn(3, 256, 37, 37), torch.randn(3, 1, 256), torch.randn(3, 256, 37, 37)
    together = ours(embedding, encoding(37), sparse, dense)
    for i in range(3):
        alone, _ = theirs(
            image_embeddings=embedding[i : i + 1],
            image_pe=prompts.get_dense_pe(),
            sparse_prompt_embeddings=sparse[i : i + 1],
            dense_prompt_embeddings=dense[i : i + 1],
            multimask_output=False,
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-6)
