"""What a training lost, told by Ray Train's controller as it happens. Loads neither torch nor MLflow: the controller
would, too."""

import time
from typing import Any

from ray.exceptions import RayTaskError
from ray.train import UserCallback

from fsdino.errors import first_line


class TellLost(UserCallback):
    """Tells the progress actor of each failure of workers, and how many restarts are left of those allowed."""

    def __init__(self, progress: Any, allowed: int):
        self.progress, self.allowed, self.failures = progress, allowed, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """See UserCallback: rank to error."""
        self.failures += 1
        self.progress.lose.remote(failure(worker_exceptions, self.allowed - self.failures))


def failure(errors: dict[int, Exception], left: int) -> str:
    """One line: when, which workers, why, and the restarts that are left."""
    why = next(iter(errors.values()), RuntimeError("no reason given"))
    cause: Any = why.cause if isinstance(why, RayTaskError) else getattr(why, "base_exception", why)
    ranks = ", ".join(str(rank) for rank in sorted(errors)) or "?"
    what = f"{'workers' if len(errors) > 1 else 'worker'} {ranks}"
    rest = f"{left} restart{'' if left == 1 else 's'} left" if left >= 0 else "no restart left"
    return f"{time.strftime('%H:%M:%S')} {what} lost ({first_line(cause)}); {rest}"
