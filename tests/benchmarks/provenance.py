"""What a page of measurements says of where its numbers come from."""

import os
import platform
import time
from pathlib import Path


def provenance(command: str, machine: str | None = None) -> str:
    """Command, commit, date, machine and Python, as the beginning of a sentence."""
    from pipelines.tracking import commit  # loads MLflow, which bench_gpu's machine need not have

    machine = machine or f"{os.cpu_count()} cores of {processor()}"
    return f"`{command}` at commit {commit()}, {time.strftime('%F')}, {machine}, Python {platform.python_version()}"


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
