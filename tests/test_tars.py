"""Photographs within tar archives, as SA-1B is published: read in place, a share of them the same in any form."""

import io
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from feature_store import FeatureStore
from fsdino import tars
from fsdino.data.photographs import file_stamps, list_photographs, set_name
from fsdino.errors import UserError
from fsdino.preprocess import read_image
from tests.conftest import run


def png(number):
    file = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def published(tmp_path):
    """Two tars of ten photographs with their JSON, one with ./ before its names, and the same files unpacked."""
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    packed.mkdir()
    unpacked.mkdir()
    for part in range(2):
        with tarfile.open(packed / f"sa_00000{part}.tar", "w") as tar:
            for number in range(part * 10, part * 10 + 10):
                for suffix, data in ((".jpg", png(number)), (".json", b"{}")):
                    entry = tarfile.TarInfo(("./" if part else "") + f"sa_{number}{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
                (unpacked / f"sa_{number}.jpg").write_bytes(png(number))
    return packed, unpacked


def test_photographs_in_tars_are_found_and_read_in_place(published):
    packed, unpacked = published
    found = list_photographs(str(packed))
    assert len(found) == 20 and found["sa_000001/sa_13.jpg"] == f"tar://sa_13.jpg::{packed}/sa_000001.tar"
    for image_id, source in found.items():
        plain = unpacked / image_id.rsplit("/", 1)[1]
        assert np.array_equal(read_image(source), read_image(str(plain)))
    assert list(list_photographs(str(packed / "sa_000000.tar"))) == [i for i in found if i.startswith("sa_000000")]
    loud = (packed / "sa_000000.tar").rename(packed / "LOUD.TAR")
    assert next(iter(list_photographs(str(loud)))) == "LOUD/sa_0.jpg"
    loud.rename(packed / "sa_000000.tar")
    stamps = file_stamps(list(found.values()))
    assert stamps[found["sa_000000/sa_3.jpg"]] == str(len(png(3)))


def test_a_share_is_the_same_photographs_packed_or_not_and_another_for_another_seed(published):
    def names(place, share, seed=0):
        return {image_id.rsplit("/", 1)[-1] for image_id in list_photographs(str(place), share, seed)}

    packed, unpacked = published
    assert names(packed, 0.25) == names(unpacked, 0.25) and len(names(packed, 0.25)) == 5
    assert names(packed, 0.25) < names(packed, 0.5) and names(packed, 0.25) != names(packed, 0.25, 1)
    assert len({set_name("/x"), set_name("/x", 0.5), set_name("/x", 0.5, 1)}) == 3


def test_a_truncated_tar_is_named_or_left_out(published):
    packed, _ = published
    whole = (packed / "sa_000001.tar").read_bytes()
    cut = packed / "sa_000002.tar"
    cut.write_bytes(whole[: whole.index(png(15)) + 20])
    with pytest.raises(UserError, match=r"sa_000002.tar: truncated or damaged behind ./sa_15.jpg"):
        list_photographs(str(packed))
    skipped = {}
    assert len(list_photographs(str(packed), skipped=skipped)) == 20 and list(skipped) == [str(cut)]
    for end in (whole.index(png(15)) - 512, whole.index(png(15)) - 500):  # between two members, and within a header
        cut.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"sa_000002.tar: truncated or damaged behind ./sa_14.json"):
            list_photographs(str(packed))
    cut.write_bytes(b"no archive at all")
    with pytest.raises(UserError, match=r"sa_000002.tar: expected a tar archive"):
        list_photographs(str(packed))
    cut.write_bytes(b"")
    with pytest.raises(UserError, match=r"sa_000002.tar: expected a tar archive"):
        list_photographs(str(packed))


def test_a_damaged_tar_alone_is_named_too(tmp_path):
    (tmp_path / "only.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"found none but damaged archives: .*only.tar: expected a tar archive"):
        list_photographs(str(tmp_path), skipped={})


def test_a_member_that_is_not_there_is_a_users_mistake(published):
    archive = published[0] / "sa_000000.tar"
    with pytest.raises(UserError, match=r"tar://sa_99.jpg::.*: expected an image file, found nothing there"):
        read_image(f"tar://sa_99.jpg::{archive}")
    with pytest.raises(UserError, match=r"tar://a.jpg::/nowhere.tar: expected an image file, found nothing there"):
        read_image("tar://a.jpg::/nowhere.tar")


def test_tars_in_a_bucket_are_read_by_ranges(published, s3_endpoint):
    packed, _ = published
    fsspec.filesystem("s3").put(str(packed), "features/sa1b", recursive=True)
    found = list_photographs("s3://features/sa1b")
    source = found["sa_000001/sa_13.jpg"]
    assert source == "tar://sa_13.jpg::s3://features/sa1b/sa_000001.tar"
    assert np.asarray(read_image(source))[0, 0, 0] == 13
    assert tars.members("s3://features/sa1b/sa_000001.tar")["sa_13.jpg"].size == len(png(13))


@pytest.mark.slow
def test_features_of_a_share_of_tars_are_extracted_and_damaged_tars_skipped(published, tmp_path):
    packed, _ = published
    (packed / "sa_000002.tar").write_bytes(b"no archive at all")
    arguments = ["--recipe", "tiny", "--store", tmp_path / "stores", "--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    arguments += ["--data", tmp_path, "--images", packed, "--share", 0.25, "--features", "early", "--res", 28]
    with pytest.raises(UserError, match=r"sa_000002.tar: expected a tar archive"):
        run("extract_features", *arguments)
    (url,) = run("extract_features", *arguments, "--skip-bad")["stores"]
    store = FeatureStore(url)
    assert {row.sample_id for row in store.samples} == set(list_photographs(str(packed), 0.25, skipped={}))
