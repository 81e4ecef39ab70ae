"""What is scored, on what: checked and opened by the driver, built where it runs. Loads no torch."""

from dataclasses import dataclass

from feature_store import FeatureStore
from fsdino.data.dataset import Dataset
from fsdino.data.episodes import EpisodeSampler
from fsdino.data.protocols import Protocol
from pipelines.checkpoints import AdapterPlan
from pipelines.recipes import Backbone, Device
from pipelines.runs import Input


@dataclass(frozen=True)
class MethodPlan:
    """What is scored; built where it runs."""

    name: str
    """segmenter, or a method without training."""
    checkpoint: str
    """Of a segmenter."""
    backbone: Backbone
    adapter: AdapterPlan | None = None
    """That computes embeddings for the method peak."""
    sam_decoder: str | None = None
    """Whose decoder `peak` prompts."""
    decoder_weights: str | None = None
    empties: bool = False
    """Whether masks of classes that do not seem to be shown are left empty."""


@dataclass(frozen=True)
class ScoringPlan:
    """What is scored on what, checked and opened."""

    dataset: Dataset
    method: MethodPlan
    late: FeatureStore | None
    """None: features are computed from the images."""
    query: FeatureStore | None
    sampler: EpisodeSampler | None
    """None for videos."""
    lacking: dict[str, list[int]] | None
    """For absent objects: test images that lack classes, and which."""
    rules: Protocol
    fold: int
    episodes: int
    device: Device
    ways: int
    """Classes that are told apart in each query."""
    vote: bool
    """Whether masks of single supports vote."""
    tasks: int
    task_cpus: float
    memory: int
    memory_confidence: float
    tracking_uri: str
    inputs: tuple[Input, ...]
    """What it reads, as MLflow lists it."""
    trained_by: str | None
    """MLflow's run that trained what is scored."""
    panel: str
    """File for a picture, or empty."""
    masks: str
    """Folder for predicted masks, or empty."""
