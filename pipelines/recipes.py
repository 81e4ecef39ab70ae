"""Complete settings of every run: one function each, no inheritance, nothing read from elsewhere.

Sections are shared between commands, so that a store, its reader and a checkpoint agree on what made them.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import tyro

from fsdino import paper
from fsdino.config import SegmenterConfig
from fsdino.kinds import Kind
from pipelines.checks import (
    MANY,
    Cores,
    Count,
    Few,
    Folder,
    Output,
    Place,
    Range,
    Rate,
    Seed,
    Share,
    Side,
    TrackingUri,
    Weights,
)


@dataclass(frozen=True)
class Places:
    """Where things are."""

    data: Place
    """Data set: its publisher's folder, or one of your own (docs/data.md), on a path every node can read or any fsspec
    URL."""
    store: Output = "outputs/stores"
    """Root of the feature stores: a path or any fsspec URL."""
    cache: Folder | None = None
    """Folder on a local disk that keeps samples of remote stores; none: no cache."""
    cache_gb: Annotated[float, Range(0, 1e9)] = 100
    """Largest size of the cache in GB (10^9 bytes)."""
    out: Output = "outputs/runs"
    """Root of checkpoints and results: a path or any fsspec URL."""
    tracking_uri: TrackingUri = "sqlite:///outputs/mlflow.db"
    """MLflow: sqlite:///FILE or the http address of a server."""
    dataset: Kind | None = None
    """Which data set the folder holds; none: its layout tells."""
    train_list: Place | None = None
    """File with the training images' ids, instead of the data set's own list."""
    test_list: Place | None = None
    """File with the test images' ids, instead of the data set's own list."""
    skip_bad: bool = False
    """Leave out images whose labels cannot be used, and list them, instead of stopping at the first."""


@dataclass(frozen=True)
class Photographs:
    """Plain photographs, instead of a data set's."""

    images: Place | None = None
    """A folder, a glob in quotes, a tar archive or a folder of them, or any of these as an fsspec URL."""
    share: Annotated[float, Range(0, 1, closed=False)] = 1.0
    """Share of them that is taken: always the same ones for a seed."""
    share_seed: Seed = 0
    """Seed of that choice."""


@dataclass(frozen=True)
class Backbone:
    """The frozen encoder and what it sees."""

    encoder: str
    """dinov2_vit{s,b,l,g}14, the same with _reg, dinov3_vit{s,b,l}16, tf_efficientnet_lite0..2 or tiny_vit."""
    res: Side
    """Side of the student's square input, in pixels; a teacher with a side of its own (SAM: 1024) sees that instead."""
    num_views: Few
    """Views of each training image: 1 is the photograph alone, further ones are augmented."""
    encoder_weights: Weights | None = None
    """A local weights file, or hf:ORGANISATION/NAME on the hub, instead of the publisher's."""
    early_norm: bool = False
    """Apply the encoder's final norm to the early layer."""
    late_norm: bool = True
    """Apply the encoder's final norm to the late layer."""
    view_seed: Seed = 0
    """Seed of the augmented views."""

    @property
    def title(self) -> str:
        """The folder of what is trained on its features."""
        return f"{self.encoder}@{self.res}"


@dataclass(frozen=True)
class Teaching:
    """The frozen teacher."""

    teacher: str
    """sam_vit_h, sam_vit_l, sam_vit_b, tf_efficientnet_lite0..2 or tiny_sam."""
    teacher_weights: Weights | None = None
    """A local weights file instead of the publisher's."""


@dataclass(frozen=True)
class Extraction:
    """How an extraction job uses its cluster."""

    actors: Few = 1
    """Processes that run the network."""
    actor_cpus: Cores = 1
    """CPU cores per actor."""
    actor_gpus: Annotated[float, Range(0, 64)] = 0
    """GPUs per actor; fractions share one."""
    decode_cpus: Cores = 0.5
    """CPU cores per decoding task; as many run as fit beside the actors."""
    forward_batch: Few = 8
    """Images in one forward pass."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the forward pass; docs/networks.md says what the halves change."""
    compile: bool = False
    """Run the network through torch.compile; worth it for long jobs on GPUs."""
    dtype: Literal["float16", "float32", "int8"] = "float16"
    """Type of stored values; int8 is packed with a scale for each 64 channels, in half of float16's bytes."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """An image that cannot be read is listed in the manifest as quarantined, or stops the job."""
    refresh: bool = False
    """Compute images again that have changed since they were extracted."""
    max_bad_share: Share = 0.01
    """Stop if more than this share of the images cannot be read."""


@dataclass(frozen=True)
class Workers:
    """How a training job uses its cluster."""

    workers: Few = 1
    """Ray Train workers; the batch is split among them."""
    worker_cpus: Cores = 2
    """CPU cores per worker."""
    feed_threads: Few = 1
    """Threads of a worker that read and decode the next steps' features."""
    feed_depth: Few = 2
    """How many batches are read ahead."""
    cache_memory_gb: Annotated[float, Range(0, 1e6)] = 0
    """Features that a worker keeps in memory once they are read, in GB; local stores are in the system's own cache."""
    cache_device_gb: Annotated[float, Range(0, 1e6)] = 0
    """Features that a worker keeps on its GPU, in GB; if all fit, a step reads none from elsewhere."""
    checkpoint_every: Count = 200
    """Steps between checkpoints; a killed run resumes from the last one."""
    checkpoint_minutes: Annotated[float, Range(0, 1e6, closed=False)] | None = None
    """Also checkpoint once this many minutes have passed since the last one."""
    checkpoints_kept: Annotated[int, Range(2, 4096)] = 2
    """How many of the most recent checkpoints are kept."""
    worker_failures: Annotated[int, Range(0, MANY)] = 3
    """How often a worker that dies, or whose data fails, is replaced; the new one resumes from the last checkpoint."""
    seed: Seed = 0
    """Seed of initialisation and of the order of samples."""


@dataclass(frozen=True)
class Device:
    """Device for training and evaluation."""

    gpu: bool = False
    """One GPU for each process."""
    train_precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast of the forward and backward pass."""


@dataclass(frozen=True)
class Distillation:
    """Coarse-to-fine distillation (Sec. 3.3.2)."""

    distill_res: tuple[Side, ...]
    """Student resolutions in their order, in pixels."""
    distill_epochs: Count = paper.DISTILL_EPOCHS
    """Passes over the training images at each resolution."""
    distill_batch: Count = paper.BATCH_SIZE
    """Images per step, across all workers."""
    distill_lr: Rate = paper.LEARNING_RATE
    """Initial learning rate of each stage."""
    validation_share: Annotated[float, Range(0, 0.9)] = 0.05
    """Share of the images held out to choose each stage's best weights."""


@dataclass(frozen=True)
class Episodic:
    """Episodic training (Sec. 3.4.3)."""

    epochs: Count = paper.EPOCHS_PASCAL
    """Passes over the base images; the number of steps follows."""
    steps: Count | None = None
    """Number of steps, instead of epochs."""
    batch: Count = paper.BATCH_SIZE
    """Episodes per step, across all workers."""
    train_shots: Few = 1
    """Supports in a training episode."""
    lr: Rate = paper.LEARNING_RATE
    """Learning rate of new layers."""
    decoder_lr: Rate = paper.DECODER_LEARNING_RATE
    """Learning rate of the decoder."""
    balance: Share = 0.0
    """Above 0: draw the class first, by its number of images to the power 1 - balance (1: all equally likely)."""
    accumulate: Few = 1
    """Parts of its share of a step that a worker computes one after another, where memory does not hold it at once."""
    train_compile: bool = False
    """Run the loss through torch.compile, on one GPU as CUDA graphs: a step of eight episodes is 7.9 times as fast on
    an H100 (bf16), for a minute of compiling."""
    clip: Annotated[float, Range(0, 1e6, closed=False)] | None = None
    """Largest norm of a step's gradient; none: no clipping."""
    ema: Annotated[float, Range(0, 0.99999)] = 0.0
    """Above 0: what is validated and published is the weights' moving average with this decay."""
    absent_share: Share = 0.0
    """Share of the episodes whose query lacks the class, so that its mask is empty."""
    presence_episodes: Annotated[int, Range(16, MANY)] = 512
    """Episodes that show the class, and as many that do not, on which a model's presence score is fitted."""
    flip: bool = False
    """Mirror cached features and labels at random, for encoders that take a mirrored image to mirrored features."""
    label_px: Side | None = None
    """Side at which the loss is computed; the image's if none."""
    select_on: Literal["none", "base", "novel"] = "none"
    """Keep the best weights beside the last: best on base classes that are held out of training, or on the novel test
    classes, as published results often do, which the result then says."""
    validation_classes: Few = 3
    """Base classes that are held out, drawn by the seed."""
    validate_every: Count = 200
    """Steps between validations."""
    validation_episodes: Count = 200
    """Episodes of a validation."""


@dataclass(frozen=True)
class Benchmark:
    """What counts as training, as a test, and as an episode."""

    protocol: str = "hdmnet"
    """How the data set becomes episodes: hdmnet or hsnet; fsdino/data/protocols.py has them."""
    pairs: Place | None = None
    """Folder of HSNet's lists of image and class (trn/fold0.txt, val/fold0.txt, ... or .pkl), instead of the images
    that the protocol finds by itself."""
    scored_at: Literal["label", "square"] | None = None
    """Score at the label's own size or at the network's square; none: as the protocol says."""
    align_corners: bool | None = None
    """Enlarge logits with corners aligned, as most published code does; none: as the protocol says."""
    scores_void: bool | None = None
    """Score void as background, as the published COCO maps do, which have no crowd regions; none: as the protocol
    says."""


@dataclass(frozen=True)
class Testing:
    """Evaluation."""

    episodes: Count | None = None
    """Test episodes of each seed; none: as many as the protocol says for the data set."""
    test_seed: Seed = 0
    """Seed of the episodes' classes and supports."""
    seeds: Few = 1
    """Number of seeds, from the test seed on; scores are their mean and standard deviation."""
    fusion: Literal["average", "vote"] = "average"
    """Several supports: average their encodings, or let masks of one support each vote as HSNet does."""


@dataclass(frozen=True)
class Recipe:
    """Every setting of one published or offline run."""

    places: Places
    photographs: Photographs
    backbone: Backbone
    teaching: Teaching
    extraction: Extraction
    workers: Workers
    device: Device
    distillation: Distillation
    model: SegmenterConfig
    benchmark: Benchmark
    episodic: Episodic
    testing: Testing


def paper_recipe() -> Recipe:
    """FS-DINO, arXiv 2504.15669, PASCAL-5i: mIoU 75.6 80.3 72.2 73.4 (1-shot, Table 1) is the score to reach.

    DINOv2 ViT-B/14 at 518 px and SAM-H. The paper distils on 1 % of SA-1B with 2-4 A6000 and trains episodes on one;
    this distils on the data set's own training images. Views stand for augmentation, so nothing is mirrored.
    Literal but for the start of the correlation's layers: with PyTorch's a fresh prior is blind (docs/method.md).
    """
    return Recipe(
        places=Places(data="data/VOCdevkit/VOC2012"),
        photographs=Photographs(),
        backbone=Backbone(encoder="dinov2_vitb14", res=paper.IMAGE_RES_PX, num_views=8),
        teaching=Teaching(teacher="sam_vit_h"),
        extraction=Extraction(actor_gpus=1, decode_cpus=1, forward_batch=16),
        workers=Workers(worker_cpus=4, checkpoint_every=1000),
        device=Device(gpu=True),
        distillation=Distillation(distill_res=paper.DISTILL_RES_PX),
        model=SegmenterConfig(sam_decoder="sam_vit_h"),
        benchmark=Benchmark(),
        episodic=Episodic(),
        testing=Testing(),
    )


def offline_recipe() -> Recipe:
    """Nothing but the package index: EfficientNet-Lite0 learns from Lite2 at 400 px. README has its scores.

    The compact variant with what nearest positions say, to which the 4D correlation added nothing (docs/method.md).
    The decoder starts at random, so it learns faster than one of SAM's. Most training images we had show animals, hence
    the balance; mirrored features are the one augmentation, as no sign of overfitting asked for stored views. Its
    departures from the paper are in docs/method.md.
    """
    return Recipe(
        places=Places(data="data/VOCdevkit/VOC2012"),
        photographs=Photographs(),
        backbone=Backbone(encoder="tf_efficientnet_lite0", res=400, num_views=1),
        teaching=Teaching(teacher="tf_efficientnet_lite2"),
        extraction=Extraction(actors=2, actor_cpus=0.75),
        workers=Workers(),
        device=Device(),
        distillation=Distillation(distill_res=(128, 256, 400), distill_epochs=3),
        model=SegmenterConfig(
            variant="compact",
            contrast=True,
            refine=True,
            support_weights="share",
            similarity="unit",
            neighbours=True,
            self_support=True,
            presence=True,
            fuse=True,
            upscaling="bilinear",
        ),
        benchmark=Benchmark(),
        episodic=Episodic(steps=1500, decoder_lr=3e-4, balance=0.5, flip=True, label_px=100),
        testing=Testing(),
    )


def demo_recipe() -> Recipe:
    """Generated shapes at 256 px, in minutes on two cores: what `make demo` runs.

    The paper's two variants on EfficientNet-Lite0, with the departures that a decoder from random weights needs and
    without what `offline` adds to the method.
    """
    return Recipe(
        places=Places(data="outputs/demo/shapes"),
        photographs=Photographs(),
        backbone=Backbone(encoder="tf_efficientnet_lite0", res=256, num_views=1),
        teaching=Teaching(teacher="tf_efficientnet_lite2"),
        extraction=Extraction(actors=2, actor_cpus=0.75),
        workers=Workers(),
        device=Device(),
        distillation=Distillation(distill_res=(128, 256), distill_epochs=3),
        model=SegmenterConfig(contrast=True, refine=True, support_weights="share", similarity="unit"),
        benchmark=Benchmark(),
        episodic=Episodic(steps=160, decoder_lr=3e-4, balance=0.5, flip=True, label_px=100),
        testing=Testing(episodes=160),
    )


def tiny_recipe() -> Recipe:
    """The paper's architecture at toy size with random weights: the whole pipeline in seconds, for tests."""
    return Recipe(
        places=Places(data="outputs/shapes"),
        photographs=Photographs(),
        backbone=Backbone(encoder="tiny_vit", res=70, num_views=2),
        teaching=Teaching(teacher="tiny_sam"),
        extraction=Extraction(),
        workers=Workers(checkpoint_every=5, worker_cpus=1),
        device=Device(),
        distillation=Distillation(distill_res=(28, 70), distill_epochs=1),
        model=SegmenterConfig(),
        benchmark=Benchmark(),
        episodic=Episodic(steps=10, batch=4),
        testing=Testing(episodes=20),
    )


RECIPES = {"paper": paper_recipe, "offline": offline_recipe, "demo": demo_recipe, "tiny": tiny_recipe}
RecipeName = Annotated[str, tyro.conf.arg(help=f"Which run's settings to start from: {', '.join(RECIPES)}.")]


def departures(section: Any, of_recipe: Any) -> list[str]:
    """What single flags changed in a section of a recipe, as words for a title: `no-refine`, `steps-160`."""
    words = []
    for field in fields(section):
        value, name = getattr(section, field.name), field.name.replace("_", "-")
        if value != getattr(of_recipe, field.name):
            words.append(f"{name}-{value}" if not isinstance(value, bool) else name if value else f"no-{name}")
    return words


def fold_title(fold: int | None) -> str:
    """A fold, or none, as names of runs have it."""
    return "all-classes" if fold is None else f"fold{fold}"


def model_run(fold: int | None, model: SegmenterConfig, recipe: str) -> str:
    """What a run of a fold is called, if nothing else departs from the recipe."""
    return f"{fold_title(fold)}-{model_title(model, recipe)}"


def model_title(model: SegmenterConfig, recipe: str) -> str:
    """What runs and tables call a model: its variant, and whatever else departs from the recipe."""
    words = [w for w in departures(model, RECIPES[recipe]().model) if not w.startswith("variant-")]
    return "-".join([model.variant, *words])
