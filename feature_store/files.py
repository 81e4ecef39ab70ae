"""Files below a store's URL: whole reads, ranges, atomic writes, exclusive creation, listing, deletion.

Local folders go through the operating system, s3:// and http(s):// through obstore (as fast as bare concurrent range
requests, see docs/benchmarks), every other scheme through fsspec. Credentials come from where AWS's tools look for
them; a URL that carries some is refused.
"""

import errno
import http.client
import os
import random
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import fsspec

from feature_store.errors import StoreError, StoreFault

T = TypeVar("T")
Bytes = bytes | memoryview
REQUEST_SECONDS = 120.0  # for one request, body included; FSDINO_STORE_TIMEOUT overrides it
PATIENCE_SECONDS = 180.0  # after which no further try is made
SIGNED_SECONDS = 3600.0  # for how long an address is signed; it is used for half of that
TRIES = 6
BACKOFF_SECONDS = 0.2  # doubled at each try, and drawn at random up to that


class Folder(ABC):
    """The files of one store. Missing files raise FileNotFoundError, a place that fails StoreFault."""

    url: str

    @abstractmethod
    def read(self, key: str) -> Bytes:
        """A whole file."""

    @abstractmethod
    def span(self, key: str, start: int, length: int) -> Bytes:
        """`length` bytes from `start`, or from the end if it is negative; fewer where the file ends."""

    @abstractmethod
    def write(self, key: str, parts: Sequence[Bytes]) -> None:
        """Write a file so that a reader sees all of it or nothing, whatever is killed."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write a file unless it is there, then false. Atomic locally and on S3."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a file; one that is not there is no error."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Base names of the files in a folder, sorted; none if it is not there."""


def is_url(place: str) -> bool:
    """Whether a place is a URL (or a chain of them) rather than a path, which may hold any number of colons."""
    return not place.startswith("/") and ("://" in place or "::" in place)


def absolute(url: str) -> str:
    """The URL, or the absolute form of a local path, so that every process means the same place.

    Raises StoreError if the URL carries credentials: they would end in logs, manifests and tracking.
    """
    if not is_url(url):
        return os.path.abspath(url)
    if url != redacted(url):
        raise StoreError(
            f"{redacted(url)}: expected a URL without credentials or a query; put credentials into the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    return url


def redacted(place: str) -> str:
    """A place as it may be written down: without credentials, and without queries, which may hold a signature."""
    if not is_url(place):
        return place
    return "::".join(_plain(part) for part in place.split("::"))


def _plain(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = rest.partition("/")
    if scheme in ("http", "https"):
        path = path.partition("?")[0]
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def local_path(url: str) -> str | None:
    """The path of a local store, None for a remote one."""
    if not is_url(url):
        return url
    return url.removeprefix("file://") if url.startswith("file://") else None


def open_folder(url: str) -> Folder:
    """The files below a URL. Raises StoreError if its scheme is unknown or its driver is not installed."""
    url = absolute(url)
    path = local_path(url)
    if path is not None:
        return LocalFolder(url, path)
    if urlsplit(url).scheme in ("s3", "http", "https"):
        return ObjectFolder(url)
    return FsspecFolder(url)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and path of a URL. Raises StoreError if the scheme is unknown or lacks its driver."""
    try:
        return fsspec.url_to_fs(absolute(url))
    except (ValueError, ImportError) as error:
        raise StoreError(f"{redacted(url)}: expected a path or an fsspec URL, got: {error}") from None


class LocalFolder(Folder):
    """A folder of this machine or of a shared file system."""

    def __init__(self, url: str, path: str):
        self.url, self.path = url, path

    def read(self, key: str) -> Bytes:
        """See Folder."""
        with place(self.url, key), open(os.path.join(self.path, key), "rb") as file:
            return file.read()

    def span(self, key: str, start: int, length: int) -> Bytes:
        """See Folder."""
        with place(self.url, key), open(os.path.join(self.path, key), "rb", buffering=0) as file:
            begin = start if start >= 0 else max(os.fstat(file.fileno()).st_size + start, 0)
            return os.pread(file.fileno(), length, begin)

    def write(self, key: str, parts: Sequence[Bytes]) -> None:
        """See Folder. A killed write leaves a `.partial` file, which `gc` removes."""
        target = os.path.join(self.path, key)
        partial = f"{target}.{uuid.uuid4().hex}.partial"
        with place(self.url, key):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                self._write(partial, parts)
                os.replace(partial, target)
            except BaseException:
                _remove(partial)
                raise

    def create(self, key: str, data: bytes) -> bool:
        """See Folder."""
        target = os.path.join(self.path, key)
        partial = f"{target}.{uuid.uuid4().hex}.partial"
        with place(self.url, key):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                self._write(partial, [data])
                os.link(partial, target)  # fails if the target is there, unlike a rename
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                if os.path.exists(target):  # a file system without hard links: exclusive but for a race
                    return False
                os.replace(partial, target)
            finally:
                _remove(partial)
        return True

    def delete(self, key: str) -> None:
        """See Folder."""
        with place(self.url, key):
            _remove(os.path.join(self.path, key))

    def names(self, folder: str) -> list[str]:
        """See Folder."""
        try:
            with place(self.url, folder):
                return sorted(e.name for e in os.scandir(os.path.join(self.path, folder)) if not e.is_dir())
        except FileNotFoundError:
            return []

    @staticmethod
    def _write(path: str, parts: Sequence[Bytes]) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            left = [memoryview(part) for part in parts if len(part)]
            while left:
                # At once, as the page cache then holds the file in large pages, which are read a tenth faster.
                written = os.writev(file, left[:1024])
                while left and written >= len(left[0]):
                    written -= len(left.pop(0))
                if written:
                    left[0] = left[0][written:]
            os.fsync(file)
        finally:
            os.close(file)


class ObjectFolder(Folder):
    """A prefix of an S3 bucket, or a folder of a web server (read only)."""

    _started_in: int | None = None  # process in which obstore's threads run; a fork does not take them along

    def __init__(self, url: str):
        self.url = url
        self._check_fork()
        self._store = _object_store(url)
        self._direct = _DirectReads(url, self._store)

    def read(self, key: str) -> Bytes:
        """See Folder."""
        import obstore

        return self._try(key, lambda: memoryview(obstore.get(self._store, key).bytes()))

    def span(self, key: str, start: int, length: int) -> Bytes:
        """See Folder."""
        import obstore

        if start >= 0:
            return self._try(key, lambda: memoryview(obstore.get_range(self._store, key, start=start, length=length)))
        suffix: Any = {"range": {"suffix": -start}}
        return self._try(key, lambda: memoryview(obstore.get(self._store, key, options=suffix).bytes())[:length])

    def span_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> bool:
        """Fill buffers, one after another, with the bytes from `start`, straight from the socket.

        False if anything went wrong: `span` tries again and says what. Saves two copies of every byte.
        """
        self._check_fork()
        return self._direct.fill(key, start, buffers)

    def write(self, key: str, parts: Sequence[Bytes]) -> None:
        """See Folder. One PUT, so nothing of a multipart upload can be left over."""
        import obstore

        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._try(key, lambda: obstore.put(self._store, key, data, use_multipart=False))

    def create(self, key: str, data: bytes) -> bool:
        """See Folder."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            self._try(key, lambda: obstore.put(self._store, key, data, mode="create", use_multipart=False))
        except AlreadyExistsError:
            try:
                return bytes(self.read(key)) == data  # an answer that got lost: the file is ours
            except FileNotFoundError:
                return False
        return True

    def delete(self, key: str) -> None:
        """See Folder."""
        import obstore

        try:
            self._try(key, lambda: obstore.delete(self._store, key))
        except FileNotFoundError:
            return

    def names(self, folder: str) -> list[str]:
        """See Folder."""
        import obstore

        found = self._try(folder, lambda: obstore.list_with_delimiter(self._store, f"{folder}/" if folder else None))
        return sorted(entry["path"].rsplit("/", 1)[-1] for entry in found["objects"])

    def _check_fork(self) -> None:
        if ObjectFolder._started_in not in (None, os.getpid()):
            raise StoreError(
                f"{self.url}: this process was forked from one that had used a remote store, and its connections do "
                "not survive that; start workers by spawn (DataLoader: multiprocessing_context='spawn')"
            )
        ObjectFolder._started_in = os.getpid()

    def _refused(self, key: str, error: BaseException) -> StoreError:
        return StoreError(
            f"{self.url}/{key}: the object store refuses ({_first_line(error)}); check the credentials in the "
            "environment and what they allow"
        )

    def _try(self, key: str, request: Callable[[], T]) -> T:
        """The request, tried again while the server fails: obstore itself tries only what is safe by HTTP's rules."""
        from obstore import exceptions

        def translated() -> T:
            try:
                return request()
            except exceptions.NotFoundError:
                raise FileNotFoundError(f"{self.url}/{key}") from None
            except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError) as error:
                raise self._refused(key, error) from None
            except exceptions.NotSupportedError as error:
                raise StoreError(f"{self.url}/{key}: not possible there: {_first_line(error)}") from None
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                raise
            except exceptions.BaseError as error:
                if "403 Forbidden" in str(error) or "401 Unauthorized" in str(error):  # listing has no error of its own
                    raise self._refused(key, error) from None
                raise OSError(_first_line(error)) from None

        self._check_fork()
        return _patiently(f"{self.url}/{key}", translated)


class _DirectReads:
    """Range requests over connections of our own, one for each thread; obstore signs their addresses.

    Once a server cannot be reached in this way (a proxy in between, a certificate of one's own), it is left at that.
    """

    def __init__(self, url: str, store: Any):
        self._url, self._store = url, store
        self._usable, self._connections = True, threading.local()
        self._addresses: dict[str, tuple[str, float]] = {}

    def fill(self, key: str, start: int, buffers: Sequence[memoryview]) -> bool:
        """See ObjectFolder.span_into."""
        address = self._address(key) if self._usable else None
        connection = self._connection(address) if address is not None else None
        if connection is None or address is None:
            return False
        parts = urlsplit(address)
        last = start + sum(len(buffer) for buffer in buffers) - 1
        try:
            target = urlunsplit(("", "", parts.path, parts.query, ""))
            connection.request("GET", target, headers={"Range": f"bytes={start}-{last}"})
            reply = connection.getresponse()
            if reply.status == http.client.PARTIAL_CONTENT and all(_fill(reply, buffer) for buffer in buffers):
                reply.read()
                return True
        except (OSError, http.client.HTTPException):
            pass
        connection.close()  # whatever is left of the answer goes with it; the next request connects anew
        return False

    def _address(self, key: str) -> str | None:
        """The file's address, signed where it has to be."""
        if not self._url.startswith("s3://"):
            return f"{self._url}/{quote(key)}"
        address, signed = self._addresses.get(key, ("", 0.0))
        if time.monotonic() - signed > SIGNED_SECONDS / 2 or not address:
            import obstore

            try:
                address = obstore.sign(self._store, "GET", key, timedelta(seconds=SIGNED_SECONDS))
            except (obstore.exceptions.BaseError, ValueError):  # a public bucket, say
                self._usable = False
                return None
            self._addresses[key] = address, time.monotonic()
        return address

    def _connection(self, address: str) -> http.client.HTTPConnection | None:
        """This thread's connection."""
        connection = getattr(self._connections, "it", None)
        if connection is None:
            parts = urlsplit(address)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(parts.netloc, timeout=_timeout())
            try:
                connection.connect()
            except OSError:
                self._usable = False
                return None
            self._connections.it = connection
        return connection


def _fill(reply: http.client.HTTPResponse, buffer: memoryview) -> bool:
    """Read until the buffer is full; false if the answer ends before."""
    while len(buffer):
        got = reply.readinto(buffer)
        if not got:
            return False
        buffer = buffer[got:]
    return True


def _timeout() -> float:
    return float(os.environ.get("FSDINO_STORE_TIMEOUT", REQUEST_SECONDS))


class FsspecFolder(Folder):
    """A folder on any other scheme that fsspec knows."""

    def __init__(self, url: str):
        self.url = url
        self._fs, self._root = filesystem(url)

    def read(self, key: str) -> Bytes:
        """See Folder."""
        return self._try(key, lambda: self._fs.cat_file(f"{self._root}/{key}"))

    def span(self, key: str, start: int, length: int) -> Bytes:
        """See Folder."""
        end = None if start < 0 else start + length
        return self._try(key, lambda: self._fs.cat_file(f"{self._root}/{key}", start=start, end=end))

    def write(self, key: str, parts: Sequence[Bytes]) -> None:
        """See Folder. As atomic as the driver's `pipe_file`."""
        self._try(key, lambda: self._fs.pipe_file(f"{self._root}/{key}", b"".join(parts)))

    def create(self, key: str, data: bytes) -> bool:
        """See Folder, but two processes that ask at the same moment may both hear yes."""
        self._fs.invalidate_cache()
        if self._try(key, lambda: self._fs.exists(f"{self._root}/{key}")):
            return False
        self.write(key, [data])
        return True

    def delete(self, key: str) -> None:
        """See Folder."""
        try:
            self._try(key, lambda: self._fs.rm_file(f"{self._root}/{key}"))
        except FileNotFoundError:
            return

    def names(self, folder: str) -> list[str]:
        """See Folder."""
        self._fs.invalidate_cache()
        try:
            listed = self._try(folder, lambda: self._fs.ls(f"{self._root}/{folder}".rstrip("/"), detail=True))
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rsplit("/", 1)[1] for entry in listed if entry["type"] == "file")

    def _try(self, key: str, request: Callable[[], T]) -> T:
        def translated() -> T:
            try:
                return request()
            except PermissionError as error:
                raise StoreError(f"{self.url}/{key}: {error}; check who may read and write there") from None

        return _patiently(f"{self.url}/{key}", translated)


def _patiently(what: str, request: Callable[[], T]) -> T:
    """The request, up to six times and three minutes, with backoff and jitter; a missing file is an answer."""
    started = time.monotonic()
    for attempt in range(TRIES):
        try:
            return request()
        except FileNotFoundError:
            raise
        except OSError as error:
            if attempt == TRIES - 1 or time.monotonic() - started > PATIENCE_SECONDS:
                raise StoreFault(
                    f"{what}: the object store failed {attempt + 1} times, at last with: {_first_line(error)}; "
                    "see to it and run the same command again to go on"
                ) from None
            time.sleep(random.uniform(0, BACKOFF_SECONDS * 2**attempt))
    raise AssertionError("unreachable")


@contextmanager
def place(url: str, key: str) -> Iterator[None]:
    """Errors of the operating system or a driver, as errors of the store; a missing file stays what it is."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFault(
                f"{url}/{key}: no space left there; make some and run the same command again to go on"
            ) from None
        if isinstance(error, PermissionError) or error.errno in (errno.EROFS, errno.ENOTDIR):
            raise StoreError(f"{url}/{key}: {error.strerror}; check who may read and write there") from None
        raise StoreFault(f"{url}/{key}: {error}; see to it and run the same command again to go on") from None


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


_object_stores: dict[tuple[str, str | None], Any] = {}
_object_stores_lock = threading.Lock()


def _object_store(url: str) -> Any:
    """One client, with its connections, for each place of this process."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    with _object_stores_lock:
        if (url, endpoint) not in _object_stores:
            _object_stores[url, endpoint] = _new_object_store(url, endpoint)
        return _object_stores[url, endpoint]


def _new_object_store(url: str, endpoint: str | None) -> Any:
    from obstore.store import HTTPStore, S3Store

    seconds = _timeout()
    options: Any = {"timeout": timedelta(seconds=seconds), "connect_timeout": timedelta(seconds=min(seconds, 10))}
    retry: Any = {
        "max_retries": 4,
        "retry_timeout": timedelta(seconds=PATIENCE_SECONDS / 3),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
    }
    parts = urlsplit(url)
    if parts.scheme != "s3":
        options["allow_http"] = parts.scheme == "http"
        return HTTPStore(url, client_options=options, retry_config=retry)
    import botocore.exceptions
    import botocore.session

    session = botocore.session.get_session()
    try:
        config: Any = {"region": session.get_config_variable("region") or "us-east-1"}
        credentials = session.get_credentials()  # environment, profile, sign-on, container, machine: AWS's own order
    except botocore.exceptions.BotoCoreError as error:
        raise StoreError(f"{url}: no credentials for it ({error}); check AWS_PROFILE and what it leads to") from None
    if endpoint:
        config["endpoint"] = endpoint
        options["allow_http"] = endpoint.startswith("http://")
    if credentials is not None:

        def provide() -> Any:
            now = credentials.get_frozen_credentials()
            return {
                "access_key_id": now.access_key,
                "secret_access_key": now.secret_key,
                "token": now.token,
                "expires_at": datetime.now(UTC) + timedelta(minutes=15),
            }

        config["credential_provider"] = provide
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        client_options=options,
        retry_config=retry,
        **config,
    )
