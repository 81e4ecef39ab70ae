"""What an extraction plans and does, without a cluster."""

import pickle

import numpy as np
import pytest
from PIL import Image

from feature_store import Fingerprint, Row, create
from feature_store.layout import num_shards, shard_rows
from fsdino.data.views import draw_view
from fsdino.errors import UserError
from fsdino.preprocess import resize_square
from pipelines import extraction, stages
from pipelines.recipes import Extraction


def target(feature, res_px, rows):
    fingerprint = Fingerprint(feature, "m", "w", "l", "none", res_px, 2, 4, view_seed=0, preprocessing="p")
    return extraction.Target(f"{feature}@{res_px}", fingerprint, rows)


def rows_of(images, views):
    return [Row(f"i{image}", view, f"i{image}.jpg") for image in range(images) for view in range(views)]


@pytest.mark.parametrize(("images", "views"), [(1, 1), (31, 8), (100, 8), (70, 3), (64, 1)])
def test_every_missing_shard_is_planned_once_and_images_are_seldom_decoded_twice(images, views):
    fine, coarse = rows_of(images, views), rows_of(images, 1)
    targets = [target("early", 70, fine), target("late", 70, fine), target("early", 28, coarse)]
    missing = {t.url: range(num_shards(len(t.rows))) for t in targets}
    items = extraction.plan_items(targets, missing, {})
    planned = sorted((url, unit.shard) for item in items for unit in item.units for url in unit.urls)
    assert planned == sorted((t.url, shard) for t in targets for shard in missing[t.url])
    for unit in (unit for item in items for unit in item.units):
        rows = coarse if unit.res_px == 28 else fine
        assert unit.rows == tuple(rows[i] for i in shard_rows(unit.shard, len(rows)))
        assert unit.features == (("early",) if unit.res_px == 28 else ("early", "late"))  # one forward for both
    decoded = sum(len({row.source for unit in item.units for row in unit.rows}) for item in items)
    assert decoded <= images + len(items) * (32 // views if views > 1 and 32 % views else 0)


def test_only_the_shards_that_a_store_lacks_are_planned():
    rows = rows_of(100, 1)
    targets = [target("early", 70, rows), target("late", 70, rows)]
    items = extraction.plan_items(targets, {"early@70": [2], "late@70": [0, 2]}, {})
    assert [(unit.shard, unit.urls) for item in items for unit in item.units] == [
        (0, ("late@70",)),
        (2, ("early@70", "late@70")),
    ]


def test_decoding_gives_each_view_at_each_size(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for image in range(3):
        path = tmp_path / f"{image}.png"
        Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(path)
        rows += [Row(str(image), view, str(path)) for view in range(2)]
    (tmp_path / "1.png").write_bytes(b"broken")
    units = [
        stages.Unit(0, 28, tuple(rows), ("a",), ("early",), ("",) * 6),
        stages.Unit(0, 14, tuple(rows[::2]), ("b",), ("early",), ("",) * 3),
    ]
    out = list(stages.Decode(7, "skip")({"item": pickle.loads(pickle.dumps(stages.Item(tuple(units))))}))
    for unit, got in zip(units, out, strict=True):
        same, bad, notes = got["outcome"].get()
        assert (
            same == unit
            and notes == []
            and list(bad) == [slot for slot, row in enumerate(unit.rows) if row.sample_id == "1"]
        )
        for slot, row in enumerate(unit.rows):
            if slot not in bad:
                view = draw_view(7, row.sample_id, row.view).image(Image.open(row.source))
                assert np.array_equal(got["pixels"][slot], resize_square(view, unit.res_px))
                assert got["sizes"][slot].tolist() == [40, 50]
    (row,) = stages.Decode(7, "fail")({"item": pickle.loads(pickle.dumps(stages.Item(tuple(units))))})
    with pytest.raises(UserError, match=r"1\.png: expected a readable image"):
        pickle.loads(pickle.dumps(row["outcome"])).get()


def test_more_bad_images_than_allowed_stop_the_job():
    settings = Extraction(max_bad_share=0.01)
    extraction.check_bad({"a": "x", "no longer listed": "y"}, ["a"], 100, settings)
    with pytest.raises(
        UserError, match=r"2 of 100 images cannot be read, more than --max-bad-share 0.01 \(the first: x\)"
    ):
        extraction.check_bad({"a": "x", "b": "y"}, ["a", "b"], 100, settings)


def test_a_repaired_image_is_read_again_and_a_bad_one_is_not(tmp_path):
    rows = [Row(str(i), 0, str(tmp_path / f"{i}.png")) for i in range(40)]
    fingerprint = Fingerprint("late", "m", "w", "l", "none", 28, 2, 4, view_seed=0, preprocessing="p")
    writer = create(str(tmp_path / "store"), fingerprint, rows)
    writer.write(0, np.zeros((32, 2, 2, 4)), [(1, 1)] * 32, {3: "not there"})
    writer.write(1, np.zeros((8, 2, 2, 4)), [(1, 1)] * 8, {1: "not there"})
    Image.new("RGB", (5, 5)).save(rows[33].source)
    assert extraction.known_bad(writer, rows, stages.Decode(0, "skip")) == {"3": "not there"}
    assert writer.missing() == [1]
