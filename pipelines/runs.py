"""A training run's folder: what makes two runs the same run, and whether it is done. Loads neither torch nor Ray."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from feature_store.storage import open_folder
from feature_store.urls import absolute
from fsdino import checkpoint
from fsdino.errors import UserError
from pipelines import checkpoints
from pipelines.outbox import Outbox

RUN = "run.json"


@dataclass(frozen=True)
class Input:
    """Data that a run reads, as MLflow lists it."""

    name: str
    digest: str
    place: str
    """Path or URL."""
    context: str
    """training or test."""
    profile: dict[str, Any]
    """What else there is to know of it."""


@dataclass(frozen=True)
class About:
    """What MLflow shows of a run beside its curves and pictures."""

    pipeline: str
    """extract, distill, train, evaluate, annotate or analyze: with the data set, the run's experiment."""
    dataset: str
    name: str
    params: dict[str, Any]
    inputs: tuple[Input, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    parent: str | None = None
    """The run that sums up this one and its like."""
    trained_by: str | None = None
    """The run that trained what this one scores."""


@dataclass(frozen=True)
class RunFolder:
    """`folder`/`name` with run.json, Ray's checkpoints, and, once all is done, `final`."""

    folder: str
    name: str
    pipeline: str
    """distill or train."""
    dataset: str
    checkpoint: str
    """What `final` holds: adapter or segmenter."""
    identity: dict[str, Any]
    """What makes two runs the same run, as JSON."""
    inputs: tuple[Input, ...]
    idle: frozenset[str] = frozenset()
    """Settings without effect on it, which MLflow does not show."""
    parent: str | None = None
    """MLflow's run that sums up this one and its like."""

    @property
    def url(self) -> str:
        """The run's own folder."""
        return absolute(f"{self.folder}/{self.name}")

    @property
    def final(self) -> str:
        """Its published checkpoint."""
        return f"{self.url}/final"

    @property
    def about(self) -> About:
        """The run as MLflow shows it."""
        params = {key: value for key, value in flat(self.identity).items() if key not in self.idle}
        return About(self.pipeline, self.dataset, self.name, params, self.inputs, parent=self.parent)

    @property
    def outbox(self) -> Outbox:
        """What MLflow does not have yet."""
        return Outbox(self.url)

    @property
    def published(self) -> bool:
        """Whether there is a final checkpoint."""
        return checkpoint.files(self.checkpoint)[1] in open_folder(self.url).names("final")

    def finished(self, tracking_uri: str) -> dict[str, Any] | None:
        """The record of the published checkpoint, None if there is none yet.

        Raises UserError if a run of another identity is in the folder.
        """
        begun = self.begun()
        if begun is None or not self.published:
            return None
        if not begun["closed"]:  # a kill or a dead server came between the checkpoint and the end
            from pipelines import tracking

            if tracking.close(tracking_uri, begun["run_id"], self.outbox):
                self.write(begun["run_id"], closed=True, registered=begun["registered"])
        return checkpoints.read_record(self.final, self.checkpoint)

    def begun(self) -> dict[str, Any] | None:
        """run.json, None if no run was begun here. Raises UserError if it is another run's."""
        try:
            record = json.loads(bytes(open_folder(self.url).read(RUN)))
            identity = record["identity"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.url}/{RUN}: expected a run's record, got a damaged file; remove the run") from None
        other = _differences(self.identity, identity)
        if other:
            raise UserError(
                f"{self.url}: a run with other settings is there ({'; '.join(other)}); "
                "choose another --out (or --name), or remove it"
            )
        return record

    def write(self, run_id: str, closed: bool = False, registered: str | None = None) -> None:
        """Write run.json; `closed` says that MLflow knows of the end, `registered` is NAME/VERSION of its model."""
        record = {"identity": self.identity, "run_id": run_id, "closed": closed, "registered": registered}
        open_folder(self.url).write(RUN, [json.dumps(record, indent=1).encode()])


@dataclass(frozen=True)
class ScoreFile:
    """The file of an evaluation's result."""

    folder: str
    title: str
    identity: dict[str, Any]

    @property
    def file(self) -> str:
        """Named after what was scored, and a digest of all that decides the result."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]
        return f"fold{self.identity['fold']}-{self.title}-{self.identity['shots']}shot-{digest}.json"

    @property
    def outbox(self) -> Outbox:
        """What MLflow does not have yet."""
        return Outbox(self.folder, f"unsent-{self.file.removesuffix('.json')}")

    def finished(self, tracking_uri: str) -> dict[str, Any] | None:
        """The result, None if there is none yet."""
        if self.file not in open_folder(self.folder).names(""):
            return None
        if self.outbox.waiting():
            from pipelines import tracking

            tracking.deliver(tracking_uri, self.outbox)
        try:
            return json.loads(bytes(open_folder(self.folder).read(self.file)))["result"]
        except (ValueError, KeyError):
            return None  # damaged: scored again

    def begun(self) -> str | None:
        """MLflow's run of a score of several seeds that was interrupted."""
        try:
            return bytes(open_folder(self.folder).read(self._begun_file)).decode()
        except FileNotFoundError:
            return None

    def begin(self, run_id: str) -> None:
        """Keep MLflow's run until the result is written."""
        open_folder(self.folder).write(self._begun_file, [run_id.encode()])

    @property
    def _begun_file(self) -> str:
        return f"{self.file.removesuffix('.json')}.run"

    def write(self, result: dict[str, Any], episodes: bytes = b"") -> None:
        """Keep the result, and the table of its episodes."""
        record = {"identity": self.identity, "result": result}
        if episodes:
            open_folder(self.folder).write(f"{self.file.removesuffix('.json')}.parquet", [episodes])
        open_folder(self.folder).write(self.file, [json.dumps(record, indent=1, allow_nan=False).encode()])
        open_folder(self.folder).delete(self._begun_file)


def identity(**parts: Any) -> dict[str, Any]:
    """What makes two runs the same run, as plain JSON: sections stay nested under their names."""
    plain = {key: asdict(value) if is_dataclass(value) else value for key, value in parts.items()}  # type: ignore[arg-type]
    return json.loads(json.dumps(plain))


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"variant": "4d"}}` to `{"model.variant": "4d"}`."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _differences(expected: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """One `key: expected X, got Y` for each leaf that differs."""
    one, other = flat(expected), flat(got)
    keys = dict.fromkeys([*one, *other])
    return [f"{k}: expected {one.get(k)}, got {other.get(k)}" for k in keys if one.get(k) != other.get(k)]
