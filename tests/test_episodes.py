import pytest

from fsdino.data.episodes import EpisodeSampler
from fsdino.data.protocols import ImageClasses
from fsdino.errors import UserError

CLASSES = {f"image{i:02d}": (1 + i % 3, *([4] if i % 2 else [])) for i in range(24)}
IMAGES = {image_id: ImageClasses(classes, classes) for image_id, classes in CLASSES.items()}


def sampler(training=False, **changes):
    settings = {"shots": 3, "fold": 0, "seed": 0, "training": training, "num_views": 4 if training else 1} | changes
    return EpisodeSampler(IMAGES, **settings)


@pytest.mark.parametrize("training", [True, False])
def test_supports_are_distinct_never_the_query_and_show_the_class(training):
    drawn = [sampler(training).episode(i) for i in range(300)]
    for episode in drawn:
        assert len({episode.query, *episode.supports}) == 4
        assert all(episode.class_id in CLASSES[i] for i in (episode.query, *episode.supports))
        assert len(episode.views) == 4


def test_test_queries_come_in_order_and_draw_every_class_of_the_image():
    drawn = [sampler().episode(i) for i in range(24 * 20)]
    assert [e.query for e in drawn[:24]] == sorted(IMAGES)
    assert {e.class_id for e in drawn if e.query == "image01"} == {2, 4}
    assert all(set(e.views) == {0} for e in drawn)


def test_queries_come_in_the_order_in_which_the_images_are_listed():
    backwards = dict(reversed(IMAGES.items()))
    drawn = EpisodeSampler(backwards, shots=1, fold=0, seed=0, training=False)
    assert [drawn.episode(i).query for i in range(24)] == list(backwards)


def test_an_epoch_of_training_is_a_permutation_that_differs_between_epochs():
    drawn = [sampler(training=True).episode(i).query for i in range(24 * 4)]
    epochs = [drawn[at : at + 24] for at in range(0, len(drawn), 24)]
    assert all(sorted(epoch) == sorted(IMAGES) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and epochs[0] != sorted(IMAGES)


def test_a_querys_class_may_be_one_that_it_is_too_small_to_support():
    images = {f"image{i}": ImageClasses((1,), (1, 2)) if i < 4 else ImageClasses((2,), (2,)) for i in range(8)}
    drawn = EpisodeSampler(images, shots=2, fold=0, seed=0, training=False)
    of_small = [e for e in map(drawn.episode, range(400)) if e.query == "image0"]
    assert {e.class_id for e in of_small} == {1, 2}
    for episode in of_small:
        supporting = {i for i, classes in images.items() if episode.class_id in classes.listed}
        assert set(episode.supports) <= supporting - {episode.query}


def test_training_draws_every_view():
    assert {v for i in range(100) for v in sampler(training=True).episode(i).views} == {0, 1, 2, 3}


@pytest.mark.parametrize("balance, expected", [(0.0, 0.1), (0.5, 0.25), (1.0, 0.5)])
def test_balance_draws_rare_classes_more_often(balance, expected):
    images = {f"image{i}": ImageClasses((c := (1 if i < 36 else 2,)), c) for i in range(40)}
    balanced = EpisodeSampler(images, shots=1, fold=0, seed=0, training=True, balance=balance)
    share = sum(balanced.episode(i).class_id == 2 for i in range(1000)) / 1000
    assert abs(share - expected) < 0.04


def test_half_of_the_images_are_mirrored_in_training_and_none_in_tests():
    flips = [f for i in range(300) for f in sampler(training=True, flip=True).episode(i).flips]
    assert 0.45 < sum(flips) / len(flips) < 0.55
    assert not any(f for i in range(50) for f in sampler().episode(i).flips)


def test_an_episode_depends_on_seed_fold_and_index_alone():
    one, other = sampler(training=True), sampler(training=True)
    backwards = [other.episode(i) for i in reversed(range(50))]
    assert [one.episode(i) for i in range(50)] == backwards[::-1]
    for change in ({"seed": 1}, {"fold": 1}):
        assert [sampler(training=True, **change).episode(i) for i in range(50)] != backwards[::-1]


def test_training_and_test_draw_differently():
    assert [sampler(training=True, num_views=1).episode(i) for i in range(9)] != [
        sampler().episode(i) for i in range(9)
    ]


def test_a_class_with_too_few_images_is_a_users_mistake():
    with pytest.raises(UserError, match=r"at least 9 images of every class for 8-shot episodes, got \{1: 8"):
        sampler(shots=8)
    with pytest.raises(UserError, match="got none at all"):
        EpisodeSampler({}, shots=1, fold=0, seed=0, training=False)


def test_absent_queries_show_no_pixel_of_the_class_and_supports_do():
    pixels = {image_id: {c: 9 for c in classes} for image_id, classes in CLASSES.items()}
    pixels["image00"] |= {c: 1 for c in (2, 3, 4)}  # it shows every class, so it is no query
    drawn_by = sampler(shots=2)
    lacking = drawn_by.lacking(pixels)
    drawn = [drawn_by.absent(i, lacking) for i in range(200)]
    assert "image00" not in lacking and [e.query for e in drawn[:23]] == sorted(lacking)
    for episode in drawn:
        assert episode.class_id not in pixels[episode.query] and len(set(episode.supports)) == 2
        assert all(episode.class_id in CLASSES[i] for i in episode.supports)
    assert {e.class_id for e in drawn if e.query == "image01"} == {1, 3}


def test_pairs_come_in_turn_and_classes_with_equal_chances():
    pairs = [(image_id, c) for image_id, classes in CLASSES.items() for c in classes]
    by_pairs = sampler(order="pairs", shots=1)
    assert [(e.query, e.class_id) for e in map(by_pairs.episode, range(2 * len(pairs)))] == pairs * 2
    by_class = [sampler(order="classes", shots=1).episode(i).class_id for i in range(2000)]
    assert all(by_class.count(c) == pytest.approx(500, abs=70) for c in (1, 2, 3, 4))
    trained = sampler(order="pairs", training=True)
    epoch = [trained.episode(i) for i in range(len(pairs))]
    assert sorted((e.query, e.class_id) for e in epoch) == sorted(pairs)


def test_supports_may_repeat_where_the_protocol_says_so_but_are_never_the_query():
    drawn = [sampler(shots=5, repeats_supports=True).episode(i) for i in range(300)]
    assert any(len(set(e.supports)) < 5 for e in drawn) and all(e.query not in e.supports for e in drawn)


def test_a_share_of_training_queries_lacks_the_class_and_the_others_are_as_before():
    plain = sampler(training=True, flip=True)
    lacking = plain.lacking({i: dict.fromkeys(classes, 9) for i, classes in CLASSES.items()})
    mixed = plain.with_absent(0.3, lacking)
    pairs = [(plain.episode(i), mixed.episode(i)) for i in range(2000)]
    absent = [b for a, b in pairs if a != b]
    assert 0.27 < len(absent) / len(pairs) < 0.33
    for one in absent:
        assert one.class_id in lacking[one.query] and one.class_id not in CLASSES[one.query]
        assert one.query not in one.supports and all(one.class_id in CLASSES[i] for i in one.supports)
    assert all((a.query, a.views, a.flips) == (b.query, b.views, b.flips) for a, b in pairs)
    assert plain.with_absent(0.0, lacking).episode(7) == plain.episode(7)


def test_further_classes_of_a_query_are_others_of_the_fold_with_supports_that_are_not_the_query():
    tests = sampler(shots=1)
    for index in range(60):
        first, *others = tests.ways(index, 3)
        assert first == tests.episode(index) and len({e.class_id for e in (first, *others)}) == 3
        for one in others:
            assert one.query == first.query and one.query not in one.supports
            assert all(one.class_id in CLASSES[i] for i in one.supports)
    assert tests.ways(4, 3) == tests.ways(4, 3) != tests.ways(4, 3, seed=4)
