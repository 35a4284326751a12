"""The format of a build cache: actions, which name the results of stages, and blobs, which hold their bytes.

    <URL>/v1/actions/<first two characters>/<key of the stage>/<key of its tools>.json
    <URL>/v1/blobs/<first two characters>/<sha256>            or <sha256>.gz

The two parts are those of Bazel's Remote Execution API (action cache, content-addressable storage). A blob is written
before the action that names it, so that what an action names exists, until somebody prunes the cache.
"""

import hashlib
import json
import os
import posixpath
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec

from build_tasks.runtime.cache_storage import CHUNK, SMALL, AbandonedError, DamagedError

FORMAT = "v1"  # another format has another folder
ACTIONS, BLOBS = f"{FORMAT}/actions", f"{FORMAT}/blobs"
MAX_ACTION = 4 << 20  # bytes
STORED = re.compile(r"([0-9a-f]{64})(\.gz)?")

# A file is compressed if a part of it becomes smaller than this share, and if it is small enough to be kept in memory.
WORTH_COMPRESSING = 0.8
PROBE = 256 << 10  # bytes
MAX_COMPRESSED = 64 << 20  # bytes
GZIP = 16 + zlib.MAX_WBITS
HASHED_BEHIND = 4  # chunks that may wait for their sha256 while the next ones are written


class Blob(msgspec.Struct, frozen=True):
    """One file of a result.

    Attributes:
        sha256: Of its content.
        size: Bytes of its content.
        stored: The name of the blob: the sha256, with ".gz" if it is compressed.
        stored_size: Bytes of the blob.
    """

    sha256: str
    size: int
    stored: str
    stored_size: int

    def __post_init__(self) -> None:
        found = STORED.fullmatch(self.stored)
        if found is None or found[1] != self.sha256 or min(self.size, self.stored_size) < 0:
            raise ValueError(f"no name of a blob: {self.stored}")

    @property
    def path(self) -> str:
        """Its path below the URL of the cache."""
        return f"{BLOBS}/{self.stored[:2]}/{self.stored}"


class Output(msgspec.Struct, frozen=True):
    """One target of a stage.

    Attributes:
        digest: Of the file or folder, as runtime/digests.py computes it.
        files: The blobs; by path in the folder, or under "" for a file.
    """

    digest: str
    files: dict[str, Blob]

    def __post_init__(self) -> None:
        for path in self.files:
            if path and (path != posixpath.normpath(path) or path.startswith(("/", "..")) or "\\" in path):
                raise ValueError(f"no path in a folder: {path}")


class Action(msgspec.Struct, frozen=True):
    """The result of one run of a stage.

    Attributes:
        stage: Its name, "onnx" for example.
        outputs: The targets, by the names that the stage gives them.
        tools: Versions of its tools and facts about the machine, as in the record of a build.
        notes: What `build` returned.
        seconds: The time that it took.
        machine: Who built it, on which host, with which driver of the GPU.
        time: When, in seconds since 1970.
    """

    stage: str
    outputs: dict[str, Output]
    tools: dict[str, str]
    notes: dict[str, Any]
    seconds: float
    machine: dict[str, str]
    time: float

    @property
    def blobs(self) -> list[Blob]:
        return [blob for output in self.outputs.values() for blob in output.files.values()]

    @property
    def size(self) -> int:
        """Bytes of all targets."""
        return sum(blob.size for blob in self.blobs)

    def encode(self) -> bytes:
        # The json of the standard library keeps the NaN of a note.
        return json.dumps(msgspec.to_builtins(self), indent=1).encode()


def decode(content: bytes) -> Action | None:
    """Return an action, None if the content is none."""
    try:
        return msgspec.convert(json.loads(content), Action)
    except (ValueError, RecursionError):  # also msgspec.ValidationError
        return None


def key_of(parts: Mapping[str, Any]) -> str:
    """Return the key of plain data: the sha256 of its JSON with sorted keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def folder_of(key: str) -> str:
    """Return the folder of a stage's actions, below the URL of the cache."""
    return f"{ACTIONS}/{key[:2]}/{key}"


def path_of(key: str, tools: Mapping[str, str]) -> str:
    """Return the path of the action of a stage with these tools."""
    return f"{folder_of(key)}/{key_of(tools)}.json"


def files_of(path: str) -> dict[str, str]:
    """Return the files of a target: path in the folder -> path. A target that is a file has the path ""."""
    if not os.path.isdir(path):
        return {"": path}
    files = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return {os.path.relpath(file, path).replace(os.sep, "/"): file for file in sorted(files)}


def compressed(path: str) -> bytes | None:
    """Return the content of a file in gzip's format if that is worth it, else None. The same content gives the same."""
    if (size := os.path.getsize(path)) > MAX_COMPRESSED:
        return None
    with open(path, "rb") as file:
        file.seek(size // 2)
        probe = file.read(PROBE)
        if len(zlib.compress(probe, 1)) > WORTH_COMPRESSING * len(probe):
            return None
        file.seek(0)
        content = file.read()
    compressor = zlib.compressobj(6, wbits=GZIP)
    return compressor.compress(content) + compressor.flush()


def chunks_of(path: str, sha256: str) -> Iterator[bytes]:
    """Yield the content of a file.

    Raises:
        AbandonedError: At the end, if the content is another one.
    """
    read = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            read.update(chunk)
            yield chunk
    if read.hexdigest() != sha256:
        raise AbandonedError


class Verifier:
    """Takes the bytes of a blob as they are stored, and passes the content on; `finish` says whether it is right.

    The sha256 of a large blob is computed in a thread, while the content is read and written: hashlib releases Python's
    lock. Computing a sha256 takes as long as copying, so that a file would otherwise take twice the time of a copy.

    Args:
        blob: What the content must be.
        sink: Takes the content.
    """

    def __init__(self, blob: Blob, sink: Callable[[bytes], object]):
        self._blob = blob
        self._sink = sink
        self._left = blob.size
        self._sha256 = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "sha256") if blob.size > SMALL else None
        self._unfinished: deque[Future[None]] = deque()
        self._decompressor = zlib.decompressobj(wbits=GZIP) if blob.stored.endswith(".gz") else None

    def __call__(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            DamagedError: If they cannot be a part of the blob.
        """
        if self._decompressor is not None:
            try:
                chunk = self._decompressor.decompress(chunk, self._left + 1)
            except zlib.error as error:
                raise DamagedError(str(error)) from error
        self._left -= len(chunk)
        if self._left < 0:
            raise DamagedError(f"more than {self._blob.size} bytes")
        if self._thread is None:
            self._sha256.update(chunk)
        else:
            self._unfinished.append(self._thread.submit(self._sha256.update, chunk))
        self._sink(chunk)
        if len(self._unfinished) > HASHED_BEHIND:
            self._unfinished.popleft().result()

    def finish(self) -> None:
        """Check that all has come.

        Raises:
            DamagedError: If the content is another one.
        """
        if self._thread is not None:
            self._thread.shutdown()
        if self._left:
            raise DamagedError(f"{self._blob.size - self._left} of {self._blob.size} bytes")
        if self._sha256.hexdigest() != self._blob.sha256:
            raise DamagedError("another sha256")
