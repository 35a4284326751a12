"""The paths below a folder, for the no-op cache. Every `doit` imports this module, so it is small."""

import itertools
import os
from collections.abc import Iterator

MAX_PATHS = 200_000  # below one folder; a model with more is checked in every run


def paths_below(folder: str, with_folders: bool = True) -> list[str]:
    """Return a path, and all paths below it except Python's bytecode; at most MAX_PATHS + 1.

    Args:
        with_folders: Whether folders are listed, too. Their mtime changes when Python writes bytecode into them.
    """
    return list(itertools.islice(_walk(folder, set(), with_folders), MAX_PATHS + 1))


def _walk(folder: str, entered: set[str], with_folders: bool) -> Iterator[str]:
    """Yield a path and all paths below it.

    Args:
        entered: Folders that links led to. Each is entered once, so that links to each other have an end.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # not a folder, or not readable
        yield folder
        return
    if with_folders:
        yield folder
    for entry in entries:
        if entry.name == "__pycache__":
            continue
        linked = os.path.realpath(entry.path) if entry.is_symlink() else None
        if _is_folder(entry) and linked not in entered:
            if linked:
                entered.add(linked)
            yield from _walk(entry.path, entered, with_folders)
        else:
            yield entry.path


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
