"""Signals that ask a command to stop: most raise at once, a training first keeps what it has."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """The command was asked to stop, by a signal of this number."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(number)
        self.exit_code = 128 + number


_asked: list[int] = []


def asked() -> bool:
    """Whether a signal came within `graceful`."""
    return bool(_asked)


def check() -> None:
    """Raise Stopped if a signal came within `graceful`."""
    if _asked:
        raise Stopped(_asked[0])


def check_insisted() -> None:
    """Raise Stopped if a second signal came."""
    if len(_asked) > 1:
        raise Stopped(_asked[0])


@contextmanager
def raised_on_terminate() -> Iterator[None]:
    """Within the block SIGTERM raises Stopped, as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def graceful() -> Iterator[None]:
    """Within the block a first SIGINT or SIGTERM is kept for `asked`, a second raises Stopped. In another than the main
    thread, the block is within one of the main thread's already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def keep(number: int, _: Any) -> None:
        _asked.append(number)
        if len(_asked) > 1:
            raise Stopped(number)
        text = "stopping: saving the training first; a second signal stops at once"
        print(text, file=sys.__stderr__, flush=True)  # the terminal's, also where a study keeps a log

    _asked.clear()
    before = {number: signal.signal(number, keep) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
