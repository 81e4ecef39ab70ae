"""INSID3's matching on features made by hand, and SAM's point prompts against segment-anything's own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from segment_anything.modeling import PromptEncoder, TwoWayTransformer

from fsdino.matching import clusters, foreground, matching_logits, positional_basis
from fsdino.peak import PeakPrompt

G, C = 8, 32


def planted(where, direction, noise=0.02, seed=0):
    """Features of a background direction, and of another one on a rectangle."""
    x = F.normalize(torch.randn(C, G, G, generator=torch.Generator().manual_seed(seed)), dim=0) * noise
    x[0] += 1
    rows, columns = where
    x[:, rows, columns] -= torch.eye(C)[0][:, None, None]
    x[:, rows, columns] += torch.eye(C)[direction][:, None, None]
    return x


OBJECT, MOVED = (slice(1, 4), slice(1, 5)), (slice(4, 8), slice(3, 6))
NO_BASIS = torch.zeros(C, 0)


def mask_of(where, side=G * 4):
    mask = torch.zeros(1, 1, side, side)
    rows, columns = where
    mask[0, 0, rows.start * 4 : rows.stop * 4, columns.start * 4 : columns.stop * 4] = 1
    return mask


def test_an_object_is_found_where_it_is_in_the_query():
    late, query = planted(OBJECT, 5)[None, None], planted(MOVED, 5, seed=1)[None]
    found = matching_logits(late, mask_of(OBJECT), query, NO_BASIS)[0, 0] > 0
    expected = torch.zeros(G, G, dtype=torch.bool)
    expected[MOVED] = True
    assert torch.equal(found, expected)


def test_an_object_that_the_query_does_not_show_is_not_found():
    """Every query position is nearest to the support's background, so backward and forward matches do not agree."""
    late, query = planted(OBJECT, 5)[None, None], planted(MOVED, 5, seed=1)[None]
    query[0] = planted((slice(0, 0), slice(0, 0)), 5, seed=2)
    assert not (matching_logits(late, mask_of(OBJECT), query, NO_BASIS) > 0).any()


def test_features_that_tell_of_position_alone_lead_astray_until_they_are_projected_out():
    ramp = torch.zeros(C, G, G)
    ramp[9] = torch.linspace(-2, 2, G)[:, None]
    ramp[10] = torch.linspace(-2, 2, G)[None, :]
    blank = ramp.clone()
    blank[0] += 1
    basis = positional_basis(blank)
    assert basis.shape[1] <= C // 2 and torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)
    late, query = (planted(OBJECT, 5) + ramp)[None, None], (planted(MOVED, 5, seed=1) + ramp)[None]
    expected = torch.zeros(G, G, dtype=torch.bool)
    expected[MOVED] = True

    def iou(found):
        return (found & expected).sum().item() / (found | expected).sum().item()

    debiased, biased = (matching_logits(late, mask_of(OBJECT), query, b)[0, 0] > 0 for b in (basis[:, :2], NO_BASIS))
    assert iou(debiased) > iou(biased)


def test_the_basis_of_a_blank_image_spans_what_varies_in_it_and_nothing_else():
    blank = torch.zeros(C, G, G)
    blank[0] = 1
    blank[3] = torch.linspace(-1, 1, G)[:, None]
    basis = positional_basis(blank)
    unit = F.normalize(blank.flatten(1), dim=0)
    rest = unit - unit.mean(1, keepdim=True)
    assert basis.shape == (C, 2) and torch.allclose(basis @ (basis.T @ rest), rest, atol=1e-6)
    assert positional_basis(torch.ones(C, G, G)).shape == (C, 0)


def test_clusters_are_those_of_average_linkage_at_a_cosine_distance():
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(C, 3)))[0].T
    features = np.repeat(centres, 10, 0) + rng.normal(0, 0.02, (30, C))
    labels = clusters(features)
    assert sorted(set(labels)) == [0, 1, 2]
    assert all(len(set(labels[i : i + 10])) == 1 for i in (0, 10, 20))


def test_an_object_smaller_than_half_a_cell_is_the_cell_that_it_covers_most():
    masks = torch.zeros(1, 32, 32)
    masks[0, 9, 17] = 1
    assert foreground(masks, G)[0].nonzero().tolist() == [[2, 4]]
    masks[0, 8:16, 16:24] = 1
    assert foreground(masks, G)[0].sum() == 4


def test_a_point_prompt_gives_sams_own_mask():
    """segment-anything's prompt encoder and decoder, with random weights, for the same two points."""
    torch.manual_seed(0)
    encoder = PromptEncoder(256, (G, G), (G * 16, G * 16), 16).eval()
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
    decoder = SamMaskDecoder(transformer_dim=256, transformer=transformer).eval()
    ours = PeakPrompt().eval()
    ours.decoder.load_state_dict(decoder.state_dict())
    ours.positional_encoding.gaussian.data = encoder.pe_layer.positional_encoding_gaussian_matrix
    ours.background_point.weight.data = encoder.point_embeddings[0].weight.data
    ours.foreground_point.weight.data = encoder.point_embeddings[1].weight.data
    ours.not_a_point_embed.weight.data = encoder.not_a_point_embed.weight.data
    ours.no_mask_embed.weight.data = encoder.no_mask_embed.weight.data
    embedding = torch.randn(1, 256, G, G)
    late, query = planted(OBJECT, 5)[None, None], planted(MOVED, 5, seed=1)[None]
    query[0, 5, 6, 4] += 0.5  # the peak
    query[0, 0, 1, 7] += 0.5
    query[0, 5, 1, 7] -= 0.9  # least like the object
    with torch.inference_mode():
        found = ours(late, mask_of(OBJECT), query, embedding)
        points = torch.tensor([[[4.0, 6.0], [7.0, 1.0]]]) * 16 + 7.5  # x before y; SAM adds half a pixel itself
        sparse, dense = encoder(points=(points, torch.tensor([[1, 0]])), boxes=None, masks=None)
        expected, _ = decoder(embedding, encoder.get_dense_pe(), sparse, dense, multimask_output=False)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("shots", [1, 3])
def test_several_supports_vote_by_more_than_half(shots):
    late = torch.stack([planted(OBJECT, 5, seed=s) for s in range(shots)])[None]
    masks = mask_of(OBJECT).expand(1, shots, -1, -1)
    query = planted(MOVED, 5, seed=9)[None]
    found = matching_logits(late, masks, query, NO_BASIS)[0, 0] > 0
    assert found[MOVED].all() and found.sum() == 12
