"""The files that a spec names. One rule holds for all of them: they stay below the model's folder.

    models/<model>/ ─► path, links resolved ─► below the folder?            ─► it is used
                                               below BUILD_DATA_FOLDERS?    ─► weights and samples may lie there
                                               else                         ─► a mistake of the spec

What is published, shown or executed never comes from outside: labels, truth, warm-up files, Python files. What is only
read as data (weights, samples, calibration, a timing cache) may come from folders that the user's environment lists.
A walk over a folder ends: it enters each linked folder once, and counts what it sees.
"""

import itertools
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

from build_tasks.errors import UNSAFE, UserError
from build_tasks.paths import MODELS

VARIABLE = "BUILD_DATA_FOLDERS"  # environment variable: folders outside the models' from which data may be read
MAX_ENTRIES = 100_000  # files and folders that a walk looks at; ImageNet's validation set has 51,000
MAX_PART = 255  # bytes of a name in a path, as most file systems allow
MAX_PATH = 4000  # bytes of a path
# The ends of names of files that list the shards of a model. Source: huggingface_hub, serialization/_base.py.
INDEX = (".safetensors.index.json", ".bin.index.json")
MAX_INDEX = 1 << 26  # bytes of an index; that of a network with a million tensors has 60 MB
MAX_GRAPH = 16 << 20  # bytes of an ONNX file that is searched for the names of its data
# An entry of TensorProto.external_data with the key "location", as protobuf writes it, up to the length of its value.
EXTERNAL_DATA = rb"(?s)\n\x08location\x12([\x01-\x7f])"
KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISREG, "a file"))


class SpecPath(NamedTuple):
    """A path that a spec names.

    is_data: Whether it is only read as data, so that it may lie in one of the folders of BUILD_DATA_FOLDERS.
    is_folder: Whether it may be a folder.
    """

    key: str
    path: str
    is_data: bool
    is_folder: bool = False


def shards(path: str) -> list[str]:
    """Return the names of the files that an index of shards lists; none for another file, or an index that is wrong."""
    try:
        if not path.endswith(INDEX) or not os.path.isfile(path) or os.path.getsize(path) > MAX_INDEX:
            return []
        with open(path, encoding="utf-8") as file:
            names = {*json.load(file)["weight_map"].values()}
        return sorted(name for name in names if os.path.basename(name) == name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the stage that reads it reports it
        return []


def external_data(path: str) -> list[str]:
    """Return the files that a small ONNX file names for its weights, found without parsing it.

    A file with its weights in others is small. In a large one they are looked for by their usual names alone.
    """
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > MAX_GRAPH:
            return []
        with open(path, "rb") as file:
            graph = file.read()
    except OSError:  # the stage that reads it reports it
        return []
    names = {graph[found.end() : found.end() + found[1][0]] for found in re.finditer(EXTERNAL_DATA, graph)}
    inside = [os.fsdecode(name) for name in names if b"\0" not in name and not os.path.isabs(name)]
    folder, own = os.path.split(path)
    below = [name for name in inside if {own, ".."}.isdisjoint(name.split("/"))]
    return sorted(name for name in below if os.path.isfile(f"{folder}/{name}"))


def data_folders() -> list[str]:
    """Return the folders that BUILD_DATA_FOLDERS lists, with links resolved.

    Raises:
        UserError: If one of them is no absolute path.
    """
    folders = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    for folder in folders:
        if not os.path.isabs(folder):
            raise UserError(f"{VARIABLE}: expected absolute paths, separated by {os.pathsep!r}, found {folder!r}")
    return [os.path.realpath(folder) for folder in folders]


def is_below(path: str, folders: list[str]) -> bool:
    """Return whether a path with links resolved is one of the folders, or lies in one."""
    return any(path == folder or path.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders)


def roots(model: str, is_data: bool) -> list[str]:
    """Return the folders, with links resolved, in which files of a model may lie."""
    return [os.path.realpath(f"{MODELS}/{model}"), *(data_folders() if is_data else ())]


def path_mistake(model: str, named: SpecPath) -> tuple[str, str] | None:
    """Return what was expected of a path, and what was found; None if the model may use it, or if it does not exist.

    Args:
        model: The name of the model.
        named: Its path is relative to the model's folder, or absolute.
    """
    _, path, is_data, is_folder = named
    encoded = os.fsencode(path)
    if not path.isprintable() and (re.search(UNSAFE, path) or "\n" in path):  # the first word saves the expression
        return "a path without control characters", repr(path)
    if len(encoded) > MAX_PATH or max(map(len, encoded.split(b"/"))) > MAX_PART:
        return f"a path of at most {MAX_PATH} bytes, with names of at most {MAX_PART}", repr(path)
    full = os.path.join(MODELS, model, path)
    if (
        "/" not in path and os.sep not in path and path != ".."
    ):  # nearly always; to resolve links takes ten times longer
        try:
            mode = os.lstat(full).st_mode
        except OSError:
            mode = stat.S_IFLNK  # what follows finds the reason
        if stat.S_ISREG(mode):
            return None
    resolved = os.path.realpath(full)
    if not is_below(resolved, roots(model, is_data)):
        return _inside(model, is_data), _description(path, resolved)
    try:
        mode = os.stat(full).st_mode
    except FileNotFoundError:
        return None  # the stage that reads it names it
    except OSError as error:
        return "a path that can be read", f"{path!r} ({error.strerror})"
    if stat.S_ISREG(mode) or (is_folder and stat.S_ISDIR(mode)):
        return None
    return f"a file{' or a folder' if is_folder else ''}", f"{path!r}, which is {kind_of(mode)}"


def kind_of(mode: int) -> str:
    """Return in words what a path is: "a folder", "a file", …

    Args:
        mode: Its st_mode.
    """
    return next((name for test, name in KINDS if test(mode)), "a device")


def linked_folder(folder: str) -> str | None:
    """Return a link to a folder below a folder whose files are all read; None if there is none."""
    for parent, names, _ in os.walk(folder):
        for name in names:
            if os.path.islink(path := os.path.join(parent, name)):
                return path
    return None


def _inside(model: str, is_data: bool) -> str:
    more = f", or in a folder that the environment variable {VARIABLE} lists" if is_data else ""
    return f"a path in {MODELS}/{model}/, after links are resolved{more}"


def _description(path: str, resolved: str) -> str:
    return repr(path) if os.path.isabs(path) and path == resolved else f"{path!r}, which leads to {resolved!r}"


def outside_path(model: str, path: str) -> str | None:
    """Return where a path of a spec leads, with links resolved, if that is outside the model's folder."""
    resolved = os.path.realpath(os.path.join(MODELS, model, path))
    return None if is_below(resolved, roots(model, False)) else resolved


def walk(folder: str, inside: list[str] | None = None, skip_outside: bool = False) -> Iterator[str]:
    """Yield the paths of all files below a folder, except those whose name begins with a dot. FIFOs are left out.

    A linked folder is entered once. A link that leads to nothing is yielded, so that whoever reads it names it.

    Args:
        inside: Folders, with links resolved, that no link may leave. Without it, links may lead anywhere.
        skip_outside: Whether a link that leaves them is left out, instead of being an error.
    Raises:
        UserError: If a link leaves the folders, or if there are too many entries.
    """
    entered, pending, count = {os.path.realpath(folder)}, [folder], 0
    while pending:
        try:
            with os.scandir(pending.pop()) as listing:
                entries = list(itertools.islice(listing, MAX_ENTRIES + 1))
        except OSError:  # as glob: what cannot be listed has no files
            continue
        count += len(entries)
        if count > MAX_ENTRIES:
            raise UserError(f"{folder}: expected at most {MAX_ENTRIES} files and folders in it, found more")
        for entry in entries:
            if entry.name.startswith("."):
                continue
            linked = os.path.realpath(entry.path) if entry.is_symlink() else None
            if linked and inside is not None and not is_below(linked, inside):
                if skip_outside:
                    continue
                raise UserError(f"{entry.path}: expected a link to a file in {inside[0]}, found {linked!r}")
            if entry.is_dir():
                if linked not in entered:
                    pending.append(entry.path)
                if linked:
                    entered.add(linked)
            elif entry.is_file() or not os.path.exists(entry.path):
                yield entry.path
