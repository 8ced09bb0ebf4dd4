"""The one exception that bad input raises, and how its message quotes a value."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is wrong, where, and what would be right.

    The command line prints the message and no traceback.
    """


def short(value: object) -> str:
    """`repr`, cut to what a line can hold."""
    try:
        text = " ".join(repr(value).split())  # arrays have lines
    except ValueError:  # Python refuses to print an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
