"""What runs on a worker of a farm. The head sends this module by value, so it imports nothing of this project.

manifest: path -> sha256 ─► the build cache ─► a checkout of the worker ─► doit TASK ... ─► results in the build cache
                                                                             └► lines ─► the head
"""

import contextlib
import ctypes
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
from typing import Any

TOPIC = "doit farm"  # of the messages to the head
FOLDER = "BUILD_FARM_FOLDER"  # where a worker has its checkouts
SHOWN = re.compile(r"^(?:\d\d:\d\d:\d\d )?([✓✗!+x] .*|  \| .*)$")  # the lines of doit that the head shows, too
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def describe(distributions: list[str]) -> dict[str, str]:
    """Return the versions of this worker that have to be those of the head; a distribution that is absent is left out.

    Args:
        distributions: All that results depend on.
    """
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name).partition("+")[0]
    return found


def run_tasks(url: str, code: str, model: str, tasks: list[str]) -> dict[str, Any]:
    """Run tasks of doit in this worker's checkout, and return the exit code and the end of the output.

    Args:
        url: The build cache.
        code: The sha256 of the list of the project's own files.
        model: The sha256 of the list of the model's files.
    """
    from distributed import get_worker

    worker = get_worker()
    name = str(worker.name)
    folder = os.environ.get(FOLDER) or os.path.join(worker.local_directory, "checkouts")
    checkout = checkout_of(url, code, model, folder)
    environment = {**os.environ, "BUILD_CACHE": url, "BUILD_CACHE_MODE": "write", "PYTHONUTF8": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "doit", *tasks],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        preexec_fn=end_with_parent,
    )
    output = []
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line)
        if shown := SHOWN.match(line.rstrip("\n")):
            worker.log_event(TOPIC, {"line": shown[1], "name": name})  # Dask adds the address
    return {"code": process.wait(), "worker": name, "output": "".join(output[-40:])}


def end_with_parent() -> None:
    """Let the process that starts now end when the worker is killed. Only Linux can do that."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def checkout_of(url: str, code: str, model: str, folder: str) -> str:
    """Return the path of a checkout with one model. Its other files are links to those that all checkouts share.

    With all models of a large project in it, each call of doit would read all specs.
    """
    shared = fetch_files(url, code, os.path.join(folder, code[:16]))
    checkout = fetch_files(url, model, os.path.join(folder, f"{code[:16]}-{model[:16]}"))
    for name in os.listdir(shared):
        if not name.startswith("."):
            with contextlib.suppress(FileExistsError):
                os.symlink(os.path.join(shared, name), os.path.join(checkout, name))
    return checkout


def fetch_files(url: str, manifest: str, checkout: str) -> str:
    """Write the files of a list into a folder; returns its path. Those of an earlier call stay."""
    import fsspec

    done = os.path.join(checkout, ".complete")
    if os.path.exists(done):
        return checkout
    os.makedirs(checkout, exist_ok=True)
    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    blobs = f"{root.rstrip('/')}/v1/blobs"  # see runtime/cache_entries.py
    listing = os.path.join(checkout, ".manifest")
    fetch_blob(files, blobs, manifest, manifest, listing)
    with open(listing, encoding="utf-8") as file:
        contents = json.load(file)
    for path, (sha256, stored) in contents.items():
        if os.path.isabs(path) or ".." in path.split("/"):
            raise ValueError(f"no path in a project: {path}")
        target = os.path.join(checkout, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        fetch_blob(files, blobs, sha256, stored, target)
    with open(done, "w"):
        pass
    return checkout


def fetch_blob(files: Any, blobs: str, sha256: str, stored: str, target: str) -> None:
    """Write a blob of the build cache to a path.

    Args:
        files: The file system of fsspec.
        blobs: The folder of the blobs in it.
        stored: The name of the blob.
    Raises:
        ValueError: If it has another content.
    """
    path = f"{blobs}/{stored[:2]}/{stored}"
    if stored.endswith(".gz"):
        with open(target, "wb") as file:
            file.write(gzip.decompress(files.cat_file(path)))
    else:
        files.get_file(path, target)
    with open(target, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"{stored} is damaged in the build cache; `doit cache verify` removes it")
