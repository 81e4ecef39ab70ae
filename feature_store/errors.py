"""Errors that name the store, the place in it, and the cure."""


class StoreError(Exception):
    """A store that is absent, unfinished, not what was expected, or damaged."""


class StoreFault(StoreError):
    """The place failed, not the request: a full disk, an object store that does not answer. Worth another try."""


class OtherArray(StoreError):
    """A Zarr array that is no feature store."""


class OtherFormat(StoreError):
    """A store that another release wrote."""


class DamagedFile(StoreError):
    """A file of a store that is not what was written; `file` is its key below the store's `url`."""

    def __init__(self, url: str, file: str, reason: str = "the file is damaged or gone"):
        self.url, self.file, self.reason = url, file, reason
        super().__init__(
            f"{url}/{file}: {reason}; run `python -m feature_store repair {url}`, then rerun the extraction"
        )

    def __reduce__(self):
        return DamagedFile, (self.url, self.file, self.reason)
