"""Episodes as tensors, against the stores and labels they come from."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from feature_store import FeatureStore, Fingerprint, Row, create
from fsdino.data.episodes import EpisodeSampler
from fsdino.data.masks import binary_label
from fsdino.data.protocols import HDMNET
from fsdino.data.voc import VocDataset
from pipelines.loading import EpisodeLoader, ahead

GRID = 7


@pytest.fixture(scope="module")
def loader(shapes_root, tmp_path_factory):
    """Every feature holds its image's number, and the row and column it lies at."""
    dataset = VocDataset(shapes_root)
    ids = [*dataset.ids("train"), *dataset.ids("val")]
    fingerprint = Fingerprint(
        "late", "m", "w", "l", "none", res_px=98, grid=GRID, channels=3, view_seed=0, preprocessing="p"
    )
    url = str(tmp_path_factory.mktemp("stores") / "late@98")
    writer = create(url, fingerprint, [Row(i, 0, i) for i in ids])
    y, x = np.mgrid[:GRID, :GRID]
    features = np.stack([np.stack([np.full_like(y, n), y, x], axis=-1) for n in range(len(ids))])
    for shard in writer.missing():
        part = features[shard * 32 : (shard + 1) * 32]
        writer.write(shard, part, [(224, 224)] * len(part))
    writer.seal()
    return EpisodeLoader(dataset, FeatureStore(url), None, view_seed=0, label_px=98)


@pytest.fixture(scope="module")
def episode(loader):
    sampler = EpisodeSampler(HDMNET.training_images(loader.dataset, 0), shots=2, fold=0, seed=0, training=True)
    return sampler.episode(3)


def number(loader, image_id):
    return loader.late.source.row_numbers([image_id], [0])[0]


def test_features_and_labels_are_those_of_the_episodes_images(loader, episode):
    batch = loader.load([episode])
    assert batch.query_late[0, 0].unique().item() == number(loader, episode.query)
    for k, image_id in enumerate(episode.supports):
        assert batch.support_late[0, k, 0].unique().item() == number(loader, image_id)
        label = Image.fromarray(loader.dataset.label(image_id)).resize((98, 98), Image.Resampling.NEAREST)
        expected = binary_label(np.array(label), episode.class_id) == 1
        assert np.array_equal(batch.support_masks[0, k].numpy(), expected) and expected.any()


def test_a_mirrored_image_has_mirrored_features_and_label(loader, episode):
    plain, mirrored = (
        loader.load([dataclasses.replace(episode, flips=f)]) for f in ((False,) * 3, (True, False, True))
    )
    assert torch.equal(mirrored.query_late, plain.query_late.flip(-1))
    assert torch.equal(mirrored.query_labels, plain.query_labels.flip(-1))
    assert torch.equal(mirrored.support_late[:, 0], plain.support_late[:, 0])
    assert torch.equal(mirrored.support_masks[:, 1], plain.support_masks[:, 1].flip(-1))


def test_batches_come_in_order_and_as_if_loaded_one_by_one(loader):
    sampler = EpisodeSampler(HDMNET.training_images(loader.dataset, 1), shots=1, fold=1, seed=0, training=True)
    indices = [range(0, 3), range(3, 6), range(6, 9)]
    batches = list(loader.batches(sampler, iter(indices)))
    assert [e for b in batches for e in b.episodes] == [sampler.episode(i) for i in range(9)]
    assert torch.equal(batches[1].query_late, loader.load([sampler.episode(i) for i in indices[1]]).query_late)


def test_a_plain_episode_shows_its_images_unmirrored(loader):
    sampler = EpisodeSampler(
        HDMNET.training_images(loader.dataset, 1), shots=1, fold=1, seed=0, training=True, flip=True
    )
    for index in range(10):
        batch = loader.load([sampler.episode(index).plain()])
        assert batch.query_late[0, 2, 0].tolist() == list(range(GRID))
        assert batch.query_late[0, 1, :, 0].tolist() == list(range(GRID))


@pytest.mark.parametrize("threads, depth", [(1, 1), (3, 4), (4, 1)])
def test_any_number_of_threads_reads_ahead_in_order_and_no_further_than_told(threads, depth):
    started, used = [], []

    def read(number):
        started.append(number)
        return number

    for number in ahead(read, iter(range(20)), threads, depth):
        used.append(number)
        assert len(started) <= len(used) + depth
    assert used == list(range(20))
