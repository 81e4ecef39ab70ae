"""Adapters and segmenters: where their checkpoints lie, loading and publishing them."""

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from feature_store import Fingerprint
from feature_store.storage import open_folder
from feature_store.urls import absolute, local_path
from fsdino import checkpoint
from fsdino.config import SegmenterConfig
from fsdino.errors import UserError
from fsdino.specs import encoder_spec, teacher_spec
from pipelines.recipes import Backbone, Places, Teaching

if TYPE_CHECKING:
    from fsdino.adapter import BottleneckAdapter
    from fsdino.predictor import Predictor
    from fsdino.segmenter import Segmenter

T = TypeVar("T")


def run_folder(places: Places, dataset: str, backbone: Backbone) -> str:
    """The folder of all that is trained on a data set with an encoder; runs are folders in it."""
    return absolute(f"{places.out}/{dataset}/{backbone.title}")


def adapters_folder(places: Places, backbone: Backbone) -> str:
    """The folder of all adapters for an encoder."""
    return absolute(f"{places.out}/adapters/{backbone.title}")


def short_digest(described: Any) -> str:
    """Eight hex digits of what can be written as JSON."""
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:8]


def distill_name(teaching: Teaching, images: str) -> str:
    """The name of a distillation's run: the teacher, and the set of images that the adapter learns from."""
    return f"{teaching.teacher}-on-{images}"


def publish(folder: str | Path, url: str) -> None:
    """Put a folder's files at a URL, the JSON last: it names a checkpoint, so it must not come before the weights."""
    for path in sorted(Path(folder).iterdir(), key=lambda p: p.suffix == ".json"):
        open_folder(url).write(path.name, [path.read_bytes()])


def read_record(url: str, name: str) -> dict[str, Any]:
    """A checkpoint's record, without its tensors. Raises UserError if there is no such checkpoint."""
    return _fetched(url, checkpoint.files(name)[1:], lambda folder: checkpoint.read_record(folder, name))


def chosen(url: str | None) -> str:
    """The checkpoint that a flag names, or else the one that comes with the project."""
    return url or str(checkpoint.SHIPPED)


def load_segmenter(url: str) -> "tuple[Segmenter, dict[str, Any]]":
    """The segmenter at a path or URL, and its record. Raises UserError if there is none."""
    from fsdino.segmenter import Segmenter

    return _fetched(url, checkpoint.files("segmenter"), Segmenter.load)


def load_predictor(url: str, encoder_weights: str | None, gpu: bool = False) -> "Predictor":
    """The predictor of a segmenter at a path or URL. Raises UserError if there is none, if the encoder's weights are
    not those it was trained on, or if there is no GPU."""
    from fsdino.predictor import Predictor

    device = "cuda" if gpu else "cpu"
    return _fetched(url, checkpoint.files("segmenter"), lambda folder: Predictor.load(folder, device, encoder_weights))


@dataclass(frozen=True)
class AdapterPlan:
    """Which adapter computes the embeddings; its tensors are read or drawn only by `load`."""

    kind: str
    url: str
    in_channels: int
    out_channels: int
    digest: str
    """Of its weights."""
    seed: int

    def load(self) -> "BottleneckAdapter":
        """The adapter itself, in eval mode."""
        from fsdino.adapter import BottleneckAdapter

        if self.kind == "segmenter":
            return load_segmenter(self.url)[0].adapter.eval()
        if self.kind == "distilled":
            return _fetched(self.url, checkpoint.files("adapter"), BottleneckAdapter.load)[0]
        return _random_adapter(self.in_channels, self.out_channels, self.seed)


def plan_adapter(
    places: Places,
    dataset: str,
    backbone: Backbone,
    teaching: Teaching,
    model: SegmenterConfig,
    encoder_weights: str,
    checkpoint_url: str | None,
    seed: int = 0,
) -> AdapterPlan:
    """The adapter that the settings ask for, for an encoder of these weights.

    A distilled one is at `checkpoint_url`, an adapter's or a segmenter's, else it is the encoder's and teacher's that
    was distilled on this data set. `seed` is a joint adapter's; one that stays random is always the same. Raises
    UserError if there is no distilled one, or if it was distilled from another encoder.
    """
    if model.adapter != "distilled":
        from fsdino.state import state_digest

        seed = seed if model.adapter == "joint" else 0
        channels = (encoder_spec(backbone.encoder).early.channels, teacher_spec(teaching.teacher).layer.channels)
        return AdapterPlan(model.adapter, "", *channels, state_digest(_random_adapter(*channels, seed)), seed)
    url = (
        absolute(checkpoint_url)
        if checkpoint_url
        else f"{adapters_folder(places, backbone)}/{distill_name(teaching, dataset)}/final"
    )
    record, kind = _adapter_record(url)
    if kind == "segmenter":
        return _of_segmenter(url, record, backbone, encoder_weights)
    layer = encoder_spec(backbone.encoder, backbone.early_norm, backbone.late_norm).early
    expected = {"model": backbone.encoder, "weights": encoder_weights, "layer": layer.name, "norm": layer.norm}
    differing = Fingerprint.of_record(record["early"]).differences(expected)
    if differing:
        raise UserError(
            f"{url}: the adapter was distilled from other features ({'; '.join(differing)}); distil again under "
            "another --out"
        )
    config = record["config"]
    return AdapterPlan("distilled", url, config["in_channels"], config["out_channels"], record["digest"], seed)


def _adapter_record(url: str) -> tuple[dict[str, Any], str]:
    """The record of an adapter, or of the segmenter that is there instead, and which it is."""
    kind = "segmenter" if checkpoint.files("segmenter")[1] in open_folder(absolute(url)).names("") else "adapter"
    return read_record(url, kind), kind


def _of_segmenter(url: str, record: dict[str, Any], backbone: Backbone, encoder_weights: str) -> AdapterPlan:
    """The adapter within a segmenter."""
    if "late" not in record or "adapter" not in record:
        raise UserError(f"{url}: the checkpoint does not say what it was trained on; use one written by train_episodic")
    differing = Fingerprint.of_record(record["late"]).differences(
        {"model": backbone.encoder, "weights": encoder_weights, "res_px": backbone.res}
    )
    if record["backbone"]["early_norm"] != backbone.early_norm:
        differing.append(f"early_norm: expected {backbone.early_norm}, got {record['backbone']['early_norm']}")
    if differing:
        raise UserError(f"{url}: the segmenter was trained on other features ({'; '.join(differing)})")
    if record["adapter"]["kind"] == "joint":
        raise UserError(f"{url}: its adapter was trained jointly and reads early features; there is nothing to bake")
    shape = record["shape"]
    return AdapterPlan(
        "segmenter", url, shape["early_channels"], shape["embedding_channels"], record["adapter"]["digest"], 0
    )


def _random_adapter(in_channels: int, out_channels: int, seed: int) -> "BottleneckAdapter":
    import torch

    from fsdino.adapter import BottleneckAdapter

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BottleneckAdapter(in_channels, out_channels).eval()


def _fetched(url: str, names: tuple[str, ...], read: Callable[[Path], T]) -> T:
    """What `read` makes of a checkpoint's folder, whose named files are brought here if it is remote."""
    url = absolute(url)
    local = local_path(url)
    if local is not None:
        return read(Path(local))
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                (Path(folder) / name).write_bytes(open_folder(url).read(name))
            except FileNotFoundError:
                raise UserError(f"{url}: expected a checkpoint with {name}, found none; train it first") from None
        return read(Path(folder))
