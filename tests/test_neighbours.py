"""What nearest positions say, against numpy loops and invariants."""

import dataclasses

import numpy as np
import pytest
import torch

from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.decoder import MaskDecoder
from fsdino.errors import UserError
from fsdino.neighbours import Annotated, NeighbourPrior, padded
from fsdino.segmenter import Segmenter

GROUPS, GRID = (5, 3), 4
SHAPE = SegmenterShape(6, 8, GRID, 32, GROUPS)
SWITCHES = SegmenterConfig(
    variant="compact", contrast=True, neighbours=True, self_support=True, fuse=True, upscaling="bilinear"
)


def supports(shots=2, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    late = torch.randn(batch, shots, sum(GROUPS), GRID, GRID, generator=generator)
    foreground = torch.rand(batch, shots, GRID, GRID, generator=generator)
    void = torch.rand(batch, shots, GRID, GRID, generator=generator) * (1 - foreground)
    return late, foreground, 1 - foreground - void


def prior(self_support=False, seed=0):
    torch.manual_seed(seed)
    return NeighbourPrior(GROUPS, self_support).eval()


def unit(x):
    return x / np.linalg.norm(x)


def maps_of_one(late, foreground, background, query):
    """The four maps of one group for one episode: supports (k, c, g, g), query (c, g, g)."""
    positions = [
        (unit(late[k, :, y, x]), foreground[k, y, x], background[k, y, x])
        for k in range(len(late))
        for y in range(GRID)
        for x in range(GRID)
    ]
    votes, nearest, inside = (np.zeros((GRID, GRID)) for _ in range(3))
    contrast = np.zeros((GRID, GRID))
    mean = [sum(f * weight[side] for f, *weight in positions) for side in (0, 1)]
    direction = unit(unit(mean[0]) - unit(mean[1]))

    def of_side(cosines, side):
        shares = np.array([weight[side] for _, *weight in positions])
        taken = set(np.argsort(-shares)[:5]) | set(np.flatnonzero(shares >= 0.5))
        return np.mean(sorted(cosines[i] for i in taken)[-5:])

    for y in range(GRID):
        for x in range(GRID):
            q = unit(query[:, y, x])
            cosines = np.array([q @ f for f, *_ in positions])
            weights = np.exp(cosines / 0.05)
            of_class = sum(w * f for w, (_, f, _) in zip(weights, positions, strict=True))
            of_all = sum(w * (f + b) for w, (_, f, b) in zip(weights, positions, strict=True))
            votes[y, x] = 4 * (of_class / of_all - 0.5)
            inside[y, x] = of_side(cosines, 0)
            nearest[y, x] = 10 * (inside[y, x] - of_side(cosines, 1))
            contrast[y, x] = 5 * direction @ q
    stretched = 2 * (inside - inside.min()) / (inside.max() - inside.min()) - 1
    return [votes, nearest, stretched, contrast]


@torch.no_grad()
def test_the_maps_equal_loops_over_all_pairs_of_positions():
    module, (late, foreground, background) = prior(), supports()
    query = torch.randn(2, sum(GROUPS), GRID, GRID, generator=torch.Generator().manual_seed(1))
    seen = []
    module.first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    module(module.annotated(late, foreground, background), query, torch.zeros(2, 1, GRID, GRID))
    for episode in range(2):
        expected, start = [], 0
        for channels in GROUPS:
            of_group = slice(start, start + channels)
            parts = late[episode, :, of_group], foreground[episode], background[episode], query[episode, of_group]
            expected += maps_of_one(*(part.double().numpy() for part in parts))
            start += channels
        np.testing.assert_allclose(seen[0][episode].numpy(), np.stack(expected), atol=2e-4)


@torch.no_grad()
def test_a_fresh_self_support_changes_nothing_and_a_trained_one_does():
    query, direct = torch.randn(2, sum(GROUPS), GRID, GRID), torch.randn(2, 1, GRID, GRID)
    plain, corrected = prior(), prior(self_support=True)
    support = plain.annotated(*supports())
    torch.testing.assert_close(corrected(support, query, direct), plain(support, query, direct))
    torch.nn.init.normal_(corrected.own_last.weight)
    assert (corrected(support, query, direct) - plain(support, query, direct)).abs().max() > 0.1


@torch.no_grad()
def test_void_positions_and_the_padding_of_further_classes_have_no_say():
    module, query = prior(self_support=True), torch.randn(2, sum(GROUPS), GRID, GRID)
    torch.nn.init.normal_(module.own_last.weight)
    late, foreground, background = supports(shots=1)
    foreground[..., :2], background[..., :2] = 0, 0
    other = late.clone()
    other[..., :2] = torch.randn_like(other[..., :2])
    direct = torch.zeros(2, 1, GRID, GRID)
    first, second = (module.annotated(x, foreground, background) for x in (late, other))
    expected = module(first, query, direct)
    torch.testing.assert_close(module(second, query, direct), expected, atol=1e-3, rtol=0)

    more = module.annotated(*supports(shots=3, batch=1, seed=5))
    one, two = (Annotated(*(x[i : i + 1] for x in first)) for i in range(2))
    together = padded([one, more, two])
    assert together.features.shape == (3, sum(GROUPS), 3 * GRID**2)
    three = module(together, query[[0, 0, 1]], direct[[0, 0, 1]])
    torch.testing.assert_close(three[[0, 2]], expected, atol=1e-3, rtol=0)
    alone = module(more, query[:1], direct[:1])
    torch.testing.assert_close(three[1:2], alone, atol=1e-3, rtol=0)


@torch.no_grad()
def test_the_fused_mask_is_the_decoders_plus_the_prior():
    torch.manual_seed(0)
    late, masks = torch.randn(2, 1, 8, GRID, GRID), (torch.rand(2, 1, 32, 32) > 0.5).float()
    query, embedding = torch.randn(2, 8, GRID, GRID), torch.randn(2, 32, GRID, GRID)
    fused = Segmenter(SWITCHES, SHAPE).eval()
    alone = Segmenter(dataclasses.replace(SWITCHES, fuse=False), SHAPE).eval()
    alone.load_state_dict(fused.state_dict())
    results = [model.segment(query, embedding, model.encode_support(late, masks)) for model in (fused, alone)]
    assert torch.equal(results[0].prior_logits, results[1].prior_logits)
    assert torch.equal(results[0].mask_logits, results[1].mask_logits + results[1].prior_logits)


def test_a_saved_segmenter_with_neighbours_is_the_same_when_loaded(tmp_path):
    torch.manual_seed(0)
    model = Segmenter(SWITCHES, SHAPE).eval()
    model.save(tmp_path, fold=1)
    loaded, record = Segmenter.load(tmp_path)
    assert loaded.shape == SHAPE and loaded.config == SWITCHES and record["fold"] == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@torch.no_grad()
def test_a_smooth_decoder_shows_no_chequered_pattern():
    """Within a flat region, neighbours of the enlarged map differ for transposed convolutions alone."""
    spread = {}
    for upscaling in ("transposed", "bilinear"):
        torch.manual_seed(0)
        decoder = MaskDecoder(32, sam_extras=False, upscaling=upscaling).eval()
        inside = decoder.output_upscaling(torch.ones(1, 32, 8, 8))[..., 10:-10, 10:-10]
        spread[upscaling] = (inside - inside.mean((2, 3), keepdim=True)).abs().max()
    assert spread["bilinear"] < 1e-6 and spread["transposed"] > 0.01


def test_switches_of_a_later_release_that_are_off_make_no_other_model():
    plain = SegmenterConfig().record()
    later = {"neighbours", "self_support", "presence", "fuse", "upscaling", "decoder_mlp"}
    assert not later & plain.keys() and plain["variant"] == "4d"
    unchanged = {"presence", "decoder_mlp"}
    assert SWITCHES.record() == {k: v for k, v in dataclasses.asdict(SWITCHES).items() if k not in unchanged}


@pytest.mark.parametrize(
    "config, said",
    [
        (SegmenterConfig(self_support=True), "turn that on as well"),
        (SegmenterConfig(sam_decoder="sam_vit_h", upscaling="bilinear"), "leave out --sam-decoder"),
        (SegmenterConfig(sam_decoder="sam_vit_h", decoder_mlp=512), "leave out --sam-decoder"),
    ],
)
def test_switches_that_exclude_each_other_are_refused(config, said):
    with pytest.raises(UserError, match=said):
        config.check()
