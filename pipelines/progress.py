"""Where a training loop is, told by workers and shown by the driver.

The actor has a process of its own, so this module imports neither torch nor MLflow.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError
from tqdm import tqdm

from feature_store.urls import redacted_text
from pipelines import stopping
from pipelines.outcome import Outcome


@ray.remote(num_cpus=0)
class Progress:
    """Where a training loop is, and the error that ended it; workers tell it, the driver asks."""

    def __init__(self):
        self._at: tuple[str, int, int | None] = ("starting workers", 0, None)
        self._outcome: Outcome[None] = Outcome()
        self._notes: list[str] = []
        self._lost: list[str] = []
        self._stopping = False

    def stop(self) -> None:
        """Ask the loop to stop as soon as it has kept its state."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether it is asked to."""
        return self._stopping

    def tell(self, title: str, done: int, total: int) -> None:
        """Set the title, and the steps done and in all."""
        self._at = (title, done, total)

    def ask(self) -> tuple[str, int, int | None]:
        """What was told last."""
        return self._at

    def note(self, text: str) -> None:
        """Keep a line for the user."""
        self._notes.append(text)

    def notes(self) -> list[str]:
        """Lines for the user that nobody has fetched yet."""
        fetched, self._notes = self._notes, []
        return fetched

    def lose(self, text: str) -> None:
        """Keep what was lost, for the user and for the workers that come next."""
        self._lost.append(text)
        self._notes.append(text)

    def lost(self) -> list[str]:
        """All that was lost so far."""
        return self._lost

    def end(self, outcome: Outcome[None]) -> None:
        """Keep the error of a worker."""
        self._outcome = outcome

    def outcome(self) -> Outcome[None]:
        """The last worker's error, if there was one."""
        return self._outcome


@contextmanager
def shown(progress: Any) -> Iterator[None]:
    """A progress bar on this terminal while the block runs; a request to stop is passed on to the loop."""
    stop = threading.Event()

    def tell_notes() -> None:
        for text in ray.get(progress.notes.remote()):
            tqdm.write(f"note: {redacted_text(text)}", file=sys.stderr)

    def show() -> None:
        with suppress(RayError), tqdm(unit="step", file=sys.stderr) as bar:
            while not stop.wait(1):
                if stopping.asked():
                    progress.stop.remote()
                title, done, total = ray.get(progress.ask.remote())
                if title != bar.desc.removesuffix(": "):
                    bar.reset(total)
                    bar.set_description(title, refresh=False)
                bar.update(done - bar.n)
                tell_notes()
            tell_notes()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
