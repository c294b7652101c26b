"""The console that commands print on, which shows text as it is, and how errors are printed."""

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from arrowhead.errors import ArrowheadError
from arrowhead.plans.foreign_text import visible


class PlainConsole(Console):
    """A console on which a string has no markup and no codes for emoji, and control characters are shown as escapes.

    Only line breaks stay. So names, paths and provenance that others wrote cannot steer the terminal. What is to have a style
    is a `Text` of words that commands know.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """The text to print for a string, as rich asks for it: an argument of `print`, a cell or a title of a table."""
        return super().render_str("\n".join(map(visible, text.split("\n"))), **settings)


console = PlainConsole()
"""What commands print on."""
TRACEBACK = "--traceback"


def run(app: Callable[..., Any]) -> None:
    """Run a command line. An error is printed as one line, and its traceback where `--traceback` is among the arguments.

    The exit status is 2 for an error of arrowhead, and 1 for an error of the pipeline or of another library.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != TRACEBACK]
    try:
        app(arguments)
    except Exception as error:
        if TRACEBACK in sys.argv:
            raise
        known = isinstance(error, ArrowheadError)
        line = f": {one_line(error)}" + ("" if known else f" ({TRACEBACK} shows where)")
        PlainConsole(stderr=True).print(Text.assemble((type(error).__name__, "red"), line), soft_wrap=True)
        sys.exit(2 if known else 1)


def one_line(error: Exception) -> str:
    """The message of an error in one line."""
    return visible(" ".join(filter(None, (line.strip(" ") for line in str(error).split("\n")))))
