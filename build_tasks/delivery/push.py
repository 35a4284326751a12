"""Copies the repository to a URL of fsspec, whole models at a time, so that Triton can read it there at any moment.

    SHA256SUMS here ─┐
    SHA256SUMS there ┴─► files that differ ─► records, versions, config.pbtxt, model.sig, SHA256SUMS; each is read back

The manifest there tells what is there: it is removed before anything else changes in a model's folder, and written when
all of it has been copied. A folder without a manifest is copied as a whole by the next push. A config.pbtxt stands only
beside the files that it describes: it is removed before one of them is replaced. The provenance of a version comes
before its other files, so that each folder tells who made it: what no push has written is not replaced.
"""

import contextlib
import hashlib
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator

from build_tasks.errors import UserError, first_lines
from build_tasks.paths import REPOSITORY
from build_tasks.provenance.verify_repository import (
    MANIFEST,
    NO_MANIFEST,
    NOT_READ,
    SIGNATURE,
    check,
    compare,
    files_of,
    list_files,
    model_folders,
    parse_manifest,
    read_files,
    read_manifest,
    sha256_of,
)
from build_tasks.runtime.cache_storage import EntryError, Storage, StorageError
from build_tasks.triton.repository import CONFIG_FILE, PROVENANCE_FILE, is_generated_name, is_marked

CHUNK_BYTES = 4 << 20
MAX_MANIFEST = 64 << 20  # bytes
MAX_HEAD = 1000  # bytes of a config.pbtxt that hold its first words
LAST = (CONFIG_FILE, SIGNATURE, MANIFEST)  # the order in which a model's last files appear
DRAFT = ".draft-"  # how the names of incomplete files in a folder begin; Triton ignores such files


class Destination(Storage):
    """A model repository behind a URL. In a folder, an incomplete file lies beside its target.

    Raises:
        UserError: If the URL of a folder has no absolute path, which fsspec would take for one in this checkout.
    """

    def __init__(self, url: str):
        if re.match("(file|local)://(?!/)", url):
            raise UserError(f"expected an absolute path such as file:///srv/models, found {url}")
        super().__init__(url)

    def draft(self, path: str) -> str:
        folder, name = posixpath.split(path)
        return f"{folder}/{DRAFT}{uuid.uuid4().hex}-{name}"

    def local_folder(self) -> str | None:
        """Return the path of a folder of this machine; None for other URLs."""
        from fsspec.implementations.local import LocalFileSystem

        return self._root if isinstance(self._files, LocalFileSystem) else None


def push(url: str, models: list[str], listener: Callable[[str], None]) -> None:
    """Copy models of the repository to a URL, where they differ.

    Args:
        listener: Takes a line about each model.
    Raises:
        UserError: If a model here is damaged, if the copy fails, or if somebody else's files are there.
    """
    try:
        destination = Destination(url)
        refuse_own_repository(destination.local_folder())
        for model in models:
            count, size = push_model(destination, model)
            listener(f"{model}: {count} files, {size / 1e6:.1f} MB" if count else f"{model}: up to date")
    except (StorageError, EntryError) as error:
        raise UserError(str(error)) from error


def push_model(destination: Destination, model: str) -> tuple[int, int]:
    """Copy a model. Return the files that were copied, and their bytes."""
    folder = f"{REPOSITORY}/{model}"
    own = own_files(folder)
    try:
        there = read_remote_manifest(destination, model)
    except (FileNotFoundError, ValueError):
        there = {}
    present = destination.find(model)  # last, because a listing may wait for minutes where no server answers
    if stranger := find_stranger(destination, model, [path.removeprefix(f"{model}/") for path in present], there):
        raise UserError(
            f"{destination.url}/{model}/{stranger} was not copied there by `doit push`, and is not replaced: "
            "move it away, or delete it, and push again"
        )
    # The manifest does not list itself and the signature. They are compared by their content.
    for name in (SIGNATURE, MANIFEST):
        if (found := remote_digest(destination, f"{model}/{name}")) is not None:
            there[name] = found
    missing = {name: value for name, value in own.items() if there.get(name) != value}
    missing |= {name: value for name, value in own.items() if f"{model}/{name}" not in present}
    if not missing and len(present) == len(own):
        return 0, 0
    missing[MANIFEST] = own[MANIFEST]
    first = [MANIFEST]
    if any(f"{model}/{name}" in present and name not in LAST for name in missing):
        # A file that its config.pbtxt describes is going to be replaced. Until all are, the model is not served.
        first.append(CONFIG_FILE)
        missing[CONFIG_FILE] = own[CONFIG_FILE]
    destination.remove([path for name in first if (path := f"{model}/{name}") in present])
    size = 0
    for name in sorted(missing, key=copy_order):
        if name == MANIFEST:  # before the folder counts as complete
            destination.remove([path for path in present if path.removeprefix(f"{model}/") not in own])
        size += copy(destination, folder, model, name, missing[name])
    return len(missing), size


def copy_order(name: str) -> tuple[int, str]:
    """Return the key by which the files of a model are sorted to be copied."""
    if name in LAST:
        return 2 + LAST.index(name), name
    return (0 if posixpath.basename(name) == PROVENANCE_FILE else 1), name


def refuse_own_repository(folder: str | None) -> None:
    """Raise a UserError if a folder that shall be written is the repository of this checkout, or lies in it."""
    own, other = os.path.realpath(REPOSITORY), os.path.realpath(folder or os.sep)
    if other == own or other.startswith(f"{own}{os.sep}"):
        raise UserError(f"{folder} is in {REPOSITORY}/ of this checkout: name a folder outside of it")


def find_stranger(destination: Destination, model: str, names: Collection[str], listed: Collection[str]) -> str | None:
    """Return a file of a model's folder at the destination that no push has written; None without one.

    Args:
        names: The paths of the files there.
        listed: Those that the manifest there lists; empty without a manifest.
    """
    if CONFIG_FILE in names and not listed:
        with contextlib.suppress(FileNotFoundError):
            head = destination.read(f"{model}/{CONFIG_FILE}", MAX_MANIFEST)[:MAX_HEAD]
            if not is_marked(head.decode(errors="replace"), model):
                return CONFIG_FILE
    for name in names:
        top, _, inner = name.partition("/")
        own_version = inner and top.isdecimal() and f"{top}/{PROVENANCE_FILE}" in names
        draft = posixpath.basename(name).startswith(DRAFT)
        if name not in listed and not (own_version or draft or is_generated_name(top)):
            return name
    return None


def own_files(folder: str) -> dict[str, str]:
    """Return the sha256 of each file of a model here, by its path in the folder, with manifest and signature.

    Raises:
        UserError: If the model has no manifest, or if a file was added or is missing.
    """
    try:
        listed = read_manifest(folder)
    except ValueError as error:
        raise UserError(f"{folder}: {error}; `doit` publishes it again") from error
    files, others = list_files(folder)
    if differences := compare(listed, {**{name: listed.get(name, NOT_READ) for name in files}, **others}):
        raise UserError(f"{folder}: {differences[0]}; nothing of it was copied; `doit` publishes it again")
    return {**listed, **{name: sha256_of(f"{folder}/{name}") for name in (SIGNATURE, MANIFEST) if name in files}}


def copy(destination: Destination, folder: str, model: str, name: str, expected: str) -> int:
    """Copy a file, and read the copy back. Return its bytes.

    Raises:
        UserError: If the file here or the copy is not what the manifest lists.
    """
    result, size = hashlib.sha256(), 0

    def chunks() -> Iterator[bytes]:
        nonlocal size
        with open(f"{folder}/{name}", "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                result.update(chunk)
                size += len(chunk)
                yield chunk
        if result.hexdigest() != expected:
            raise EntryError(f"{folder}: changed: {name}; nothing was written; `doit verify --heal` builds it again")

    destination.write(f"{model}/{name}", chunks())
    if remote_digest(destination, f"{model}/{name}") != expected:
        raise UserError(f"{destination.url}/{model}/{name}: the copy differs from the file; push again")
    return size


def remote_digest(destination: Destination, path: str) -> str | None:
    """Return the sha256 of a file at the destination, None if it does not exist."""
    result = hashlib.sha256()
    if (size := destination.size(path)) is None:
        return None
    try:
        destination.stream(path, size, result.update)
    except FileNotFoundError:
        return None
    return result.hexdigest()


def read_remote_manifest(destination: Destination, model: str) -> dict[str, str]:
    """Return what the manifest of a model at the destination lists.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it cannot be read.
    """
    text = destination.read(f"{model}/{MANIFEST}", MAX_MANIFEST).decode(errors="surrogateescape")
    try:
        return parse_manifest(text)
    except ValueError as error:
        raise ValueError(f"{MANIFEST}: {error}") from None


def verify(url: str, models: list[str]) -> dict[str, list[str]]:
    """Read every byte of a repository behind a URL. Return what differs from its manifests, by model.

    Raises:
        UserError: If it cannot be read, or if there is no model.
    """
    try:
        destination = Destination(url)
        folder = destination.local_folder()
        if not folder:
            destination.size(MANIFEST)  # fails within seconds where no server answers; a listing may wait for minutes
        found = {} if folder else destination.find("")
        names = {path.partition("/")[0] for path in found if "/" in path}
        if folder and os.path.isdir(folder):
            names = {*model_folders(folder)}
        requested = list(dict.fromkeys(models)) or sorted(names)
        if not requested:
            raise UserError(f"{destination.url} has no model")
        if folder:  # there are links and empty folders, and several files can be read at once
            problems = check(folder, requested, read_files(files_of(folder, requested)))
        else:
            problems = {model: differences(destination, model, found) for model in requested}
        return {model: [f"{model}: {line}" for line in lines] for model, lines in problems.items()}
    except StorageError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{destination.url}: {first_lines(error)}") from error


def differences(destination: Destination, model: str, found: Iterable[str]) -> list[str]:
    """Return the differences between a model at the destination and its manifest there."""
    paths = [path for path in found if path.startswith(f"{model}/")]
    if not paths:
        return ["there is no such folder"]
    try:
        listed = read_remote_manifest(destination, model)
    except FileNotFoundError:
        return [NO_MANIFEST]
    except ValueError as error:
        return [str(error)]
    digests = {path.removeprefix(f"{model}/"): remote_digest(destination, path) or "gone" for path in paths}
    return compare(listed, digests)
