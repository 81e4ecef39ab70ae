"""The one exception that means: the caller can fix this."""


class UserError(Exception):
    """A mistake in what the user gave: its one line says what, where, expected, got, and the cure.

    Commands print it and exit with code 2; everything else is a fault and exits with 1.
    """
