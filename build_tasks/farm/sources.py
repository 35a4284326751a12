"""The files of the project that the workers of a farm need, as blobs in the build cache and one list of them.

dodo.py, build_tasks/, models/<requested>/ ─► blobs by sha256, those that are missing ─► manifest: path -> blob
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator

from build_tasks.paths import MODELS
from build_tasks.runtime.build_cache import BuildCache
from build_tasks.runtime.cache_entries import BLOBS

FILES = ("dodo.py", "pyproject.toml")
CODE = "build_tasks"
BYTECODE = "__pycache__"


def send(cache: BuildCache, models: Collection[str]) -> str:
    """Store the project's files in the cache, and return the sha256 of their list.

    Args:
        models: The models whose folders are sent.
    Raises:
        StorageError: If the cache cannot be written.
    """
    entries = {}
    for path in files_of_project(models):
        blob = cache.store_file(path)
        entries[path] = (blob.sha256, blob.stored)
    content = json.dumps(entries, indent=1, sort_keys=True).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    cache.storage.write(f"{BLOBS}/{sha256[:2]}/{sha256}", [content])
    return sha256


def files_of_project(models: Collection[str]) -> Iterator[str]:
    """Yield the paths of the files that a build of these models reads, relative to the project, sorted."""
    yield from (file for file in FILES if os.path.exists(file))
    for top in (CODE, *(f"{MODELS}/{model}" for model in sorted(models))):
        for folder, folders, names in os.walk(top):
            folders[:] = sorted(name for name in folders if name != BYTECODE)
            yield from (f"{folder}/{name}" for name in sorted(names) if os.path.isfile(f"{folder}/{name}"))
