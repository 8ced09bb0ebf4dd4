"""Text that is seen: white space and what has no shape of its own."""

import unicodedata

SIGNS = {" ": "␣", "\n": "↵", "\t": "→"}


def label(piece: str, token: int) -> str:
    """A token as a cell shows it: one line, nothing in it invisible."""
    return "".join(SIGNS.get(c) or _seen(c) for c in piece) or f"⟨{token}⟩"


def flowing(piece: str, token: int) -> str:
    """A token in a text: its spaces and line ends are there, and lines end where they can be seen."""
    return "".join({" ": " ", "\n": "↵\n", "\t": "→\t"}.get(c) or _seen(c) for c in piece) or f"⟨{token}⟩"


def code(character: str) -> str:
    """A character that cannot be shown, by its code point."""
    return f"\u2039{ord(character):x}\u203a"


def _seen(character: str) -> str:
    """Controls, formats (which turn the text's direction) and odd spaces by their code points; others as they are."""
    kind = unicodedata.category(character)
    return code(character) if kind[0] == "Z" or kind in ("Cc", "Cf", "Cs", "Cn", "Co") else character
