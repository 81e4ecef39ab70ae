"""What a run could not tell its tracking server, kept beside the run's results until a rerun sends it."""

import base64
import json
from dataclasses import dataclass, field
from typing import Any

from feature_store.storage import open_folder

Point = tuple[str, float, int, int]
"""A metric: name, value, time in milliseconds, step."""


@dataclass
class Unsent:
    """Of one run."""

    run_id: str
    points: list[Point] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)
    """Name of the artifact to a PNG."""
    folders: dict[str, str] = field(default_factory=dict)
    """Name of the artifact to the URL of a published checkpoint."""
    status: str = ""
    """FINISHED or FAILED; empty while the run goes on."""

    def __bool__(self) -> bool:
        return bool(self.points or self.pictures or self.folders or self.status)


@dataclass(frozen=True)
class Outbox:
    """A JSON file in a folder, absent while there is nothing to send."""

    folder: str
    file: str = "unsent.json"

    def waiting(self) -> bool:
        """Whether there is something to send."""
        return self.file in open_folder(self.folder).names("")

    def read(self, run_id: str) -> Unsent:
        """What a run could not send; nothing if the file is another run's."""
        try:
            record: dict[str, Any] = json.loads(bytes(open_folder(self.folder).read(self.file)))
        except FileNotFoundError:
            return Unsent(run_id)
        if record["run_id"] != run_id and run_id:
            return Unsent(run_id)
        pictures = {name: base64.b64decode(data) for name, data in record["pictures"].items()}
        points: list[Point] = [(name, value, time, step) for name, value, time, step in record["points"]]
        return Unsent(record["run_id"], points, pictures, record["folders"], record["status"])

    def write(self, unsent: Unsent) -> None:
        """Keep it, or remove the file if there is nothing."""
        folder = open_folder(self.folder)
        if not unsent:
            folder.delete(self.file)
            return
        pictures = {name: base64.b64encode(data).decode() for name, data in unsent.pictures.items()}
        record = {"run_id": unsent.run_id, "points": unsent.points, "pictures": pictures}
        record |= {"folders": unsent.folders, "status": unsent.status}
        folder.write(self.file, [json.dumps(record).encode()])
