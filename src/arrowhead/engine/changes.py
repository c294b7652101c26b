"""Changes to a pipeline or a model, which are recorded before they are made: an interruption at any line can be undone."""

from collections.abc import Callable
from functools import partial
from typing import Any


class Changes:
    """Changes that are undone together, the latest first.

    A change is recorded before it is made, so what undoes it may run without the change, and may run twice. Ctrl-C may
    interrupt the undoing, too: `with changes, changes:` undoes them in the inner block, and what is left in the outer one.
    """

    def __init__(self) -> None:
        self._undos: list[Callable[[], object]] = []

    def record(self, undo: Callable[..., object], *args: Any) -> None:
        """Record what undoes the change that is made next."""
        self._undos.append(partial(undo, *args))

    def claim(self, holder: Any, name: str, owner: Any) -> bool:
        """Set an attribute of an object to its owner, until the changes are undone. Of several threads one succeeds.

        Returns False where there is another owner.
        """
        self.record(_release, holder, name, owner)
        return vars(holder).setdefault(name, owner) is owner  # one operation of a dict

    def undo(self) -> None:
        """Undo all changes. After an interruption this can be called again."""
        for undo in reversed(self._undos):
            undo()
        self._undos.clear()

    def __enter__(self) -> "Changes":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _release(holder: Any, name: str, owner: Any) -> None:
    if vars(holder).get(name) is owner:
        del vars(holder)[name]
