"""What a run could not tell its tracking server, kept beside the run's results until a rerun sends it."""

import base64
import json
import os
from dataclasses import dataclass, field
from typing import Any

from feature_store.storage import open_folder
from feature_store.urls import is_url

Point = tuple[str, float, int, int]
"""A metric: name, value, time in milliseconds, step."""


@dataclass
class Unsent:
    """Of one run."""

    run_id: str
    points: list[Point] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    """Name of the artifact to its bytes."""
    series: list[tuple[str, int, bytes]] = field(default_factory=list)
    """Pictures of a series: its name, the step, a PNG."""
    folders: dict[str, str] = field(default_factory=dict)
    """Name of the artifact to the URL of a published checkpoint."""
    trained_by: str = ""
    """The run whose registered models get this one's scores; empty until it has ended."""
    status: str = ""
    """FINISHED, FAILED or KILLED; empty while the run goes on."""

    def __bool__(self) -> bool:
        return bool(self.points or self.files or self.series or self.folders or self.trained_by or self.status)


@dataclass(frozen=True)
class Outbox:
    """A JSON file for each run that has something to send, in a folder."""

    folder: str
    prefix: str = "unsent"

    def waiting(self) -> list[str]:
        """Ids of the runs that have something to send."""
        names = open_folder(self.folder).names("")
        start, end = f"{self.prefix}-", ".json"
        return [n.removeprefix(start).removesuffix(end) for n in names if n.startswith(start) and n.endswith(end)]

    def read(self, run_id: str) -> Unsent:
        """What a run could not send; nothing if there is no file of it, or a damaged one."""
        try:
            record: dict[str, Any] = json.loads(bytes(open_folder(self.folder).read(self._file(run_id))))
            files = {name: base64.b64decode(data) for name, data in record["files"].items()}
            points: list[Point] = [(name, value, time, step) for name, value, time, step in record["points"]]
            series = [(name, step, base64.b64decode(data)) for name, step, data in record["series"]]
            folders = {
                name: url if is_url(url) or os.path.isabs(url) else f"{self.folder}/{url}"
                for name, url in record["folders"].items()
            }
            return Unsent(run_id, points, files, series, folders, record["trained_by"], record["status"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return Unsent(run_id)

    def write(self, unsent: Unsent) -> None:
        """Keep it, or remove its file if there is nothing."""
        folder = open_folder(self.folder)
        if not unsent:
            folder.delete(self._file(unsent.run_id))
            return
        files = {name: base64.b64encode(data).decode() for name, data in unsent.files.items()}
        series = [(name, step, base64.b64encode(data).decode()) for name, step, data in unsent.series]
        record = {"points": unsent.points, "files": files, "series": series}
        inside = {name: url.removeprefix(f"{self.folder}/") for name, url in unsent.folders.items()}  # it may be moved
        record |= {"folders": inside, "trained_by": unsent.trained_by, "status": unsent.status}
        folder.write(self._file(unsent.run_id), [json.dumps(record).encode()])

    def _file(self, run_id: str) -> str:
        return f"{self.prefix}-{run_id}.json"
