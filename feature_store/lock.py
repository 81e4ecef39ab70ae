"""One job to a store, or to a run's folder: the second one is told who is working there.

On file systems and S3 it is exclusive, elsewhere as far as the driver goes. Should two jobs meet all the same, readers
check every sample against the manifest's checksum.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from feature_store import layout
from feature_store.errors import StoreError
from feature_store.storage import Folder

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


class Lock:
    """A held lock. `check` raises StoreError once another job has taken the store over."""

    def __init__(self, folder: Folder, owner: str):
        self.folder, self.owner = folder, owner
        self.lost_to: str | None = None

    def check(self) -> None:
        """Raise StoreError if the lock is no longer ours."""
        if self.lost_to is not None:
            raise StoreError(
                f"{self.folder.url}: {self.lost_to} took over this folder, because this job gave no sign of life for "
                f"{STALE_SECONDS:.0f} s; let that one finish"
            )

    def beat(self) -> None:
        """Say that we still work, unless another says so."""
        try:
            holder = _holder(self.folder)
            if holder is None or holder["owner"] != self.owner:
                self.lost_to = _name(holder) if holder else "another job"
            else:
                self.folder.write(layout.LOCK, [_record(self.owner)])
        except StoreError:
            return  # the work itself will find out whether the place is gone for good


@contextmanager
def locked(folder: Folder) -> Iterator[Lock]:
    """Hold the store's lock for the block. Raises StoreError if another job that is alive holds it.

    A holder on this machine is alive while its process is; one elsewhere, while its last sign is under a minute old.
    """
    owner = uuid.uuid4().hex
    while not folder.create(layout.LOCK, _record(owner)):
        holder = _holder(folder)
        if holder is not None:
            if _alive(holder):
                raise StoreError(
                    f"{folder.url}: {_name(holder)} is working there; wait for it to end, or stop it (a job that "
                    f"was killed on another machine counts as gone after {STALE_SECONDS:.0f} s)"
                )
            folder.delete(layout.LOCK)
        time.sleep(0.2)  # whoever else saw the stale lock has deleted it by now
    lock = Lock(folder, owner)
    lock.beat()
    lock.check()
    ended = threading.Event()

    def keep_alive() -> None:
        while not ended.wait(BEAT_SECONDS) and lock.lost_to is None:
            lock.beat()

    thread = threading.Thread(target=keep_alive, daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join(BEAT_SECONDS)
        with suppress(StoreError):  # what went wrong inside counts, and a lock that stays behind goes stale
            holder = _holder(folder)
            if holder is not None and holder["owner"] == owner:
                folder.delete(layout.LOCK)


def _record(owner: str) -> bytes:
    pid = os.getpid()
    record = {"owner": owner, "host": socket.gethostname(), "machine": _machine(), "pid": pid}
    return json.dumps(record | {"started": _started(pid), "beat": time.time()}).encode()


def _holder(folder: Folder) -> dict[str, Any] | None:
    gone = {"owner": "", "host": "?", "machine": "", "pid": 0, "started": None, "beat": 0.0}
    try:
        return gone | json.loads(bytes(folder.read(layout.LOCK)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return gone  # damaged


def _alive(holder: dict[str, Any]) -> bool:
    if holder["machine"] == _machine():
        return _started(holder["pid"]) == holder["started"] and holder["started"] is not None
    return time.time() - holder["beat"] < STALE_SECONDS


def _machine() -> str:
    """This boot of this machine, and this container's processes: host names may repeat."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None if there is none (or it is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return "running"
        return "running"
    return None if fields[0] == "Z" else fields[19]


def _name(holder: dict[str, Any]) -> str:
    return f"the job of process {holder['pid']} on {holder['host']}"
