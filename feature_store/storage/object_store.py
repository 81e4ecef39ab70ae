"""S3 buckets and web servers through obstore, at the speed of bare concurrent range requests (docs/benchmarks).

Credentials come from where AWS's tools look for them.
"""

import os
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from feature_store.errors import StoreError
from feature_store.storage.base import PATIENCE_SECONDS, Bytes, Folder, Throttled, patiently
from fsdino.errors import first_line

T = TypeVar("T")
REQUEST_SECONDS = 120.0  # for one request, body included; FSDINO_STORE_TIMEOUT overrides it


class ObjectFolder(Folder):
    """A prefix of an S3 bucket, or a folder of a web server (read only)."""

    _started_in: int | None = None  # process in which obstore's threads run; a fork does not take them along

    def __init__(self, url: str):
        self.url = url
        self._check_fork()
        self._store = _object_store(url)

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

        listed = self._try(folder, lambda: obstore.list_with_delimiter(self._store, f"{folder}/" if folder else None))
        return sorted(entry["path"].rsplit("/", 1)[-1] for entry in listed["objects"])

    def _check_fork(self) -> None:
        if ObjectFolder._started_in not in (None, os.getpid()):
            raise StoreError(
                f"{self.url}: this process was forked from one that had used a remote store, and its connections do "
                "not survive that; start workers by spawn (DataLoader: multiprocessing_context='spawn')"
            )
        ObjectFolder._started_in = os.getpid()

    def _no_bucket(self) -> StoreError:
        bucket = urlsplit(self.url).netloc
        return StoreError(f"{self.url}: expected the bucket {bucket}, found none of that name there; create it first")

    def _refused(self, key: str, error: BaseException) -> StoreError:
        return StoreError(
            f"{self.url}/{key}: the object store refuses ({first_line(error)}); check the credentials in the "
            "environment and what they allow"
        )

    def _try(self, key: str, request: Callable[[], T]) -> T:
        """The request, tried again while the server fails: obstore itself tries only what is safe by HTTP's rules."""
        from obstore import exceptions

        def translated() -> T:
            try:
                return request()
            except exceptions.NotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise self._no_bucket() from None
                raise FileNotFoundError(f"{self.url}/{key}") from None
            except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError) as error:
                raise self._refused(key, error) from None
            except exceptions.NotSupportedError as error:
                raise StoreError(f"{self.url}/{key}: not possible there: {first_line(error)}") from None
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                raise
            except exceptions.BaseError as error:
                if "NoSuchBucket" in str(error):
                    raise self._no_bucket() from None
                if "403 Forbidden" in str(error) or "401 Unauthorized" in str(error):  # listing has no error of its own
                    raise self._refused(key, error) from None
                if "SlowDown" in str(error):
                    raise Throttled(f"too many requests for one prefix ({first_line(error)})") from None
                raise OSError(first_line(error)) from None

        self._check_fork()
        return patiently(f"{self.url}/{key}", translated)


_object_stores: dict[tuple[str, ...], Any] = {}
_object_stores_lock = threading.Lock()


def _object_store(url: str) -> Any:
    """One client, with its connections, for each place of this process and each setting of where S3 is."""
    settings = tuple(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("AWS_"))
    with _object_stores_lock:
        if (url, *settings) not in _object_stores:
            _object_stores[url, *settings] = _new_object_store(url)
        return _object_stores[url, *settings]


def _new_object_store(url: str) -> Any:
    from obstore.store import HTTPStore, S3Store

    seconds = float(os.environ.get("FSDINO_STORE_TIMEOUT", REQUEST_SECONDS))
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
    config = s3_settings(url, parts.netloc)
    options["allow_http"] = config.get("endpoint", "").startswith("http://")
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        client_options=options,
        retry_config=retry,
        **config,
    )


def s3_settings(url: str, bucket: str) -> dict[str, Any]:
    """Endpoint, addressing style, region and credentials as AWS's own rules have them (environment, configuration file,
    profile, sign-on, container, machine), so that stores and photographs are looked for in the same place.

    Raises StoreError if they are not usable.
    """
    import botocore.exceptions
    import botocore.session

    session = botocore.session.get_session()
    try:
        client = session.create_client("s3", region_name=session.get_config_variable("region") or "us-east-1")
        credentials = session.get_credentials()
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise StoreError(
            f"{url}: the settings for S3 are not usable ({first_line(error)}); check AWS_ENDPOINT_URL "
            "(http://HOST:PORT), AWS_PROFILE and AWS's configuration file"
        ) from None
    if credentials is None:
        raise StoreError(
            f"{url}: expected credentials for S3, found none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE"
        )
    found = credentials

    def provide() -> Any:
        now = found.get_frozen_credentials()  # botocore renews them ten minutes before their end
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=10),
        }

    config: dict[str, Any] = {"region": client.meta.region_name, "credential_provider": provide}
    endpoint, style = client.meta.endpoint_url, (client.meta.config.s3 or {}).get("addressing_style")
    scheme, _, host = endpoint.partition("://")
    if style == "virtual":
        config |= {"virtual_hosted_style_request": True, "endpoint": f"{scheme}://{bucket}.{host}"}
    elif style == "path" or not host.endswith(".amazonaws.com"):
        config["endpoint"] = endpoint
    return config
