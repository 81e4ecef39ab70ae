"""Lists of images and of classes, in the forms in which people have them."""

import re
import unicodedata
from collections.abc import Iterator, Sequence

from fsdino.errors import DataError
from fsdino.preprocess import SUFFIXES

Line = tuple[int, str]
FLAGS = re.compile(r"(\S.*?)\s+(-1|0|1)")
ABSENT = "-1"
MOST_CLASSES = 254
LABELS = "SegmentationClassAug"
FOLDERS = ("JPEGImages", LABELS)


def parse_ids(place: str, data: bytes, folders: Sequence[str] = FOLDERS, labels: str | None = LABELS) -> list[str]:
    """Ids of a list, in its order. One entry a line, all of one form: an id; a path to the image; a path to the image
    and one to its label; or an id and VOC's flag, where -1 means that the image is not in the list.

    `folders` hold images and labels: an id is what follows them. Labels are read from the folder `labels`, if given,
    and must be there. Ids may hold spaces; line ends, blank lines, byte-order marks and UTF-16 are understood. Raises
    DataError with the line's number for what is not, and for an id that comes twice.
    """
    lines = _lines(place, data)
    ids = _flagged(place, lines, folders)
    if ids is None:
        ids = _paired(place, lines, folders, labels)
    if ids is None:
        ids = _plain(place, lines)
    seen: dict[str, int] = {}
    for number, image_id in ids:
        if not image_id or {"", ".", ".."} & set(image_id.split("/")):
            raise DataError(f"{place}: line {number}: expected an id below the folder of images, got {image_id!r}")
        if image_id in seen:
            raise DataError(f"{place}: line {number}: {image_id} is in line {seen[image_id]} already; remove one")
        seen[image_id] = number
    if not seen:
        raise DataError(f"{place}: expected ids of images, one a line, got none")
    return list(seen)


def parse_classes(place: str, data: bytes, most: int = MOST_CLASSES) -> list[str]:
    """Names of classes, from class 1, one a line. Raises DataError with the line's number for a blank line between two
    names, or for a name that comes twice, and for more than `most` names."""
    lines = _lines(place, data)
    names: list[str] = []
    for position, (number, name) in enumerate(lines, start=1):
        if number != position:
            raise DataError(f"{place}: line {position}: expected the name of class {position}, got a blank line")
        if name in names:
            raise DataError(f"{place}: line {number}: {name} is the name of class {names.index(name) + 1} already")
        names.append(name)
    for number, name in lines:
        if name.strip("_").lower() in ("background", "ignore", "void", "unlabeled", "unlabelled"):
            raise DataError(f"{place}: line {number}: expected a class from 1 up, got {name}; leave it out")
        if name.startswith("#") or any(c in name for c in ',;"') or name.endswith(":"):
            raise DataError(f"{place}: line {number}: expected the name of a class and nothing else, got {name!r}")
    if names and all(re.match(r"\d+\W", name) for name in names):
        raise DataError(f"{place}: line {lines[0][0]}: expected names alone, numbered by their lines, got {names[0]!r}")
    if len(names) > most:
        raise DataError(f"{place}: expected at most {most} classes, as 255 is void, got {len(names)}")
    if not names:
        raise DataError(f"{place}: expected names of classes, one a line, got none")
    return names


def class_lists(place: str, data: bytes) -> Iterator[tuple[int, list[str]]]:
    """Lines of class names with commas between them, with their numbers. Raises DataError for an empty name."""
    for number, line in _lines(place, data):
        names = [name.strip() for name in line.split(",")]
        if not all(names):
            raise DataError(f"{place}: line {number}: expected names of classes with commas between them, got {line!r}")
        yield number, names


def _lines(place: str, data: bytes) -> list[Line]:
    """Lines that are not blank, with their numbers from 1; what cannot be seen is taken off both ends."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise DataError(f"{place}: line {number}: expected UTF-8, got other bytes; save the list as UTF-8") from None
    visible = ((number, _visible(line)) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1))
    found = [(number, line) for number, line in visible if line]
    for number, line in found:
        if any(unicodedata.category(c) in ("Cc", "Cf") for c in line.replace("\t", " ")):
            raise DataError(f"{place}: line {number}: {line!r} holds characters that cannot be seen; remove them")
    return found


def _visible(line: str) -> str:
    """The line without blanks and invisible characters at its ends."""
    unseen = {c for c in line if c.isspace() or unicodedata.category(c) in ("Cc", "Cf")}
    return line.strip("".join(unseen))


def _flagged(place: str, lines: list[Line], folders: Sequence[str]) -> list[Line] | None:
    """VOC's lists of one class: an id and -1 (absent), 0 (difficult) or 1. None if no line is of this form."""
    matches = [(number, line, FLAGS.fullmatch(line)) for number, line in lines]
    if not any(match and match[2] == ABSENT for _, _, match in matches) and not all(match for _, _, match in matches):
        return None
    for number, line, match in matches:
        if match is None:
            raise DataError(f"{place}: line {number}: expected an id and a flag of -1, 0 or 1, as above, got {line!r}")
    present = [(number, match[1]) for number, _, match in matches if match and match[2] != ABSENT]
    return [(number, _stem(name, folders) if _image_path(name) else name) for number, name in present]


def _paired(place: str, lines: list[Line], folders: Sequence[str], labels: str | None) -> list[Line] | None:
    """Paths of images, alone or with their labels' behind them. None if no line begins with one."""
    if not any(_image_path(line) for _, line in lines):
        return None
    ids = []
    for number, line in lines:
        image, *label = line.split()
        if "," in line or ";" in line or "\\" in line:
            raise DataError(f"{place}: line {number}: expected an id, a path to an image, or a pair, got {line!r}")
        if not _image_path(image) or len(label) > 1:
            raise DataError(f"{place}: line {number}: expected an image's path and a label's, as above, got {line!r}")
        image_id = _stem(image, folders)
        if label and labels is not None and "/" in label[0] and labels not in label[0].split("/")[:-1]:
            raise DataError(
                f"{place}: line {number}: expected a label in {labels}, which is what is read, got {label[0]}"
            )
        if label and _stem(label[0], folders) != image_id:
            raise DataError(
                f"{place}: line {number}: expected a label called {image_id}, got {label[0]}; give it the image's name"
            )
        ids.append((number, image_id))
    return ids


def _plain(place: str, lines: list[Line]) -> list[Line]:
    """Ids as they are."""
    for number, line in lines:
        suffix = _image_path(line.split()[-1])
        if line.startswith(("/", "#")) or suffix or any(c in line for c in '\t,;\\"'):
            raise DataError(f"{place}: line {number}: expected an id, a path to an image, or a pair, got {line!r}")
    return lines


def _image_path(text: str) -> bool:
    first = text.split()[0]
    return any(first.lower().endswith(suffix) for suffix in SUFFIXES)


def _stem(path: str, folders: Sequence[str]) -> str:
    """The id that a path means: what is below the data set's folder of images or labels, without suffix."""
    parts = path.split("/")
    known = [position for position, part in enumerate(parts[:-1]) if part in folders]
    below = parts[known[-1] + 1 :] if known else parts[-1:]
    return "/".join(below).rsplit(".", 1)[0]
