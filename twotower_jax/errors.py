"""The one exception that bad input raises."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is wrong, where, and what would be right.

    The command line prints the message and no traceback.
    """
