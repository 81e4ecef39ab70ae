"""Photographs that change, come or go after an extraction."""

import os
import shutil

import fsspec
import numpy as np
import pytest
from PIL import Image

from feature_store import FeatureStore, Fingerprint, Row, ShardWriter, StoreError, create, extend
from feature_store.layout import num_shards, shard_rows
from fsdino.data.photographs import file_stamps, same_file
from pipelines import extraction
from pipelines.recipes import Extraction
from tests.conftest import run

PRINT = Fingerprint("late", "m", "w", "l", "none", 28, 2, 4, view_seed=0, preprocessing="p")


def rows(count, first=0):
    return [Row(f"{i}", 0, f"/photos/{i}.jpg") for i in range(first, first + count)]


def value(row):
    return np.full((2, 2, 4), float(row.sample_id), np.float16)


def fill(writer):
    for shard in writer.missing():
        inside = shard_rows(shard, len(writer.rows))
        members = writer.rows[inside.start : inside.stop]
        writer.write(shard, np.stack([value(row) for row in members]), [(1, 1)] * len(members))
    writer.seal()


@pytest.mark.parametrize("there", [5, 32, 70])
@pytest.mark.parametrize("more", [1, 40])
def test_added_rows_go_behind_the_others_and_full_shards_stay_done(tmp_path, there, more):
    url = str(tmp_path / "store")
    fill(create(url, PRINT, rows(there)))
    wanted = rows(there + more)[::-1]  # the order of a list that grew may be another
    with pytest.raises(StoreError, match="holds a store of other images"):
        create(url, PRINT, wanted)
    full = [tmp_path / "store" / "c" / str(shard) / "0" / "0" / "0" for shard in range(there // 32)]
    written = [path.stat().st_mtime_ns for path in full]
    grown = extend(create(url, PRINT, wanted, grown=True), wanted)
    assert grown.rows[:there] == rows(there) and {r.sample_id for r in grown.rows} == {r.sample_id for r in wanted}
    assert grown.missing() == list(range(there // 32, num_shards(there + more)))
    fill(grown)
    store = FeatureStore(url)
    assert len(store) == there + more
    for number, row in enumerate(store.samples):
        assert (store.read([number])[0] == value(row)).all()
    assert [path.stat().st_mtime_ns for path in full] == written
    with pytest.raises(StoreError, match="holds a store of other images"):
        create(url, PRINT, rows(50, first=1000), grown=True)


def test_an_extension_that_is_killed_at_any_file_can_be_done_again(tmp_path, monkeypatch):
    for stop in range(1, 7):
        url = str(tmp_path / f"store{stop}")
        fill(create(url, PRINT, rows(70)))
        writer = create(url, PRINT, rows(80), grown=True)
        left = [stop]
        for name in ("write", "delete"):
            real = getattr(type(writer.folder), name)

            def counted(self, *arguments, real=real, left=left):
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return real(self, *arguments)

            monkeypatch.setattr(type(writer.folder), name, counted)
        with pytest.raises(KeyboardInterrupt):
            extend(writer, rows(80))
        monkeypatch.undo()
        again = extend(create(url, PRINT, rows(80), grown=True), rows(80))
        assert again.missing() == [2]
        fill(again)
        assert [s.sample_id for s in FeatureStore(url).samples] == [str(i) for i in range(80)]


def test_stamps_tell_changed_files_from_copies(tmp_path, s3_endpoint):
    one, other = tmp_path / "a.jpg", tmp_path / "b.jpg"
    one.write_bytes(b"12345")
    shutil.copy(one, other)
    os.utime(other, (1, 1))
    stamps = file_stamps([str(one), str(other), str(tmp_path / "none.jpg")])
    assert stamps[str(tmp_path / "none.jpg")] == ""
    assert not same_file(stamps[str(one)], stamps[str(other)])
    assert same_file(stamps[str(one)], stamps[str(other)], moved=True) and same_file("", stamps[str(one)])
    assert not same_file(stamps[str(one)], "6 1", moved=True)
    url = "s3://features/stamps/a.jpg"
    fsspec.filesystem("s3").pipe_file(url, b"12345")
    before = file_stamps([url])[url]
    assert before.startswith("5 ") and same_file(before, stamps[str(one)], moved=True)
    fsspec.filesystem("s3").pipe_file(url, b"54321")
    fsspec.filesystem("s3").invalidate_cache()
    assert not same_file(before, file_stamps([url])[url])


def photograph(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.mark.slow
def test_changed_photographs_are_named_and_refreshed_and_new_ones_added(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        photograph(folder / f"{i:02d}.png", i)
    where = ["--recipe", "tiny", "--data", tmp_path, "--images", folder, "--store", tmp_path / "stores"]
    where += ["--features", "late", "--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    (url,) = run("extract_features", *where)["stores"]
    first = FeatureStore(url).read(range(40))
    photograph(folder / "35.png", 99)
    again = run("extract_features", *where)
    assert (again["computed"], again["changed"]) == (0, 1)
    assert "1 images have changed since they were extracted (the first: 35.png); --refresh" in capsys.readouterr().err
    again = run("extract_features", *where, "--refresh")
    assert (again["computed"], again["changed"]) == (8, 0)  # its shard
    refreshed = FeatureStore(url).read(range(40))
    same = [bool((a == b).all()) for a, b in zip(first, refreshed, strict=True)]
    assert same == [i != 35 for i in range(40)]
    assert run("extract_features", *where)["changed"] == 0
    for i in range(40, 45):
        photograph(folder / f"{i:02d}.png", i)
    photograph(folder / "00a.png", 77)  # in the middle of the list
    assert run("extract_features", *where)["computed"] == 8 + 6
    store = FeatureStore(url)
    assert len(store) == 46 and np.array_equal(store.read(range(40)), refreshed)
    (folder / "03.png").unlink()
    gone = run("extract_features", *where)
    assert (gone["computed"], gone["changed"], len(ShardWriter(url).rows)) == (0, 0, 46)


def test_a_changed_photograph_is_computed_again_in_every_shard_that_has_a_view_of_it(tmp_path):
    views = [Row(f"{image}", view, f"/photos/{image}.jpg") for image in range(20) for view in range(3)]
    writer = create(str(tmp_path / "store"), PRINT, views)
    for shard in (0, 1):
        members = writer.rows[shard * 32 : shard * 32 + 32]
        stamps = [f"1 {row.sample_id}" for row in members]
        writer.write(shard, np.zeros((len(members), 2, 2, 4)), [(1, 1)] * len(members), stamps=stamps)
    now = {row[:2]: f"1 {row.sample_id}" for row in views} | {("10", view): "1 other" for view in range(3)}
    assert extraction.changed_rows(writer, views, now) == {"10": {0, 1}}
    assert extraction.changed_rows(writer, views, {}) == {}


def test_another_set_under_the_same_name_is_refused(tmp_path):
    writer = create(str(tmp_path / "store"), PRINT, rows(10))
    two = {str(i): {0} for i in range(2)}
    extraction.check_same_set(writer, two, rows(10), Extraction())
    most = {str(i): {0} for i in range(7)}
    extraction.check_same_set(writer, most, rows(10), Extraction(refresh=True))
    with pytest.raises(StoreError, match="7 of 10 photographs are others than those that were extracted"):
        extraction.check_same_set(writer, most, rows(12), Extraction())
