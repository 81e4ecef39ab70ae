"""Videos as photographs one after another, and back: frames are called FILE#NUMBER, from 0 on. Needs PyAV (the extra
`video`)."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fsdino.errors import UserError, first_line

SUFFIXES = frozenset(".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg".split())
FRAME_RATE = Fraction(10)
"""Frames a second of a video that is made of single photographs."""


def is_video(path: str) -> bool:
    """Whether a path's name is a video's."""
    return Path(path).suffix.lower() in SUFFIXES


def is_frame(name: str) -> bool:
    """Whether a name is a frame's."""
    path, sign, number = name.rpartition("#")
    return bool(sign) and number.isdecimal() and is_video(path)


def frames(path: str) -> list[str]:
    """What a video's frames are called. Raises UserError if it cannot be read to its end."""
    return [f"{path}#{number:06d}" for number, _ in enumerate(_decoded(path))]


class Reader:
    """Reads frames by their names; in their order, none is decoded twice."""

    def __init__(self) -> None:
        self._path, self._next = "", 0
        self._frames: Iterator[Any] = iter(())

    def read(self, name: str) -> Image.Image | None:
        """The frame of that name as RGB; None if it is no frame's."""
        if not is_frame(name):
            return None
        path, _, number = name.rpartition("#")
        if path != self._path or int(number) < self._next:
            self._path, self._next, self._frames = path, 0, _decoded(path)
        for frame in self._frames:
            self._next += 1
            if self._next > int(number):
                return frame.to_image().rotate(frame.rotation, expand=True)
        raise UserError(f"{name}: expected a frame, but the video has only {self._next}")


def rate(path: str) -> Fraction:
    """A video's frames a second."""
    with _av().open(path) as container:
        return container.streams.video[0].average_rate or FRAME_RATE


class Film:
    """A video file that takes one picture after another, each scaled to the first one's size."""

    def __init__(self, path: Path, frame_rate: Fraction):
        self._container = _av().open(str(path), "w")
        self._stream = self._container.add_stream("libx264", frame_rate, options={"crf": "20"})
        self._stream.pix_fmt = "yuv420p"
        self._size: tuple[int, int] | None = None

    def add(self, picture: Image.Image) -> None:
        """The next picture."""
        if self._size is None:
            self._size = max(2, picture.width // 2 * 2), max(2, picture.height // 2 * 2)  # the codec halves the colours
            self._stream.width, self._stream.height = self._size
        frame = _av().VideoFrame.from_ndarray(np.asarray(picture.convert("RGB").resize(self._size)), "rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what is left."""
        if self._size is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()


def _decoded(path: str) -> Iterator[Any]:
    av = _av()
    broken = (av.error.FFmpegError, IndexError)  # looked up now, as a reader may be closed when Python ends
    if not Path(path).is_file():
        raise UserError(f"{path}: expected a video on this machine, found no file")
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise UserError(f"{path}: expected a video, got a file without pictures")
            yield from container.decode(video=0)
    except broken as error:
        raise UserError(f"{path}: expected a readable video, got: {first_line(error)}") from None


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise UserError("a video: expected PyAV, which is not installed; install fsdino[video]") from None
    return av
