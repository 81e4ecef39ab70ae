"""How results and errors cross processes: as an outcome, whose error the driver raises.

Ray would wrap an exception in its own, with a worker's traceback for a message.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from feature_store.errors import StoreError
from fsdino.errors import Fault, UserError, first_line
from pipelines import ray_messages

T = TypeVar("T")


class ClusterFault(Fault):
    """Ray failed, not the user and not our code; what was finished is kept."""

    def __init__(self, error: BaseException):
        place = ray_messages.place()
        more = f"; its own messages: {place}" if place else ""
        super().__init__(
            f"Ray broke down ({first_line(error)}{more}); finished work is kept, rerun the command to resume"
        )


EXPECTED = (UserError, StoreError, Fault)
"""Errors whose one line says all; any other is a fault of ours and keeps its traceback."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a task, an actor or a worker ended with."""

    value: T | None = None
    error: Exception | None = None

    @classmethod
    def of(cls, work: Callable[[], T]) -> "Outcome[T]":
        """The outcome of a call; errors that are not expected are raised."""
        try:
            return cls(value=work())
        except EXPECTED as error:
            return cls(error=error)

    def get(self) -> T:
        """The value. Raises the error if there is one."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]
