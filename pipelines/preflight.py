"""What every node of a cluster must have, looked at before a job plans anything: one small task on each.

A task by itself needs nothing of this project, as the project may be what a node lacks. This module loads no Ray; the
tasks start from `cluster`.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from feature_store.errors import StoreError
from feature_store.storage import open_folder
from feature_store.urls import is_url, local_path, redacted
from fsdino.errors import Fault, UserError, first_line

CLOCK_SECONDS = 20.0  # a lock counts as stale after 60 s without its beat of every 10 s
SEEN_SECONDS = 5.0
ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Needs:
    """What a job needs on every node."""

    written: tuple[str, ...] = ()
    """Paths that nodes write for one another, and URLs."""
    read: tuple[str, ...] = ()
    """Paths and URLs that exist already."""
    weights: tuple[tuple[str, str | None], ...] = ()
    """Networks, and the files that are named for their weights."""
    tracking_uri: str = ""
    """MLflow, where workers log."""


def facts() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The task: what a node is and lacks. It travels as code, and so works where the project is missing."""

    def look(asked: dict[str, Any]) -> dict[str, Any]:
        import hashlib
        import importlib.util
        import platform
        import time
        from pathlib import Path

        import ray

        found: dict[str, Any] = {"python": platform.python_version(), "ray": ray.__version__, "clock": time.time()}
        digest = hashlib.sha256()
        for package in ("fsdino", "feature_store", "pipelines"):
            try:
                spec = importlib.util.find_spec(package)
            except (ImportError, ValueError):
                spec = None
            if spec is None or spec.origin is None:
                return found | {"code": None, "lacks": []}
            root = Path(spec.origin).parent
            for file in sorted(root.rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
        found["code"] = digest.hexdigest()[:12]
        try:
            from pipelines import preflight

            return found | {"lacks": preflight.lacking(asked)}
        except Exception as error:  # whatever an import of another release, or with other packages, may raise
            return found | {"lacks": [], "broken": f"{type(error).__name__}: {error}".splitlines()[0]}

    return look


def question(needs: Needs, probes: Mapping[str, str]) -> dict[str, Any]:
    """What a node is asked, in types that need no project. `probes` are paths to the files that the driver wrote
    there."""
    sizes = {name: _size(weights) for name, weights in needs.weights}
    read = [place for place in needs.read if _exists(place) and not (is_url(place) and set("*?[") & set(place))]
    return asdict(needs) | {"probes": dict(probes), "sizes": sizes, "read": read}


@contextmanager
def probes(needs: Needs) -> Iterator[dict[str, str]]:
    """A file of the driver's in each path that nodes share, until the end of the block: path to file."""
    written: dict[str, str] = {}
    try:
        for path in filter(None, map(local_path, needs.written)):
            probe = Path(path) / f"probe-{uuid.uuid4().hex}"
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            written[path] = str(probe)
        yield written
    finally:
        for file in written.values():
            with suppress(OSError):
                os.unlink(file)


def problems(node: str, expected: Mapping[str, Any], found: Mapping[str, Any], asked_at: float) -> Iterator[str]:
    """What is wrong with a node, most telling first. Its clock is compared with the time from `asked_at` until now."""
    if found["code"] is None:
        yield (
            f"node {node}: expected this project to be importable there, found none; start the node from the same "
            "image or environment (or set PYTHONPATH before `ray start`)"
        )
        return
    if found["code"] != expected["code"]:
        yield (
            f"node {node}: expected the driver's code {expected['code']}, got {found['code']}; bring the same commit "
            "or image to every node, and restart Ray there"
        )
        return
    for what in ("python", "ray"):
        if found[what] != expected[what]:
            yield (
                f"node {node}: expected {what.capitalize()} {expected[what]} as the driver has, got {found[what]}; "
                "start every node from one image or environment"
            )
    early, late = asked_at - found["clock"], found["clock"] - time.time()
    if max(early, late) > CLOCK_SECONDS:
        ahead = f"{late:.0f} s ahead" if late > early else f"{early:.0f} s behind"
        yield (
            f"node {node}: expected a clock within {CLOCK_SECONDS:.0f} s of the driver's, got one {ahead}; "
            "let NTP or chrony set it (locks and signatures depend on it)"
        )
    if "broken" in found:
        yield f"node {node}: the project does not load there ({found['broken']}); install its packages as the driver's"
    for line in found["lacks"]:
        yield f"node {node}: {line}"


def lacking(asked: Mapping[str, Any]) -> list[str]:
    """What this node lacks of what it is asked for, a line for each."""
    lines: list[str] = []
    for path, probe in asked["probes"].items():
        lines += _path(path, probe)
    for url in dict.fromkeys(place for place in asked["written"] if local_path(place) is None):
        lines += _answers(url, partial(_listed, url))
    for place in asked["read"]:
        lines += _readable(place)
    for name, weights in asked["weights"]:
        lines += _weights(name, weights, asked["sizes"].get(name))
    if asked["tracking_uri"].startswith(("http://", "https://")):
        lines += _tracking(asked["tracking_uri"])
    return lines


def _path(path: str, probe: str) -> list[str]:
    end = time.monotonic() + SEEN_SECONDS  # network file systems may take seconds to show a file
    while not os.path.exists(probe):
        if time.monotonic() > end:
            return [f"{path}: this path is not shared by all nodes; use s3:// or a shared file system"]
        time.sleep(0.25)
    if not os.access(path, os.W_OK | os.X_OK):
        return [f"{path}: expected a folder that can be written, but this node's user may not; change its permissions"]
    return []


def _readable(place: str) -> list[str]:
    path = local_path(place.rsplit("::", 1)[-1])
    if path is not None:
        if os.path.exists(path):
            return []
        return [f"{path}: expected what the driver sees there, found nothing; mount or copy it on every node"]
    import fsspec

    place = place.rsplit("::", 1)[-1]

    def found() -> bool:
        fs, inside = fsspec.url_to_fs(place)
        return fs.exists(inside)

    return _answers(place, found)


def _listed(url: str) -> list[str]:
    return open_folder(url).names("")


def _answers(url: str, ask: Callable[[], object]) -> list[str]:
    """A place beyond this machine answers, and lets us in."""
    cure = "set the credentials and the endpoint before `ray start` there (docs/cluster.md)"
    try:
        if ask() is False:
            return [f"{redacted(url)}: expected what the driver sees there, found nothing; {cure}"]
    except (StoreError, UserError) as error:
        return [f"{first_line(error)}; on this node {cure}"]
    except Exception as error:  # drivers of fsspec raise what they like
        return [f"{redacted(url)}: cannot be read from there ({first_line(error)}); {cure}"]
    return []


def _weights(name: str, weights: str | None, size: int | None) -> list[str]:
    """The weights are there, or may be downloaded."""
    from fsdino import weights as of

    try:
        if weights is None and name in of.PUBLISHED:
            url = of.PUBLISHED[name].url
            if of.offline() or (of.cache_folder() / url.rsplit("/", 1)[1]).exists():
                of.weights_file(name)
            else:
                _request(url, "HEAD")
        elif (weights is None and name in of.specs.DINOV3) or str(weights).startswith("hf:"):
            if of.offline():
                of.weights_file(name, weights)
        else:
            path = of.weights_file(name, weights)
            here = path.stat().st_size if path else None
            if size is not None and here != size:
                return [f"{path}: expected the driver's {size} bytes, got {here}; copy the same file to every node"]
    except (UserError, Fault) as error:
        return [str(error)]
    except OSError as error:
        return [
            f"the weights of {name}: {of.PUBLISHED[name].url} does not answer ({first_line(error)}); put the file into "
            "FSDINO_CACHE on every node, or open the way there"
        ]
    return []


def _tracking(uri: str) -> list[str]:
    """MLflow's server answers, and knows us."""
    import urllib.error

    try:
        _request(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get?experiment_id=0", "GET")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            told = error.read(200).decode(errors="replace").strip() or error.reason
            return [
                f"{redacted(uri)}: MLflow refuses this node ({error.code}: {told[:120]}); set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD before `ray start`, or allow the name by `mlflow server --allowed-hosts`"
            ]
    except OSError as error:
        return [
            f"{redacted(uri)}: MLflow does not answer ({first_line(error)}); name an address that every node reaches"
        ]
    return []


def _request(url: str, method: str) -> None:
    import base64
    import urllib.request

    request = urllib.request.Request(url, method=method)
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD"))
    if method == "GET" and user and password:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    elif method == "GET" and "MLFLOW_TRACKING_TOKEN" in os.environ:
        request.add_header("Authorization", f"Bearer {os.environ['MLFLOW_TRACKING_TOKEN']}")
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS):
        pass


def _size(weights: str | None) -> int | None:
    """Bytes of a file that is named."""
    if weights is None or is_url(weights) or weights.startswith("hf:"):
        return None
    with suppress(OSError):
        return os.path.getsize(weights)
    return None


def _exists(place: str) -> bool:
    """Whether the driver sees a place; of a URL only the nodes are asked."""
    path = local_path(place.rsplit("::", 1)[-1])
    return path is None or os.path.exists(path)


def databases(tracking_uri: str) -> tuple[str, ...]:
    """The folder of a SQLite file, which workers write too."""
    if urlsplit(tracking_uri).scheme != "sqlite":
        return ()
    return (os.path.dirname(os.path.abspath(tracking_uri.removeprefix("sqlite:///"))),)
