"""The presence score: evidence against loops, the regression against scikit-learn's, and what fitting promises."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.errors import UserError
from fsdino.neighbours import Annotated
from fsdino.presence import OF_GROUP, OF_MASK, Presence, evidence, lag
from fsdino.segmenter import Prediction, Segmenter
from pipelines import presence_fit
from pipelines.presence_fit import LOSS, Regression, Seen, fit
from tests.test_episodes import CLASSES, sampler

GROUPS, GRID = (5, 3), 4
SHAPE = SegmenterShape(6, 8, GRID, 32, GROUPS)
CONFIG = SegmenterConfig(variant="compact", neighbours=True, presence=True)


def unit(x):
    return x / np.linalg.norm(x)


def evidence_of_one(features, foreground, background, query, logits):
    """Of one episode and one group: supports (c, n), query (c, p), logits (p,)."""
    probability = 1 / (1 + np.exp(-logits))
    share = probability / probability.sum()
    positions = range(features.shape[1])
    taken = set(np.argsort(-foreground)[:5]) | {i for i in positions if foreground[i] >= 0.5}
    cosine = np.array([[unit(query[:, p]) @ features[:, i] for i in positions] for p in range(query.shape[1])])
    alike = [np.mean(sorted(cosine[p, i] for i in taken)[-5:]) for p in range(query.shape[1])]
    inside = [p for p in range(query.shape[1]) if probability[p] >= 0.5]
    again = [max((cosine[p, i] for p in inside), default=-1) for i in positions]
    found = unit(sum(share[p] * unit(query[:, p]) for p in range(query.shape[1])))
    of_class, of_rest = (unit(features @ weights) for weights in (foreground, background))
    return [max(alike), alike @ share, again @ foreground / foreground.sum(), found @ of_class, found @ of_rest]


def test_the_evidence_equals_loops_over_all_pairs_of_positions():
    rng = np.random.default_rng(0)
    features = np.concatenate([np.stack([unit(c) for c in rng.normal(size=(32, g))], 1) for g in GROUPS])
    foreground = rng.random(32)
    background = (1 - foreground) * rng.random(32)
    query, logits = rng.normal(size=(8, GRID, GRID)), rng.normal(size=(GRID, GRID))
    support = Annotated(*(torch.from_numpy(x).float()[None] for x in (features, foreground, background)))
    large = torch.from_numpy(np.kron(logits, np.ones((4, 4)))).float()[None, None]
    found = evidence(GROUPS, support, torch.from_numpy(query).float()[None], large)[0].numpy()
    expected, start = [], 0
    for channels in GROUPS:
        of = slice(start, start + channels)
        expected += evidence_of_one(
            features[of], foreground, background, query[of].reshape(channels, -1), logits.reshape(-1)
        )
        start += channels
    probability = 1 / (1 + np.exp(-logits))
    expected += [(probability**2).sum() / probability.sum(), np.log(probability.mean())]
    assert len(found) == OF_GROUP * len(GROUPS) + OF_MASK
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_regression_is_scikit_learns():
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(200, 4)) * [1, 10, 0.1, 5] + 3
    shows = (inputs[:, 0] - 0.2 * inputs[:, 1] + rng.normal(size=200) > 2.5).astype(float)
    standard = (inputs - inputs.mean(0)) / inputs.std(0)
    reference = LogisticRegression(C=1 / (2 * presence_fit.WEIGHT * 200), tol=1e-10, max_iter=1000).fit(standard, shows)
    found = Regression(inputs, shows)(inputs)
    np.testing.assert_allclose(found, reference.predict_proba(standard)[:, 1], atol=1e-4)


def episodes(rng, means, iou):
    """So many episodes, of six classes in turn, with evidence about the means and masks of one IoU."""
    classes = np.arange(len(means)) % 6
    found = rng.normal(size=(len(means), OF_GROUP * len(GROUPS) + OF_MASK)) + np.array(means)[:, None]
    counts = np.tile([int(100 * iou), 100, 80], (len(means), 1))
    return Seen(found.astype(np.float32), classes, counts)


def test_evidence_that_tells_empties_absent_classes_at_almost_no_cost():
    rng, model = np.random.default_rng(2), Segmenter(CONFIG, SHAPE).eval()
    present, absent = episodes(rng, [1.5] * 240, 0.6), episodes(rng, [-1.5] * 240, 0.6)
    said = fit(model, present, absent)
    assert said["absent_empty"] > 0.99 and said["presence_miou_lost"] <= LOSS + 1e-4
    assert 0 < model.threshold == pytest.approx(said["presence_threshold"], abs=1e-4)
    scores = [model.presence(torch.from_numpy(of.evidence)).numpy() for of in (present, absent)]
    assert (scores[0] >= model.threshold).mean() > 0.98 and (scores[1] < model.threshold).mean() > 0.98


def test_evidence_that_tells_nothing_costs_no_more_than_it_may():
    rng, model = np.random.default_rng(3), Segmenter(CONFIG, SHAPE).eval()
    said = fit(model, episodes(rng, [0.0] * 240, 0.6), episodes(rng, [0.0] * 240, 0.6))
    assert said["absent_empty"] < 0.1 and said["presence_miou_lost"] <= LOSS + 1e-4


@torch.no_grad()
def test_a_class_below_the_threshold_has_an_empty_mask_and_an_unfitted_model_has_none_such():
    torch.manual_seed(0)
    model = Segmenter(CONFIG, SHAPE).eval()
    support = model.encode_support(torch.randn(2, 1, 8, GRID, GRID), (torch.rand(2, 1, 32, 32) > 0.5).float())
    found = model.segment(torch.randn(2, 8, GRID, GRID), torch.randn(2, 32, GRID, GRID), support)
    assert found.presence is not None and (found.presence > 0.99).all() and model.threshold == 0
    assert torch.equal(found.emptied(model.threshold).mask_logits, found.mask_logits)
    logits = torch.full((2, 1, 8, 8), 3.0)
    emptied = Prediction(None, logits, torch.tensor([0.2, 0.7])).emptied(0.5).mask_logits
    assert (emptied[0] < 0).all() and torch.equal(emptied[1], logits[1])
    assert (
        model.train().segment(torch.randn(2, 8, GRID, GRID), torch.randn(2, 32, GRID, GRID), support).presence is None
    )


def test_presence_needs_neighbours_and_is_saved(tmp_path):
    with pytest.raises(UserError, match="--presence: rests on what --neighbours finds"):
        dataclasses.replace(CONFIG, neighbours=False).check()
    model = Segmenter(CONFIG, SHAPE).eval()
    model.presence.threshold.fill_(0.3)
    model.presence.weight.normal_()
    model.save(tmp_path)
    loaded = Segmenter.load(tmp_path)[0]
    assert loaded.threshold == pytest.approx(0.3) and torch.equal(loaded.presence.weight, model.presence.weight)
    assert isinstance(loaded.presence, Presence) and not list(loaded.presence.parameters())


def test_a_class_lags_by_four_times_its_log_odds_behind_the_most_probable():
    odds = torch.tensor([[9.0, 1.0, 1 / 4], [1.0, 1.0, 1.0]])
    expected = 4 * torch.tensor([[0.0, math.log(9), math.log(36)], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(lag(odds / (1 + odds)), expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(lag(torch.tensor([0.0, 1.0]))).all()


def test_episodes_that_show_the_class_and_that_do_not_differ_in_nothing_else():
    training = sampler(training=True, flip=True, num_views=3)
    lacking = training.lacking({i: dict.fromkeys(classes, 9) for i, classes in CLASSES.items()})
    present, absent = presence_fit.episodes(training.with_absent(0.5, lacking), lacking, 100, 60)
    assert len(present) == len(absent) == 60
    assert all(one.class_id in CLASSES[one.query] for one in present)
    assert all(one.class_id not in CLASSES[one.query] for one in absent)
    assert {(*one.views, *one.flips) for one in (*present, *absent)} == {(*[0] * 4, *[False] * 4)}
