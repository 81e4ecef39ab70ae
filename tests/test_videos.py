"""Videos in, videos out."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from fsdino.errors import UserError
from pipelines import videos
from tests.conftest import run

FRAMES, SIDE, STEP = 6, 96, 8


def frame(number):
    """An orange square that moves over a green ground, and its mask."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[30:62, 10 + STEP * number : 42 + STEP * number] = True
    return Image.fromarray(np.where(mask[..., None], (230, 120, 30), (60, 130, 50)).astype(np.uint8)), mask


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    film = videos.Film(path, Fraction(5))
    for number in range(FRAMES):
        film.add(frame(number)[0])
    film.close()
    return path


def test_frames_come_back_in_any_order(clip):
    names, reader = videos.frames(str(clip)), videos.Reader()
    assert len(names) == FRAMES and names[3].endswith("clip.mp4#000003") and videos.rate(str(clip)) == 5
    for number in (0, 1, 4, 2, 5):
        shown = np.asarray(reader.read(names[number])).astype(int)
        distances = [np.abs(shown - np.asarray(frame(n)[0]).astype(int)).mean() for n in range(FRAMES)]
        assert int(np.argmin(distances)) == number and distances[number] < 2, "a film loses a little"
    assert reader.read("photo.jpg") is None


def test_frames_in_their_order_are_decoded_once(clip, monkeypatch):
    decoded, begun = videos._decoded, []
    monkeypatch.setattr(videos, "_decoded", lambda path: begun.append(path) or decoded(path))
    reader = videos.Reader()
    for number in range(FRAMES):
        reader.read(f"{clip}#{number:06d}")
    assert begun == [str(clip)]


def test_what_is_no_video_is_refused(tmp_path, clip):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:300])
    for path, said in ((broken, "readable video"), (tmp_path / "none.mp4", "found no file")):
        with pytest.raises(UserError, match=said):
            videos.frames(str(path))
    with pytest.raises(UserError, match="has only 6"):
        videos.Reader().read(f"{clip}#000099")


def test_the_first_frame_shows_what_to_find_in_the_others(clip, tmp_path):
    Image.fromarray(frame(0)[1].astype(np.uint8) * 255).save(tmp_path / "first.png")
    out = tmp_path / "out"
    run("predict", "--query", clip, "--first", tmp_path / "first.png", "--format", "mask", "video", "--out", out)
    overlaps = []
    for number in range(FRAMES):
        found, truth = np.asarray(Image.open(out / f"clip_{number:06d}.png")) > 0, frame(number)[1]
        overlaps.append((found & truth).sum() / (found | truth).sum())
    assert min(overlaps) > 0.5
    assert len(videos.frames(str(out / "film.mp4"))) == FRAMES and videos.rate(str(out / "film.mp4")) == 5


def test_a_folder_of_frames_is_a_video_too(tmp_path):
    (tmp_path / "frames").mkdir()
    for number in range(2):
        frame(number)[0].save(tmp_path / "frames" / f"{number}.png")
    Image.fromarray(frame(0)[1].astype(np.uint8) * 255).save(tmp_path / "first.png")
    run("predict", "--query", tmp_path / "frames", "--first", tmp_path / "first.png", "--out", tmp_path / "out")
    for number in range(2):
        found, truth = np.asarray(Image.open(tmp_path / "out" / f"{number}.png")) > 0, frame(number)[1]
        assert (found & truth).sum() / (found | truth).sum() > 0.5
    with pytest.raises(UserError, match="only example"):
        run("predict", "--query", tmp_path / "frames", "--first", "a.png", "--support", "b.png")
