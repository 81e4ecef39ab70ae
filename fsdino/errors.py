"""Whose fault it is: the caller's (UserError, exit code 2) or a machine's, a network's, a library's (Fault, 1)."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the user gave: its one line says what, where, expected, got, and the cure."""


class DataError(UserError):
    """A mistake in a data set, of which there may be more."""

    def __str__(self) -> str:
        return f"{self.args[0]} (`python -m pipelines.check_data` lists all that is wrong)"


class Fault(Exception):
    """Something failed that the caller did not get wrong, and may work on another try; one line as well."""


class DataWarning(UserWarning):
    """An input that can be read in one way only, but is not what one would expect. Commands print it as a note."""


def first_line(error: BaseException) -> str:
    """An error in one line; its type where it says nothing, or only a name."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return text if " " in text else f"{type(error).__name__} {text}".strip()


@contextmanager
def reachable(place: object) -> Iterator[None]:
    """Errors of reading a path or URL in one line: UserError where the caller may not read it, Fault where the place
    fails. A missing file stays FileNotFoundError."""
    try:
        yield
    except (UserError, Fault, FileNotFoundError):
        raise
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            f"{place}: expected a place to read, got: {first_line(error)}; check path, permissions and credentials"
        ) from None
    except (ValueError, ImportError) as error:  # fsspec's word for a scheme that it does not know
        raise UserError(f"{place}: expected a path or an fsspec URL, got: {first_line(error)}") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise Fault(f"{place}: cannot be read: {first_line(error)}; check the place and rerun") from None
        raise UserError(f"{str(place)[:80]}...: expected a path, got one that is too long") from None
    except Exception as error:  # drivers have errors of their own for servers that fail
        if type(error).__name__ in NO_CREDENTIALS:
            raise UserError(f"{place}: expected credentials for it, found none; set them in the environment") from None
        raise Fault(f"{place}: cannot be read: {first_line(error)}; check the place and rerun") from None


NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
"""botocore's errors that mean it, by name, as it is no dependency of this package."""
