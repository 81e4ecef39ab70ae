"""Data sets in their publishers' layouts, on small files that are laid out alike."""

import shutil

import fsspec
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fsdino.data.dataset import open_dataset
from fsdino.data.episodes import EpisodeSampler
from fsdino.data.inspection import inspect
from fsdino.data.protocols import HDMNET, HSNET
from fsdino.errors import UserError
from tests.conftest import FOLD, flags, run


def photograph(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)


def mask(path, values, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, np.uint8))
    if palette:
        image = image.convert("P")
        image.putdata(np.array(values).ravel().tolist())
        image.putpalette([c for i in range(256) for c in (i * 37 % 256, i * 91 % 256, i * 53 % 256)])
    image.save(path)


def disc(size=(30, 40), value=1, top=5):
    found = np.zeros(size, int)
    found[top : top + 10, 10:25] = value
    return found


# ---- VOC and SBD


@pytest.fixture
def voc_and_sbd(tmp_path):
    """VOC's own release beside SBD's, with the published number of names in the lists and three images at hand."""
    voc, sbd = tmp_path / "VOCdevkit" / "VOC2012", tmp_path / "benchmark_RELEASE" / "dataset"
    of_voc = [f"2007_{i:06d}" for i in range(1464)]
    val = [f"2008_{i:06d}" for i in range(1449)]
    of_sbd = [*(f"2009_{i:06d}" for i in range(4489)), *of_voc[:500], *val[:1000]]
    lists = voc / "ImageSets" / "Segmentation"
    for path, names in ((lists / "train.txt", of_voc), (lists / "val.txt", val), (sbd / "train.txt", of_sbd)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names))
    (sbd / "cls").mkdir()
    both = disc(value=7)
    mask(voc / "SegmentationClass" / f"{of_voc[0]}.png", disc(value=3))
    for name in (of_voc[0], of_sbd[0]):
        photograph(voc / "JPEGImages" / f"{name}.jpg")
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": both.astype(np.uint8), "CategoriesPresent": 7}})
    return voc, sbd


def test_the_5953_training_images_come_of_both_releases(voc_and_sbd):
    voc, _ = voc_and_sbd
    dataset = open_dataset(str(voc))
    train = dataset.ids("train")
    assert len(train) == len(set(train)) == 5953 and dataset.name == "pascal-5i" and train == sorted(train)
    assert not set(train) & set(dataset.ids("val"))


def test_a_list_of_another_length_is_refused_unless_it_is_ones_own(voc_and_sbd):
    voc, sbd = voc_and_sbd
    (sbd / "train.txt").write_text("2009_000000\n")
    with pytest.raises(UserError, match=r"expected 5953 training images .* got 1465; check train.txt and val.txt"):
        open_dataset(str(voc)).ids("train")
    (voc / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("JPEGImages/2009_000000.jpg x/2009_000000.png\n")
    with pytest.raises(UserError, match="expected a label in SegmentationClassAug"):
        open_dataset(str(voc)).ids("train")
    (voc / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("2009_000000\n")
    assert open_dataset(str(voc)).ids("train") == ["2009_000000"]


def test_vocs_labels_are_preferred_and_sbds_are_read_as_published(voc_and_sbd):
    dataset = open_dataset(str(voc_and_sbd[0]))
    assert dataset.label("2007_000000").max() == 3  # SBD has 7 there
    assert np.array_equal(dataset.label("2009_000000"), disc(value=7))
    assert dataset.label_source("2009_000000").endswith("benchmark_RELEASE/dataset/cls/2009_000000.mat")


def test_a_damaged_matlab_file_is_named(voc_and_sbd):
    voc, sbd = voc_and_sbd
    (sbd / "cls" / "2009_000000.mat").write_bytes(b"MATLAB 5.0 MAT-file, but then nothing")
    with pytest.raises(UserError, match=r"2009_000000.mat: expected SBD's label \(a MATLAB file with GTcls"):
        open_dataset(str(voc)).label("2009_000000")
    savemat(sbd / "cls" / "2009_000000.mat", {"GTinst": 1})
    with pytest.raises(UserError, match=r"2009_000000.mat: expected SBD's label"):
        open_dataset(str(voc)).label("2009_000000")


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-9] + b"x" * 9]
)
def test_any_damage_of_a_matlab_file_is_the_files(voc_and_sbd, damage):
    voc, sbd = voc_and_sbd
    path = sbd / "cls" / "2009_000000.mat"
    savemat(path, {"GTcls": {"Segmentation": disc(value=7).astype(np.uint8)}}, do_compression=True)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"2009_000000.mat: expected SBD's label"):
        open_dataset(str(voc)).label("2009_000000")


def test_vocs_own_labels_alone_can_be_tested(voc_and_sbd):
    voc, sbd = voc_and_sbd
    shutil.rmtree(sbd)
    dataset = open_dataset(str(voc))
    assert np.array_equal(dataset.label("2007_000000"), disc(value=3))
    with pytest.raises(UserError, match=r"train_aug.txt: expected a list of images, found none; .* SBD"):
        dataset.ids("train")


# ---- FSS-1000


@pytest.fixture
def fss(tmp_path):
    root = tmp_path / "fewshot_data"
    for number, name in enumerate(["abe's_flyingfish", "ab_wheel", "zebra", "yoyo"]):
        for i in range(1, 11):
            photograph(root / name / f"{i}.jpg")
            soft = (
                disc(value=128, top=3 + number) + (disc(value=127, top=3 + number) == 0) * 127
            )  # 255 inside, 127 outside
            Image.fromarray(soft.astype(np.uint8)).convert("RGB").save(root / name / f"{i}.png")
    (tmp_path / "fss_test_set.txt").write_text("zebra\r\nab_wheel\r\n")
    return root


def test_fss_1000_is_one_split_whose_images_are_each_a_query_once(fss):
    dataset = open_dataset(str(fss))
    assert (dataset.name, dataset.kind, len(dataset.folds)) == ("fss-1000", "fss1000", 1)
    names = {dataset.class_names[c - 1] for c in dataset.novel(0)}
    assert names == {"zebra", "ab_wheel"} and len(dataset.folds.base(0)) == 2
    for protocol in (HDMNET, HSNET):
        rules = protocol.of(dataset)
        images = rules.test_images(dataset, 0)
        sampler = EpisodeSampler(images, shots=1, fold=0, seed=0, training=False, order=rules.order)
        drawn = [sampler.episode(i) for i in range(rules.episodes)]
        assert rules.episodes == 20 and len({e.query for e in drawn}) == 20
        assert all(e.query.split("/")[0] == e.supports[0].split("/")[0] and e.query != e.supports[0] for e in drawn)
    assert [i.split("/")[1] for i in dataset.ids("val")[:10]] == ["1", "10", *"23456789"]
    assert len(dataset.ids("train")) == 20 and HDMNET.training_images(dataset, 0)


def test_a_mask_of_fss_1000_is_cut_at_128_and_shows_its_own_class_alone(fss):
    dataset = open_dataset(str(fss))
    zebra = dataset.class_names.index("zebra") + 1
    assert np.array_equal(dataset.mask("zebra/3", zebra), disc(top=5))
    assert not dataset.mask("zebra/3", zebra % 4 + 1).any()
    assert dataset.summary("zebra/3") == ((40, 30), {zebra: 150}, {})


def test_a_listed_class_without_a_folder_is_named(fss):
    (fss / "fss_test_set.txt").write_text("zebra\nunicorn\n")
    with pytest.raises(UserError, match=r"expected a folder for each class of its lists .* found none for unicorn"):
        open_dataset(str(fss))


# ---- DAVIS


@pytest.fixture
def davis(tmp_path):
    for video, frames in (("swan", 4), ("two-dogs", 3)):
        for i in range(frames):
            photograph(tmp_path / "JPEGImages" / "480p" / video / f"{i:05d}.jpg")
            values = disc(value=1) + disc(value=2, top=17) * (video == "two-dogs")
            mask(tmp_path / "Annotations" / "480p" / video / f"{i:05d}.png", values, palette=True)
    for year in ("2016", "2017"):
        path = tmp_path / "ImageSets" / year / "val.txt"
        path.parent.mkdir(parents=True)
        path.write_text("two-dogs\nswan\n" if year == "2017" else "swan\n")
    return tmp_path


def test_davis_2017_has_a_class_for_each_object_of_its_videos(davis):
    dataset = open_dataset(str(davis), "davis2017")
    assert dataset.name == "davis-2017" and dataset.class_names == ["two-dogs/1", "two-dogs/2", "swan/1"]
    dogs, swan = dataset.videos
    assert (dogs.name, len(dogs.frames), dogs.objects) == ("two-dogs", 3, (1, 2)) and swan.objects == (3,)
    assert np.array_equal(dataset.mask("two-dogs/00001", 2), disc(top=17))
    assert not dataset.mask("two-dogs/00001", 3).any()
    assert dataset.summary("two-dogs/00001").pixels == {1: 150, 2: 150}
    assert inspect(dataset).problems == []


def test_davis_2016_has_one_object_a_video_whatever_its_value(davis):
    first = davis / "Annotations" / "480p" / "swan" / "00000.png"
    Image.fromarray((disc() * 255).astype(np.uint8)).save(first)
    dataset = open_dataset(str(davis), "davis2016")
    assert dataset.class_names == ["swan"] and np.array_equal(dataset.mask("swan/00000", 1), disc())


def test_the_lists_of_davis_2016s_own_release_name_frames(davis):
    (davis / "ImageSets" / "2016" / "val.txt").unlink()
    lists = davis / "ImageSets" / "480p"
    lists.mkdir()
    lines = [f"/JPEGImages/480p/swan/{i:05d}.jpg /Annotations/480p/swan/{i:05d}.png" for i in range(4)]
    (lists / "val.txt").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    assert [v.name for v in open_dataset(str(davis), "davis2016").videos] == ["swan"]


def test_frames_come_in_the_order_of_their_numbers_and_a_short_list_of_them_is_refused(davis):
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        place = davis / folder / "480p" / "swan"
        for path in sorted(place.iterdir()):
            path.rename(place / f"{int(path.stem) * 4}.{suffix}")
    dataset = open_dataset(str(davis), "davis2016")
    assert dataset.videos[0].frames == ("swan/0", "swan/4", "swan/8", "swan/12")
    dataset.lists["val"] = ["swan/0", "swan/4"]
    with pytest.raises(UserError, match="video swan: expected three frames or more"):
        _ = dataset.videos


def test_an_object_that_comes_later_is_not_scored_and_told(davis):
    path = davis / "Annotations" / "480p" / "swan" / "00002.png"
    mask(path, disc(value=1) + disc(value=3, top=17), palette=True)
    dataset = open_dataset(str(davis), "davis2017")
    assert dataset.class_names == ["two-dogs/1", "two-dogs/2", "swan/1"]
    assert dataset.notes() == [f"{path}: object 3 is not in the first frame: not scored"]


def test_a_video_without_frames_or_without_an_object_is_named(davis):
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(davis / "Annotations" / "480p" / "swan" / "00000.png")
    with pytest.raises(UserError, match=r"swan/00000.png: expected an object in the first frame"):
        open_dataset(str(davis), "davis2017")
    (davis / "ImageSets" / "2017" / "val.txt").write_text("swan\nhorse\n")
    with pytest.raises(UserError, match=r"video horse: expected frames in .*horse, found none"):
        open_dataset(str(davis), "davis2017")


# ---- one's own


@pytest.fixture
def own(tmp_path):
    """Eight images of two sizes, without masks."""
    root = tmp_path / "nuts"
    for i in range(8):
        photograph(root / "images" / ("deep/" if i > 5 else "") / f"n{i}.png")
    return root


IDS = [f"{'deep/' if i > 5 else ''}n{i}" for i in range(8)]


def numbered(root):
    for i, image_id in enumerate(IDS):
        mask(root / "masks" / f"{image_id}.png", disc(value=1 + i % 2) + disc(value=255, top=18))
    (root / "classes.txt").write_text("hazel\nwal\n")
    (root / "folds.txt").write_text("hazel\nwal\n")


def by_class(root):
    for i, image_id in enumerate(IDS):
        mask(root / "masks" / ("hazel" if i % 2 == 0 else "wal") / f"{image_id}.png", disc(value=255))
    mask(root / "masks" / "wal" / "n0.png", disc(value=255, top=8))  # it overlaps the hazel
    mask(root / "masks" / "wal" / "n2.png", disc() * 0)
    (root / "folds.txt").write_text("wal\nhazel\n")


def test_a_folder_of_numbered_masks(own):
    numbered(own)
    dataset = open_dataset(str(own))
    assert (dataset.name, dataset.kind, dataset.class_names) == ("nuts", "folder", ["hazel", "wal"])
    assert sorted([*dataset.ids("train"), *dataset.ids("val")]) == sorted(IDS) and dataset.ids("val")
    assert dataset.novel(1) == [2] and dataset.folds.base(1) == [1]
    assert dataset.image("deep/n6").size == (40, 30) and dataset.summary("deep/n7").pixels == {2: 150}
    assert set(np.unique(dataset.mask("n1", 2))) == {0, 1, 255}


def test_a_folder_of_masks_by_class_which_may_overlap(own):
    by_class(own)
    dataset = open_dataset(str(own))
    assert dataset.class_names == ["hazel", "wal"] and dataset.novel(0) == [2]
    assert dataset.summary("n0").pixels == {1: 150, 2: 150} and dataset.summary("n2").pixels == {1: 150}
    assert np.array_equal(dataset.mask("n0", 2), disc(top=8)) and np.array_equal(dataset.mask("n0", 1), disc())
    assert not dataset.mask("n1", 1).any() and dataset.mask("n1", 1).shape == (30, 40)


def test_links_to_folders_are_followed_once_and_one_that_leads_nowhere_is_named(own):
    by_class(own)
    (own / "images" / "deep").rename(own.parent / "elsewhere")
    (own / "images" / "deep").symlink_to(own.parent / "elsewhere")
    (own.parent / "elsewhere" / "back").symlink_to(own / "images")
    dataset = open_dataset(str(own))
    assert sorted([*dataset.ids("train"), *dataset.ids("val")]) == sorted(IDS)
    (own / "masks" / "wal" / "n4.png").symlink_to(own / "nowhere.png")
    with pytest.raises(UserError, match=r"wal/n4\.png: expected"):
        open_dataset(str(own)).summary("n4")


def test_what_programs_leave_in_a_folder_is_no_class(own):
    by_class(own)
    (own / "masks" / ".ipynb_checkpoints").mkdir()
    (own / "masks" / ".DS_Store").write_bytes(b"x")
    assert open_dataset(str(own)).class_names == ["hazel", "wal"]


def test_masks_that_change_or_are_added_are_seen_and_those_of_no_photograph_told(own):
    by_class(own)
    before = open_dataset(str(own)).class_pixels("val") | open_dataset(str(own)).class_pixels("train")
    mask(own / "masks" / "wal" / "n1.png", disc(value=255, top=2) | disc(value=255, top=15))
    mask(own / "masks" / "wal" / "n4.png", disc(value=255))
    mask(own / "masks" / "wal" / "ghost.png", disc(value=255))
    dataset = open_dataset(str(own))
    after = dataset.class_pixels("val") | dataset.class_pixels("train")
    assert before["n1"] == {2: 150} and after["n1"] == {2: 300}
    assert before["n4"] == {1: 150} and after["n4"] == {1: 150, 2: 150}
    assert dataset.notes() == [f"{own}/masks: 1 masks are of no photograph in images (the first: ['ghost'])"]
    photograph(own / "images" / "n1.jpg")
    with pytest.raises(UserError, match=r"images: expected one photograph for each name, got n1"):
        open_dataset(str(own))


def test_a_folder_with_cocos_json(own):
    from tests.test_coco import annotation, box, write

    images = [(i, f"{image_id}.png", 40, 30) for i, image_id in enumerate(IDS)]
    categories = [{"id": 4, "name": "hazel"}, {"id": 9, "name": "wal"}]
    marks = [annotation(i, box(10, 5, 15, 10), category=4 if i % 2 else 9, image=i) for i in range(8)]
    write(own / "annotations" / "nuts.json", marks, images, categories)
    (own / "folds.txt").write_text("wal\nhazel\n")
    dataset = open_dataset(str(own))
    assert dataset.class_names == ["hazel", "wal"] and dataset.class_pixels("val")
    assert np.array_equal(dataset.mask("deep/n7", 1), disc())
    (own / "images" / "n3.png").unlink()
    found = "\n".join(inspect(open_dataset(str(own))).problems)
    assert "images/n3.jpg: expected an image file, found nothing there" in found


def test_lists_of_ones_own_split_a_folder(own):
    numbered(own)
    (own / "train.txt").write_text("images/n0.png masks/n0.png\nimages/deep/n6.png masks/deep/n6.png\n")
    with pytest.raises(UserError, match=r"expected train.txt and val.txt, or neither, found one"):
        open_dataset(str(own)).ids("val")
    (own / "val.txt").write_text("n1\nn2\n")
    dataset = open_dataset(str(own))
    assert dataset.ids("train") == ["n0", "deep/n6"] and dataset.ids("val") == ["n1", "n2"]


def test_a_folder_without_names_for_its_numbers_is_refused(own):
    numbered(own)
    (own / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"nuts: expected classes.txt with the classes' names"):
        open_dataset(str(own))


def test_four_blocks_that_leave_a_class_out_ask_for_folds(own):
    numbered(own)
    (own / "folds.txt").unlink()
    with pytest.raises(UserError, match=r"2 classes in 4 folds: .* or write the folds into folds.txt"):
        _ = open_dataset(str(own)).folds


def test_an_inspection_of_a_folder_lists_masks_of_other_sizes_and_colours(own):
    by_class(own)
    mask(own / "masks" / "hazel" / "n0.png", disc((10, 12), 255))
    colours = Image.new("RGB", (40, 30), (200, 10, 10))
    colours.paste((10, 200, 10), (0, 0, 20, 15))
    colours.paste((10, 10, 250), (20, 15, 40, 30))
    colours.save(own / "masks" / "wal" / "n1.png")
    Image.new("RGB", (40, 30)).save(own / "images" / "n4.png")
    (own / "masks" / "hazel" / "n4.png").write_bytes(b"no picture")
    report = inspect(open_dataset(str(own)))
    found = "\n".join(report.problems)
    assert "hazel/n0.png: expected masks of one size for its image" in found
    assert (
        "hazel/n4.png: expected a readable image" in found
        and "wal/n1.png: expected a mask of one object, got 3 colours" in found
        and len(report.problems) == 3
    )


@pytest.mark.parametrize("layout", [numbered, by_class])
def test_a_folder_in_a_bucket_is_the_same_data_set(own, s3_endpoint, layout):
    layout(own)
    place = f"features/{layout.__name__}/nuts"
    fsspec.filesystem("s3").put(str(own), place, recursive=True)
    here, there = open_dataset(str(own)), open_dataset(f"s3://{place}")
    assert there.name == here.name and there.ids("train") == here.ids("train")
    assert there.class_pixels("val") == here.class_pixels("val") and there.folds == here.folds


def test_bad_labels_stop_a_command_or_are_left_out_and_named(places, shapes_root, tmp_path, capsys):
    """A mask of another size, colours, a damaged file, and a class without images."""
    root = shutil.copytree(shapes_root, tmp_path / "broken")
    labels = root / "SegmentationClassAug"
    names = (root / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    classes = (root / "classes.txt").read_text().split()
    dataset = open_dataset(str(root))
    first, second, third = list(HDMNET.test_images(dataset, FOLD))[:3]
    (labels / f"{first}.png").write_bytes(b"no picture")
    Image.new("RGB", (224, 224), (17, 3, 99)).save(labels / f"{second}.png")
    Image.open(labels / f"{third}.png").resize((220, 224), 0).save(labels / f"{third}.png")
    here = {**places, "--data": root, "--store": tmp_path / "stores", "--out": tmp_path / "runs"}
    run("extract_features", *flags(here), "--features", "late", "--splits", "val")
    scoring = ["evaluate", *flags(here), "--fold", FOLD, "--method", "prototype"]
    with pytest.raises(UserError, match=rf"({first}|{second}).png: expected"):
        run(*scoring)
    score = run(*scoring, "--skip-bad")
    said = capsys.readouterr().err
    for name in (first, second, third):
        assert f"{name}.png: " in said
    assert score["left_out"]["bad_labels"] == 3 and score["episodes"] == 20
    for name in names:  # and then no image of one class at all
        label = np.array(Image.open(labels / f"{name}.png")) if name != first else np.zeros((224, 224), np.uint8)
        if label.ndim == 2:
            Image.fromarray(np.where(label == 5, 0, label).astype(np.uint8)).save(labels / f"{name}.png")
    missing = classes[4]
    with pytest.raises(UserError, match=f"expected test images of every class, got none for {missing}"):
        run(*scoring[:-2], "--method", "nearest", "--test-list", good_list(tmp_path, names, (first, second, third)))
    score = run(*scoring, "--skip-bad")
    assert f"skipped: class {missing}: no usable image shows it" in capsys.readouterr().err
    assert missing not in score["per_class"] and len(score["per_class"]) == 2


def good_list(folder, names, bad):
    path = folder / "good.txt"
    path.write_text("\n".join(f"SegmentationClassAug/{n}.png" for n in names if n not in bad))
    return path
