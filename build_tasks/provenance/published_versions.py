"""The versions of a published model: which ones stay beside a new one, its number, and the manifest of all.

published versions ─► same tensors, unchanged, loadable? ─► kept beside the new one ─► SHA256SUMS of the folder
"""

import os
from collections.abc import Collection

from build_tasks.paths import REPOSITORY
from build_tasks.provenance.statement import Provenance, file_digests, read_provenance
from build_tasks.provenance.verify_repository import MANIFEST, UNLISTED, format_manifest
from build_tasks.runtime import atomic_files, repository_files
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Settings
from build_tasks.triton import releases
from build_tasks.triton.repository import BYTECODE, block_bytecode, version_numbers


def reusable_versions(settings: Settings, new: Provenance) -> tuple[dict[int, Provenance], list[int]]:
    """The published versions that can be served beside a new one, by number, and the numbers of the others.

    One config.pbtxt describes all versions. So all must have the same tensors. Plans must also have the same file
    names, profiles and TensorRT version. The server's release must be able to load them: a version that fails makes the
    whole model fail. Their files must not have changed since they were published.
    """
    folder = f"{REPOSITORY}/{settings['name']}"
    numbers = version_numbers(settings["name"])
    reusable: dict[int, Provenance] = {}
    for number in sorted(numbers):
        provenance = read_provenance(f"{folder}/{number}")
        needs, release = provenance and provenance["needs"], settings["release"]  # no release: no version is kept
        if (
            provenance is not None
            and provenance["tensors"] == new["tensors"]
            and provenance["files"] == file_digests(f"{folder}/{number}")
            and not (needs and release and releases.load_error(release, "onnx", needs))
        ):
            reusable[number] = provenance
    return reusable, sorted(set(numbers) - reusable.keys())


def next_version(versions: Collection[int], unusable: Collection[int], settings: Settings) -> int:
    """The number of a new version."""
    newest = max([*versions, *unusable, 0])
    first: int = settings["first_version"]
    return max(newest + 1 if settings["keep_versions"] > 1 else newest, first)


def copy_version(published: str, target: str, model_format: str) -> None:
    """Copy the folder of a published version without bytecode."""
    repository_files.copy(published, target)
    atomic_files.remove_tree(f"{target}/{BYTECODE}")
    block_bytecode(target, model_format)


def write_manifest(folder: str) -> None:
    """Write the manifest of a model's folder. The versions that stay are links in a draft."""
    paths = [f"{parent}/{name}" for parent, _, names in os.walk(folder, followlinks=True) for name in names]
    names = {os.path.relpath(path, folder): path for path in paths}
    digests = {name: digest(path, remember=False) or "" for name, path in names.items() if name not in UNLISTED}
    with open(f"{folder}/{MANIFEST}", "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(format_manifest(digests))


def format_versions(versions: list[int]) -> str:
    return ", ".join(map(str, versions))
