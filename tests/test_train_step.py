"""A step of episodic training: the same for any split of its batch, with its switches."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.data.episodes import Episode
from fsdino.episodic import EpisodeBatch, EpisodeLoss
from fsdino.segmenter import Segmenter
from pipelines import training
from pipelines.episodic_loop import moving_average, train_step
from pipelines.recipes import Workers
from tests.conftest import ROOT

SHAPE = SegmenterShape(early_channels=12, late_channels=16, grid=6, embedding_channels=256)


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return Segmenter(SegmenterConfig(variant="compact", sam_decoder=None), SHAPE)


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    labels = torch.randint(0, 2, (4, 24, 24), dtype=torch.uint8)
    labels[0, :20] = 255  # parts with other shares of void
    return EpisodeBatch(
        episodes=[Episode(1, "query", ("support",), (0, 0), (False, False))] * 4,
        support_late=torch.randn(4, 1, 16, 6, 6),
        support_masks=(torch.rand(4, 1, 24, 24) > 0.6),
        query_late=torch.randn(4, 16, 6, 6),
        query_input=torch.randn(4, 256, 6, 6),
        query_labels=labels,
    )


def part(batch, at, size):
    fields = ("support_late", "support_masks", "query_late", "query_input", "query_labels")
    cut = {name: getattr(batch, name)[at : at + size] for name in fields}
    return replace(batch, episodes=batch.episodes[at : at + size], **cut)


def worker():
    return training.Worker(torch.device("cpu"), 0, 1, "", "fp32", Workers(), None, None)


def stepped(segmenter, parts, clip=None):
    """The segmenter after a plain step of gradient descent at rate 1, and the step's losses."""
    changed = copy.deepcopy(segmenter)
    optimiser = torch.optim.SGD([p for p in changed.parameters() if p.requires_grad], lr=1.0)
    losses = train_step(EpisodeLoss(changed), optimiser, parts, worker(), clip)
    return changed, losses


def moved(before, after):
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return torch.cat([(b - a).flatten() for a, b in pairs if a.requires_grad])


@pytest.mark.parametrize("size", [1, 2])
def test_parts_one_after_another_make_the_step_of_the_whole_batch(segmenter, batch, size):
    whole, losses = stepped(segmenter, [batch])
    split, of_parts = stepped(segmenter, [part(batch, at, size) for at in range(0, 4, size)])
    torch.testing.assert_close(moved(segmenter, split), moved(segmenter, whole), rtol=1e-3, atol=1e-6)
    for name, loss in losses.items():
        assert of_parts[name].item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_gradient_is_clipped_at_the_given_norm_and_left_alone_below_it(segmenter, batch):
    free = moved(segmenter, stepped(segmenter, [batch])[0])
    clipped = moved(segmenter, stepped(segmenter, [batch], clip=0.5 * free.norm().item())[0])
    torch.testing.assert_close(clipped, 0.5 * free, rtol=1e-3, atol=1e-6)
    untouched = moved(segmenter, stepped(segmenter, [batch], clip=2 * free.norm().item())[0])
    assert torch.equal(untouched, free)


def test_the_moving_average_is_the_weights_weighted_by_the_decay(segmenter):
    assert moving_average(segmenter, 0.0) is None
    network = copy.deepcopy(segmenter)
    averaged = moving_average(network, 0.9)
    name, parameter = next((n, p) for n, p in network.named_parameters() if p.requires_grad)
    start, expected = parameter.detach().clone(), None
    for number in (1.0, 2.0, 3.0):
        with torch.no_grad():
            parameter.copy_(start + number)
        averaged.update_parameters(network)
        expected = start + number if expected is None else 0.9 * expected + 0.1 * (start + number)
    torch.testing.assert_close(averaged.module.get_parameter(name).detach(), expected)


def test_losses_wait_on_the_device_and_one_that_is_no_number_names_its_step():
    pending = training.Losses()
    for step in (1, 2):
        pending.add(step, {"loss": torch.tensor(float(step)), "final": torch.tensor(0.5)})
    assert pending.gather() == [(1, {"loss": 1.0, "final": 0.5}), (2, {"loss": 2.0, "final": 0.5})]
    assert pending.gather() == []
    pending.add(3, {"loss": torch.tensor(1.0)})
    pending.add(4, {"loss": torch.tensor(float("nan"))})
    with pytest.raises(training.Fault, match="training diverged at step 4"):
        pending.gather()


COMPILED = """
import sys
import torch
from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.data.episodes import Episode
from fsdino.episodic import EpisodeBatch
from fsdino.segmenter import Segmenter
from pipelines import training
from pipelines.episodic_loop import objective, train_step
from pipelines.recipes import Episodic, Workers

device = torch.device(sys.argv[1])
worker = training.Worker(device, 0, 1, "", "fp32", Workers(), None, None)
torch.manual_seed(0)
supports, masks = torch.randn(4, 1, 16, 6, 6), torch.rand(4, 1, 24, 24) > 0.6
queries, embeddings = torch.randn(4, 16, 6, 6), torch.randn(4, 256, 6, 6)
labels = torch.randint(0, 2, (4, 24, 24), dtype=torch.uint8)

def losses(compiled):
    torch.manual_seed(1)
    shape = SegmenterShape(early_channels=12, late_channels=16, grid=6, embedding_channels=256)
    segmenter = Segmenter(SegmenterConfig(variant="compact", sam_decoder=None), shape).to(device)
    model = objective(segmenter, Episodic(train_compile=compiled), worker)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    steps = []
    for number in range(6):
        episodes = [Episode(number, f"query{number}", (f"support{number}",), (0, number), (True, False))] * 4
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            batch = EpisodeBatch(episodes, supports, masks, queries, embeddings, labels)
            steps.append(train_step(model, optimiser, [batch], worker, 1.0))
    return torch.stack([step["loss"] for step in steps]).cpu()

plain = losses(False)
assert plain[-1] < plain[0] - 0.1, plain
torch.testing.assert_close(losses(True), plain, rtol=1e-3, atol=1e-4)
"""


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_a_compiled_training_has_the_losses_of_a_plain_one_and_is_compiled_once(device):
    """In a process of its own: the shape checks of these tests are no part of what users compile."""
    done = subprocess.run([sys.executable, "-c", COMPILED, device], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
