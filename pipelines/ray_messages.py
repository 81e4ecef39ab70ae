"""Where Ray's own messages go: into a file that our errors name. And one line where Ray takes the process along.

Ray writes essays, C++ lines and OOM reports straight to file descriptor 2, and ends a driver whose head or raylet is
gone without raising anything in it. Loads no Ray.
"""

import logging
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

GONE = (
    "error: this command was killed, or Ray ended it because its head or this node is gone (Ray's messages: {}); "
    "finished work is kept, rerun the command to resume"
)
_terminal: list[IO[str]] = []
_file: list[IO[str]] = []
_watcher: list[subprocess.Popen] = []


def keep_terminal() -> None:
    """Let Python's own stderr be a copy of the terminal, so that file descriptor 2 can lead elsewhere; only where it is
    the process's own, as in a command and not in a test."""
    with suppress(OSError, AttributeError, ValueError):
        if sys.stderr.fileno() == 2:
            copy = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
            sys.stderr = sys.__stderr__ = copy  # type: ignore[misc]
            _terminal.append(copy)


def divert() -> None:
    """From now on what is written to file descriptor 2 goes into a file; call it before Ray starts."""
    if not _terminal or _file:
        return
    path = Path(tempfile.gettempdir()) / f"fsdino-{os.getpid()}-ray.log"
    file = open(path, "w", buffering=1)  # open as long as the process lives
    os.dup2(file.fileno(), 2)
    _file.append(file)
    # A shell that waits for this process's end: it speaks unless `end` told it not to, on a line below a bar's.
    line = ["/bin/sh", "-c", 'read -r ended || printf "\\n%s\\n" "$1" >&2', "sh", GONE.format(path)]
    with suppress(OSError):
        _watcher.append(
            subprocess.Popen(line, stdin=subprocess.PIPE, stderr=_terminal[0], start_new_session=True, text=True)
        )


def divert_loggers() -> None:
    """Let Ray's Python loggers, which have streams of their own, write there too."""
    if _file:
        for name in list(logging.root.manager.loggerDict):
            if name.split(".")[0] == "ray":
                for handler in logging.getLogger(name).handlers:
                    if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                        handler.setStream(_file[0])


def place() -> str:
    """The file, empty where nothing is diverted."""
    return _file[0].name if _file else ""


def said(word: str) -> bool:
    """Whether Ray's messages hold a word."""
    return bool(_file) and word in Path(_file[0].name).read_text(errors="replace")


def end() -> None:
    """The command ends by itself. The file goes if it is empty."""
    for watcher in _watcher:
        with suppress(OSError):
            watcher.communicate("ended\n")
    _watcher.clear()
    for file in _file:
        with suppress(OSError):
            if os.path.getsize(file.name) == 0:
                os.remove(file.name)
