"""Shows text that others wrote: from plan files, from names of files, from errors of other libraries."""

import unicodedata

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that steer what shows them: controls, bidi marks, surrogates, separators of lines."""
JOINERS = frozenset("\u200c\u200d")
"""Of these, the ones that ordinary words and emoji are spelt with. They join or part the letters beside them, and no more."""


def visible(text: str) -> str:
    r"""Returns the text with its control characters as escapes, so that no terminal or browser obeys them.

    >>> print(visible("red: \x1b[31m, two\nlines, backwards: \u202e"))
    red: \x1b[31m, two\nlines, backwards: \u202e
    """
    return "".join(_escaped(letter) if _steers(letter) else letter for letter in text)


def _steers(letter: str) -> bool:
    return unicodedata.category(letter) in HIDDEN and letter not in JOINERS


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
