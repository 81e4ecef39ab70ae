"""Running test episodes and counting them: the work of `evaluate`, in this process or in several at once."""

import io
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fsdino import paper
from fsdino.data.episodes import Episode
from fsdino.data.views import View, draw_view
from fsdino.matching import positional_basis
from fsdino.metrics import Counts, FewShotScore, boundary_of, count
from fsdino.presence import lag
from fsdino.segmenter import Prediction
from fsdino.state import sam_prompt_state
from pipelines import checkpoints, cluster, heap, live, methods, panels
from pipelines.feeding import Features
from pipelines.loading import EpisodeLoader
from pipelines.scoring_plan import MethodPlan, ScoringPlan

BATCH = 8
CHUNK = 8 * BATCH  # episodes of one Ray task
PANEL_ROWS = 6
FEATURES_GB = 1.0  # in a scorer's memory; a fold of VOC has a quarter of it
TRUTHS_KEPT = 1024  # 0.4 MB each in VOC, 0.6 MB in COCO
AHEAD = 2  # batches being counted while the next ones are computed


class EpisodeScore(NamedTuple):
    """One episode, counted."""

    episode: int
    class_id: int
    query: str
    supports: tuple[str, ...]
    counts: Counts
    pixels: int
    """Of the map that was scored."""


def built(plan: MethodPlan, device: torch.device, precision: str) -> methods.Method:
    """A method on a device."""
    if plan.name == "segmenter":
        segmenter, _ = checkpoints.load_segmenter(plan.checkpoint)
        return methods.Trained(segmenter.to(device), lambda: cluster.autocast(precision, device), plan.empties)
    if plan.name == "matching":
        encoder = live.built(plan.backbone, device)
        with torch.inference_mode():
            blank = encoder(live.blank(encoder, plan.backbone.res).to(device)).late[0]
        return methods.matching(positional_basis(blank))
    if plan.name == "peak":
        assert plan.sam_decoder is not None
        state = sam_prompt_state(plan.sam_decoder, plan.decoder_weights)
        return methods.peak(methods.peak_prompt(state).to(device))
    return methods.similarity(plan.name)


class Scorer:
    """A job's method, features and labels in one process."""

    def __init__(self, job: ScoringPlan):
        heap.keep_freed_memory()
        self.job = job
        self.device = cluster.device_of(job.device)
        self.method = built(job.method, self.device, job.device.train_precision)
        self._truths: OrderedDict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        backbone = job.method.backbone
        late: Features | None = job.late
        query: Features | None = job.query
        if late is None:
            adapter = None if job.method.adapter is None else job.method.adapter.load()
            if isinstance(self.method, methods.Trained):
                adapter = self.method.segmenter.adapter
            source = live.LiveEncoder(live.built(backbone, self.device), adapter, job.dataset, backbone, self.device)
            late = live.LiveFeatures(source, "late")
            joint = isinstance(self.method, methods.Trained) and self.method.segmenter.config.adapter == "joint"
            if adapter is not None:
                query = live.LiveFeatures(source, "early" if joint else "embedding")
        self.loader = EpisodeLoader(
            job.dataset,
            late,
            query,
            backbone.view_seed,
            backbone.res,
            query_labels=False,
            device=self.device,
            memory_gb=FEATURES_GB,
        )

    def score(self, seed: int, indices: Sequence[int]) -> list[EpisodeScore]:
        """Episodes of a seed, each counted at the size that the protocol says."""
        scores: list[EpisodeScore] = []
        with ThreadPoolExecutor(1) as pool, torch.inference_mode():
            waiting: list[Future[list[EpisodeScore]]] = []
            for numbers, batch, predicted in self._predicted(seed, indices):
                waiting.append(pool.submit(self._count, numbers, batch, predicted))
                if len(waiting) > AHEAD:
                    scores += waiting.pop(0).result()
            for one in waiting:
                scores += one.result()
        return scores

    @torch.inference_mode()
    def picture(self, seed: int, indices: Sequence[int]) -> Image.Image:
        """A panel of episodes."""
        episodes = [self.episode(seed, index) for index in indices]
        predicted = methods.predict(self.method, self.loader.load(episodes).to(self.device), self.job.vote)
        if predicted.mask_logits.shape[1] > 1:
            masks = [torch.from_numpy(voted(maps.float().cpu().numpy() > 0)) for maps in predicted.mask_logits]
            predicted = Prediction(predicted.prior_logits, torch.stack(masks)[:, None].float() - 0.5)
        return panels.episodes(self.job.dataset, self.loader.view_seed, episodes, predicted)

    def episode(self, seed: int, index: int) -> Episode:
        """The episode of an index."""
        assert self.job.sampler is not None
        if self.job.lacking is not None:
            return self.job.sampler.absent(index, self.job.lacking, seed)
        return self.job.sampler.episode(index, seed)

    def classes(self, seed: int, index: int) -> list[Episode]:
        """The episode of an index for each of the classes that are told apart."""
        if self.job.ways == 1:
            return [self.episode(seed, index)]
        assert self.job.sampler is not None
        return self.job.sampler.ways(index, self.job.ways, seed)

    def _predicted(self, seed: int, indices: Sequence[int]) -> Iterator[tuple[list[int], list[Episode], Prediction]]:
        size = max(1, BATCH // self.job.ways)
        numbers = [list(indices[at : at + size]) for at in range(0, len(indices), size)]
        drawn = [[episode for index in chunk for episode in self.classes(seed, index)] for chunk in numbers]
        for chunk, batch in zip(numbers, self.loader.ahead(iter(drawn)), strict=True):
            yield chunk, list(batch.episodes), methods.predict(self.method, batch.to(self.device), self.job.vote)

    def _count(self, numbers: list[int], episodes: list[Episode], predicted: Prediction) -> list[EpisodeScore]:
        ways, of_all = self.job.ways, predicted.mask_logits.float().cpu()
        if ways > 1 and predicted.presence is not None:  # an episode shows one of its classes at least
            behind = lag(predicted.presence.cpu().unflatten(0, (-1, ways))).flatten()
            of_all = of_all - behind[:, None, None, None]
        with torch.inference_mode():
            return [
                score
                for position, number in enumerate(numbers)
                for score in self._counted(
                    number,
                    episodes[position * ways : (position + 1) * ways],
                    of_all[position * ways : (position + 1) * ways],
                )
            ]

    def _counted(self, number: int, episodes: Sequence[Episode], logits: Tensor) -> list[EpisodeScore]:
        """A query's scores, one for each of its classes."""
        job, rules, query = self.job, self.job.rules, episodes[0].query
        view = draw_view(self.loader.view_seed, query, episodes[0].views[0])
        truths = [self._truth(query, episode.class_id, view) for episode in episodes]
        size = truths[0][0].shape
        extent = size if rules.scored_at == "square" else view.extent(size)
        if len(episodes) == 1:
            masks = [voted(enlarged(logits[0], extent, size, rules.align_corners).numpy() > 0)]
        else:
            masks = told_apart(enlarged(logits[:, 0], extent, size, rules.align_corners))
        found = []
        for episode, mask, (label, drawn) in zip(episodes, masks, truths, strict=True):
            if job.masks:
                name = f"{number:05d}_{episode.class_id}_{query.replace('/', '_')}.png"
                Image.fromarray(mask.astype(np.uint8) * 255).save(Path(job.masks) / name)
            counts = count(mask, label, drawn=drawn)
            found.append(EpisodeScore(number, episode.class_id, query, episode.supports, counts, label.size))
        return found

    def _truth(self, image_id: str, class_id: int, view: View) -> tuple[np.ndarray, np.ndarray]:
        """A query's mask as it is scored, and its boundary; the most recent ones are kept, as a test asks for each
        several times."""
        key, rules = (image_id, class_id), self.job.rules
        if key not in self._truths:
            label = self.job.dataset.mask(*key)
            if rules.scores_void:
                label[label == paper.VOID] = 0
            if rules.scored_at == "square":
                label = view.label(label, self.job.method.backbone.res)
            self._truths[key] = label, boundary_of(label == 1)
            if len(self._truths) > TRUTHS_KEPT:
                self._truths.popitem(last=False)
        return self._truths[key]


def enlarged(logits: Tensor, extent: tuple[int, ...], size: tuple[int, ...], align_corners: bool) -> Tensor:
    """Maps (n, m, m), bilinear, at the (height, width) `extent`, of which the upper left `size` is kept."""
    large = F.interpolate(logits[None], size=tuple(extent), mode="bilinear", align_corners=align_corners)[0]
    return large[:, : size[0], : size[1]]


def told_apart(logits: Tensor) -> list[np.ndarray]:
    """Masks of n classes from their logits (n, h, w): each pixel belongs to the largest, if that is above 0."""
    largest, owner = logits.max(0)
    return [((owner == number) & (largest > 0)).numpy() for number in range(len(logits))]


def voted(masks: np.ndarray) -> np.ndarray:
    """One mask of n, by HSNet's vote: pixels with at least half as many votes as the image's best pixel has."""
    if len(masks) == 1:
        return masks[0]
    votes = masks.sum(0)
    return 2 * votes >= max(1, votes.max())


def score(job: ScoringPlan, seed: int) -> list[EpisodeScore]:
    """All test episodes of a seed, in this process or in several Ray actors at once; in their order."""
    episodes, tasks = job.episodes, job.tasks
    chunks = [range(at, min(at + CHUNK, episodes)) for at in range(0, episodes, CHUNK)]
    if job.masks:
        Path(job.masks).mkdir(parents=True, exist_ok=True)
    found: list[EpisodeScore] = []
    with tqdm(total=episodes, unit="episode", desc=f"evaluating, seed {seed}", mininterval=5, file=sys.stderr) as bar:
        for scores in _by_actors(job, seed, chunks, tasks) if tasks > 1 else map(_scorer(job, seed), chunks):
            found += scores
            bar.update(len({one.episode for one in scores}))
    return sorted(found)


def _scorer(job: ScoringPlan, seed: int) -> Any:
    scorer = scorer_of(job)
    return lambda chunk: scorer.score(seed, chunk)


def scorer_of(job: ScoringPlan) -> Scorer:
    """The scorer of a job in this process, built once."""
    if not _scorers or _scorers[0].job is not job:
        _scorers[:] = [Scorer(job)]
    return _scorers[0]


def drop_scorers() -> None:
    """Let go of networks and features, in this process and in the actors."""
    _scorers.clear()
    _actors.clear()


_scorers: list[Scorer] = []
_actors: list[tuple[ScoringPlan, list[Any]]] = []
"""Those of the last job; a further seed finds them with their networks loaded."""


def _by_actors(job: ScoringPlan, seed: int, chunks: Sequence[range], tasks: int) -> Iterator[list[EpisodeScore]]:
    """Chunks by Ray actors, each as it is done."""
    gpus = 1.0 if job.device.gpu else 0.0
    wanted = {"CPU": job.task_cpus * tasks, "GPU": gpus * tasks}
    cluster.connect(wanted, f"{tasks} tasks", "lower --tasks or --task-cpus", needed(job))
    import ray
    from ray.util import ActorPool

    if not _actors or _actors[0][0] is not job:
        shared = ray.put(job)
        actor = ray.remote(num_cpus=job.task_cpus, num_gpus=gpus)(_Actor)
        _actors[:] = [(job, [actor.remote(shared) for _ in range(tasks)])]
    with cluster.faults():
        pool = ActorPool(_actors[0][1])
        outcomes = pool.map_unordered(lambda actor, chunk: actor.score.remote(seed, chunk), list(chunks))
        for outcome in outcomes:
            yield outcome.get()


def needed(job: ScoringPlan) -> cluster.Needs:
    """What actors need on every node."""
    return cluster.Needs(read=tuple(dict.fromkeys(given.place for given in job.inputs)))


class _Actor:
    """A scorer of its own; expected errors travel as outcomes."""

    def __init__(self, job: ScoringPlan):
        torch.set_num_threads(max(1, int(job.task_cpus)))
        self.job = job

    def score(self, seed: int, chunk: range) -> Any:
        from pipelines.outcome import Outcome

        return Outcome.of(lambda: scorer_of(self.job).score(seed, chunk))


def result_of(job: ScoringPlan, scores: Sequence[EpisodeScore]) -> dict[str, Any]:
    """`miou`, `fb_iou`, `boundary_iou` in [0, 1] and `per_class` (class name to IoU); for absent objects `empty`, the
    share of masks that are rightly empty, and `false_area`, the mean share of the image that is wrongly not."""
    if job.lacking is not None:
        return {
            "empty": round(float(np.mean([s.counts.predicted == 0 for s in scores])), 6),
            "false_area": round(float(np.mean([s.counts.predicted / s.pixels for s in scores])), 6),
        }
    total = FewShotScore(job.dataset.novel(job.fold))
    for one in scores:
        total.add(one.counts, one.class_id)
    found, names = total.result(), job.dataset.class_names
    per_class = {names[class_id - 1]: round(iou, 6) for class_id, iou in found.pop("per_class").items()}
    return {**found, "per_class": per_class}


def parquet(scores: Sequence[EpisodeScore], names: Sequence[str]) -> bytes:
    """The episodes as a table, one row each."""
    columns: dict[str, list[Any]] = {
        "episode": [s.episode for s in scores],
        "class": [names[s.class_id - 1] for s in scores],
        "query": [s.query for s in scores],
        "supports": [list(s.supports) for s in scores],
        "iou": [s.counts.iou for s in scores],
        "pixels": [s.pixels for s in scores],
        **{field: [getattr(s.counts, field) for s in scores] for field in Counts._fields},
    }
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def extremes(scores: Sequence[EpisodeScore]) -> tuple[list[int], list[int]]:
    """Episodes with the best and the worst IoU, at most one for each query."""
    ranked = sorted({s.query: s for s in sorted(scores, key=lambda s: -s.episode)}.values(), key=lambda s: s.counts.iou)
    worst, best = ranked[:PANEL_ROWS], ranked[::-1][:PANEL_ROWS]
    return [s.episode for s in best], [s.episode for s in worst]
