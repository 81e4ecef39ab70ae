"""Errors that name the store, the place in it, and the cure."""


class StoreError(Exception):
    """A store that is not there, not whole, not what was expected, or damaged."""


class StoreFault(StoreError):
    """The place failed, not the request: a full disk, an object store that does not answer. Worth trying again."""
