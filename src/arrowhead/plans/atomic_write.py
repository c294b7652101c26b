"""Writes files completely or not at all: after a crash, or on a full disk, the old file is still there, and whole.

The content is written to a temporary file in the same folder and from there to the disk. Then the temporary file is renamed.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from arrowhead.errors import FileUnwritable


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing, which takes the place of `path` when the block ends. If the block raises, nothing changes.

    A new file has the permissions that any new file has here, and an existing file keeps its permissions. A symbolic link stays
    a link. A device or a pipe is written to directly.

    Raises:
        FileUnwritable: the file, or its folder, cannot be written, or the disk is full.
    """
    try:
        if "\0" in str(path):
            raise OSError(errno.EINVAL, "a NUL character in the name")
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                yield file
            return
        mode = _permissions(target)
        temporary = target.with_name(f".arrowhead-{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("xb") as file:
                if mode is not None:
                    temporary.chmod(mode)
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def write(path: str | Path, content: bytes) -> None:
    """Write a file completely or not at all, as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def write_first(path: Path, content: bytes) -> None:
    """Write a file, unless it is there already: of several processes that do this at once, one succeeds."""
    temporary = path.with_name(f".arrowhead-{secrets.token_hex(8)}.tmp")
    write(temporary, content)
    try:
        os.link(temporary, path)  # fails if the file is there, which a rename does not
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: str | Path) -> None:
    """Make a folder, and the folders above it, where they are missing.

    Raises:
        FileUnwritable: it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


class _Checked(Exception):
    """A file could have been written."""


def require_writable(path: str | Path) -> None:
    """Check that a file can be written, before the work for it begins. Its folder is made. The file is not changed.

    Raises:
        FileUnwritable: the file cannot be written.
    """
    make_folder(Path(path).parent)
    with suppress(_Checked), replacing(path):
        raise _Checked


def _permissions(path: Path) -> int | None:
    """The permissions of an existing file, which must be one that may be written; None if there is no such file."""
    if not path.exists():
        return None
    if not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):  # a rename would not ask
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return stat.S_IMODE(path.stat().st_mode)


def _unwritable(path: str | Path, error: OSError) -> FileUnwritable:
    found = FileUnwritable(
        f"cannot write {path}: {error.strerror or error}; wanted a path that can be written, on a disk with space left; free "
        "some space, or take another path"
    )
    found.errno = error.errno
    return found
