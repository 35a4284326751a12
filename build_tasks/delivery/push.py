"""Copies the repository to a URL of fsspec, whole models at a time, so that Triton can read it there at any moment.

    SHA256SUMS here ─┐
    SHA256SUMS there ┴─► files that differ ─► versions, config.pbtxt, model.sig, SHA256SUMS; each is read back

The manifest there tells what is there: it is removed before anything else changes in a model's folder, and written when
all of it has been copied. A folder without a manifest is copied as a whole by the next push. A config.pbtxt stands only
beside the files that it describes: it is removed before one of them is replaced.
"""

import hashlib
import posixpath
import uuid
from collections.abc import Callable, Iterable, Iterator

from build_tasks.errors import UserError
from build_tasks.paths import REPOSITORY
from build_tasks.provenance.verify_repository import (
    MANIFEST,
    NO_MANIFEST,
    NOT_READ,
    SIGNATURE,
    compare,
    list_files,
    parse_manifest,
    read_manifest,
    sha256_of,
)
from build_tasks.runtime.cache_storage import EntryError, Storage, StorageError
from build_tasks.triton.repository import CONFIG_FILE

CHUNK_BYTES = 4 << 20
MAX_MANIFEST = 64 << 20  # bytes
LAST = (CONFIG_FILE, SIGNATURE, MANIFEST)  # the order in which a model's last files appear
DRAFT = ".draft-"  # how the names of incomplete files in a folder begin; Triton ignores such files


class Destination(Storage):
    """A model repository behind a URL. In a folder, an incomplete file lies beside its target."""

    def draft(self, path: str) -> str:
        folder, name = posixpath.split(path)
        return f"{folder}/{DRAFT}{uuid.uuid4().hex}-{name}"


def push(url: str, models: list[str], listener: Callable[[str], None]) -> None:
    """Copy models of the repository to a URL, where they differ.

    Args:
        listener: Takes a line about each model.
    Raises:
        UserError: If a model here is damaged, or if the copy fails.
    """
    try:
        destination = Destination(url)
        for model in models:
            count, size = push_model(destination, model)
            listener(f"{model}: {count} files, {size / 1e6:.1f} MB" if count else f"{model}: up to date")
    except (StorageError, EntryError) as error:
        raise UserError(str(error)) from error


def push_model(destination: Destination, model: str) -> tuple[int, int]:
    """Copy a model. Return the files that were copied, and their bytes."""
    folder = f"{REPOSITORY}/{model}"
    own = own_files(folder)
    there = read_remote_manifest(destination, model) or {}
    # The manifest does not list itself and the signature. They are compared by their content.
    for name in (SIGNATURE, MANIFEST):
        if (found := remote_digest(destination, f"{model}/{name}")) is not None:
            there[name] = found
    present = destination.find(model)
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
    for name in sorted(missing, key=lambda name: (LAST.index(name) if name in LAST else -1, name)):
        if name == MANIFEST:  # before the folder counts as complete
            destination.remove([path for path in present if path.removeprefix(f"{model}/") not in own])
        size += copy(destination, folder, model, name, missing[name])
    return len(missing), size


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


def read_remote_manifest(destination: Destination, model: str) -> dict[str, str] | None:
    """Return what the manifest of a model at the destination lists; None without one that can be read."""
    try:
        text = destination.read(f"{model}/{MANIFEST}", MAX_MANIFEST).decode(errors="surrogateescape")
        return parse_manifest(text)
    except (FileNotFoundError, ValueError):
        return None


def verify(url: str, models: list[str]) -> dict[str, list[str]]:
    """Read every byte of a repository behind a URL. Return what differs from its manifests, by model.

    Raises:
        UserError: If it cannot be read, or if there is no model.
    """
    try:
        destination = Destination(url)
        found = destination.find("")
        names = models or sorted({path.partition("/")[0] for path in found if "/" in path})
        if not names:
            raise UserError(f"{destination.url} has no model")
        return {model: differences(destination, model, found) for model in names}
    except StorageError as error:
        raise UserError(str(error)) from error


def differences(destination: Destination, model: str, found: Iterable[str]) -> list[str]:
    """Return the differences between a model at the destination and its manifest there."""
    listed = read_remote_manifest(destination, model)
    if listed is None:
        return [f"{model}: {NO_MANIFEST}"]
    paths = [path for path in found if path.startswith(f"{model}/")]
    digests = {path.removeprefix(f"{model}/"): remote_digest(destination, path) or "gone" for path in paths}
    return [f"{model}: {line}" for line in compare(listed, digests)]
