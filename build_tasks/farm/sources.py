"""The files of the project that the workers of a farm need, as blobs in the build cache and one list of them.

dodo.py, build_tasks/, models/<requested>/ ─► blobs by sha256, those that are missing ─► manifest: path -> blob
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator

from build_tasks.paths import MODELS
from build_tasks.runtime.build_cache import BuildCache
from build_tasks.runtime.cache_entries import BLOBS

FILES = ("dodo.py", "pyproject.toml")
CODE = "build_tasks"
BYTECODE = "__pycache__"


def send(cache: BuildCache, paths: Iterable[str]) -> str:
    """Store files of the project in the cache, and return the sha256 of their list.

    Raises:
        StorageError: If the cache cannot be written.
    """
    entries = {}
    for path in paths:
        blob = cache.store_file(path)
        entries[path] = (blob.sha256, blob.stored)
    content = json.dumps(entries, indent=1, sort_keys=True).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    cache.storage.write(f"{BLOBS}/{sha256[:2]}/{sha256}", [content])
    return sha256


def files_of_code() -> Iterator[str]:
    """Yield the paths of the project's own files, relative to the project."""
    yield from (file for file in FILES if os.path.exists(file))
    yield from _files_below(CODE)


def files_of_model(model: str) -> Iterator[str]:
    """Yield the paths of the files in the folder of a model, relative to the project."""
    return _files_below(f"{MODELS}/{model}")


def _files_below(top: str) -> Iterator[str]:
    for folder, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if name != BYTECODE)
        yield from (f"{folder}/{name}" for name in sorted(names) if os.path.isfile(f"{folder}/{name}"))
