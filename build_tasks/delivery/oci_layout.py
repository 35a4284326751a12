"""The repository as an OCI image layout: a modelcar, which KServe mounts, written without a daemon.

    model_repository/<model> ─► one layer of each model, /models/<model> ─► config ─► manifest ─► index.json

The same models give the same bytes: files have no times and no owners.

Sources: https://github.com/opencontainers/image-spec/blob/main/image-layout.md,
https://kserve.github.io/website (modelcars: the models of an image are in /models)
"""

import hashlib
import io
import json
import os
import platform
import tarfile
from typing import IO, Any

from build_tasks.delivery.push import own_files, refuse_own_repository
from build_tasks.errors import UserError
from build_tasks.paths import REPOSITORY
from build_tasks.runtime import atomic_files, repository_files

LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
GENERATED = {"oci-layout", "index.json", "blobs"}


class _HashedFile(io.RawIOBase):
    """A file that counts and hashes what is written to it."""

    def __init__(self, file: IO[bytes]):
        self.sha256 = hashlib.sha256()
        self.size = 0
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def write(folder: str, models: list[str]) -> str:
    """Write the layout. It replaces an older one in one step.

    Returns: The digest of the image's manifest, "sha256:...".

    Raises:
        UserError: If a model is damaged, or if the folder holds something else.
    """
    refuse_own_repository(folder)
    if os.path.lexists(folder) and not {*os.listdir(folder)} <= GENERATED:
        raise UserError(f"{folder} is no OCI image layout, and is not replaced: name another folder")
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    with atomic_files.scratch_dir(parent, prefix=".oci-") as scratch:
        draft = f"{scratch}/layout"
        os.makedirs(f"{draft}/blobs/sha256")
        layers = [write_layer(draft, model) for model in models]
        config = {
            "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
            "history": [{"created_by": f"doit push --oci, {model}"} for model in models],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": write_json_blob(draft, config, CONFIG),
            "layers": layers,
        }
        described = write_json_blob(draft, manifest, MANIFEST)
        reference = {**described, "annotations": {"org.opencontainers.image.ref.name": "latest"}}
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [reference]}
        for name, value in (("oci-layout", {"imageLayoutVersion": "1.0.0"}), ("index.json", index)):
            with open(f"{draft}/{name}", "w", encoding="utf-8") as file:
                json.dump(value, file)
        atomic_files.flush(draft)
        atomic_files.replace(draft, os.path.abspath(folder))
    return str(described["digest"])


def write_layer(draft: str, model: str) -> dict[str, Any]:
    """Write the layer of a model, and return its descriptor."""
    folder = f"{REPOSITORY}/{model}"
    path = f"{draft}/blobs/layer"
    with open(path, "wb") as file:
        hashed = _HashedFile(file)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            names = [f"models/{model}/{name}" for name in sorted(own_files(folder))]
            parents = {name.rsplit("/", depth)[0] for name in names for depth in range(1, name.count("/") + 1)}
            for parent in sorted(parents):
                entry = tarfile.TarInfo(parent)
                entry.type, entry.mode = tarfile.DIRTYPE, repository_files.FOLDER_MODE
                archive.addfile(entry)
            for name in names:
                source = f"{REPOSITORY}/{name.removeprefix('models/')}"
                entry = tarfile.TarInfo(name)  # without times and owners
                entry.size, entry.mode = os.path.getsize(source), repository_files.FILE_MODE
                with open(source, "rb") as content:
                    archive.addfile(entry, content)
    digest = hashed.sha256.hexdigest()
    os.rename(path, f"{draft}/blobs/sha256/{digest}")
    return {"mediaType": LAYER, "digest": f"sha256:{digest}", "size": hashed.size}


def write_json_blob(draft: str, value: Any, media_type: str) -> dict[str, Any]:
    """Write a blob, and return its descriptor."""
    data = json.dumps(value, sort_keys=True).encode()
    digest = hashlib.sha256(data).hexdigest()
    with open(f"{draft}/blobs/sha256/{digest}", "wb") as file:
        file.write(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
