"""Classes of a user's own: photographs with masks, read and checked."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import fsspec

from feature_store.urls import is_url
from fsdino.data.masks import read_mask
from fsdino.errors import UserError, first_line, reachable
from fsdino.preprocess import read_image
from pipelines import geo, videos
from pipelines.checks import Location

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from fsdino.predictor import ClassEncoding, Predictor


FRAMES = videos.Reader()
MOST_CLASSES, MOST_LETTERS = 254, 100


class Examples(NamedTuple):
    """A class that is to be registered, or a file of one that is."""

    name: str
    supports: tuple[str, ...]
    masks: "list[np.ndarray]"
    file: str = ""

    def photographs(self) -> "list[Image.Image]":
        """Its supports, opened."""
        return [read_photograph(path) for path in self.supports]


def read_photograph(path: str) -> "Image.Image":
    """A photograph, a frame of a video, or a GeoTIFF of any bands, as RGB."""
    return FRAMES.read(path) or geo.read(path) or read_image(path)


def read_masks(supports: Sequence[str], masks: Sequence[str], value: int | None) -> "list[np.ndarray]":
    """Masks of photographs. Raises UserError, naming the flag, if there are none or one lacks the other."""
    if not supports:
        raise UserError("--support: expected at least one photograph, got none")
    if len(supports) != len(masks):
        raise UserError(f"--mask: expected one mask for each of the {len(supports)} supports, got {len(masks)}")
    sizes = [read_photograph(path).size for path in supports]
    return [read_mask(path, size, value) for path, size in zip(masks, sizes, strict=True)]


def read_classes(classes: Sequence[Sequence[str]], mask_value: int | None) -> list[Examples]:
    """What `--class` names: a class's name and PHOTOGRAPH=MASK of each support, or a file that `register` wrote.

    Raises UserError for what is neither.
    """
    found = []
    for entry in classes:
        if not entry:
            raise UserError("--class: expected a class file, or a name and PHOTOGRAPH=MASK, got nothing")
        name, *pairs = entry
        if not pairs:
            if is_url(name):
                file = fetched(Location().check("--class", name))
                found.append(Examples(name_of(file, name), (), [], file))
                continue
            found.append(Examples(name_of(name), (), [], name))
            continue
        if all(Path(part).is_file() for part in name.rpartition("=")[::2]):
            raise UserError(f"--class {name}: expected the class's name before PHOTOGRAPH=MASK")
        split = [pair.rpartition("=") for pair in pairs]
        for pair, (photograph, _, mask) in zip(pairs, split, strict=True):
            if not photograph or not mask:
                raise UserError(f"--class {name} {pair}: expected PHOTOGRAPH=MASK")
        supports, masks = tuple(photograph for photograph, _, _ in split), [mask for _, _, mask in split]
        found.append(Examples(name, supports, read_masks(supports, masks, mask_value)))
    return found


@functools.cache
def fetched(url: str) -> str:
    """A copy of a class file on this machine, for as long as the process lives. Raises UserError if there is none."""
    folder = tempfile.mkdtemp(prefix="fsdino-class-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / Path(url).name
    try:
        with reachable(f"--class {url}"), fsspec.open(url, "rb") as file:
            path.write_bytes(file.read())
    except FileNotFoundError:
        raise UserError(f"--class {url}: expected a class file, found nothing there; check the URL") from None
    return str(path)


def name_of(file: str, shown: str = "") -> str:
    """What the class of a class file is called, which messages call `shown`; ClassEncoding.load checks the rest. Raises
    UserError if it is none."""
    from safetensors import SafetensorError, safe_open

    if not Path(file).is_file():
        raise UserError(f"--class {file}: expected PHOTOGRAPH=MASK after the name, or a class file")
    try:
        with safe_open(file, "np") as opened:
            return json.loads((opened.metadata() or {})["class"])["name"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        line = f"--class {shown or file}: expected a class file, got another ({first_line(error)}); register it again"
        raise UserError(line) from None


def named_classes(classes: Sequence[Sequence[str]], mask_value: int | None) -> list[Examples]:
    """As `read_classes`; raises UserError as well for none, and for names that cannot be told apart."""
    wanted = read_classes(classes, mask_value)
    if not wanted:
        raise UserError("--class: expected at least one class, got none")
    check_names([one.name for one in wanted])
    return wanted


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for names of classes that make no files, or the same ones, or are too many for a label's byte."""
    known: dict[str, str] = {}
    for name in names:
        if not name.strip() or "\n" in name or len(name) > MOST_LETTERS:
            raise UserError(
                f"--class {name!r}: expected a name in one line of 1 to {MOST_LETTERS} letters; register it again"
            )
        if plain(name) in known:
            raise UserError(f"--class {name}: a class called {known[plain(name)]} is there already; name them apart")
        known[plain(name)] = name
    if len(names) > MOST_CLASSES:
        raise UserError(f"--class: expected at most {MOST_CLASSES} classes, got {len(names)}; look for them in parts")


def plain(name: str) -> str:
    """A class's name as part of a file's."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)


def registered(one: Examples, predictor: "Predictor") -> "ClassEncoding":
    """A class for the predictor: from its file, or from its examples."""
    from fsdino.predictor import ClassEncoding

    if one.file:
        return ClassEncoding.load(one.file)
    return predictor.register(one.photographs(), one.masks, one.name)
