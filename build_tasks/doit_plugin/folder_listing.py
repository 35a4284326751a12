"""The paths below a folder, for the no-op cache. Every `doit` imports this module, so it is small."""

import itertools
import os
from collections.abc import Iterator
from contextlib import suppress

MAX_PATHS = 200_000  # below one folder; a model with more is checked in every run


def paths_below(folder: str) -> list[str]:
    """Return a path, and all paths below it except Python's bytecode; at most MAX_PATHS + 1."""
    return list(itertools.islice(_walk(folder, set()), MAX_PATHS + 1))


def _walk(folder: str, entered: set[str]) -> Iterator[str]:
    """Yield a path and all paths below it.

    Args:
        entered: Folders that links led to. Each is entered once, so that links to each other have an end.
    """
    yield folder
    with suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name == "__pycache__":
                continue
            linked = os.path.realpath(entry.path) if entry.is_symlink() else None
            if entry.is_dir() and linked not in entered:
                if linked:
                    entered.add(linked)
                yield from _walk(entry.path, entered)
            else:
                yield entry.path
