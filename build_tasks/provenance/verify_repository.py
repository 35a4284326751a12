"""Checks a model repository against its manifests: python verify_repository.py FOLDER [MODEL ...]

    FOLDER/<model>/SHA256SUMS ─► the digest of each file ─┐
    FOLDER/<model>/**         ─► every byte is read ──────┴► changed, missing and added files, exit code 1

This file needs Python 3.9 or newer, and nothing else: copy it to a server or into an init container. A manifest has the
format of coreutils, so `sha256sum -c SHA256SUMS` checks a model as well. But that does not see files that were added.

A manifest shows damage, and a wrong copy. Whoever can write into the folder can write a manifest that fits: the
signature `model.sig` shows who published a model, see docs/how-to/prove.md.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Iterable, Mapping

MANIFEST = "SHA256SUMS"
SIGNATURE = "model.sig"
UNLISTED = (MANIFEST, SIGNATURE)  # the files of a model's folder that the manifest does not list
LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # as coreutils writes them
SHA256 = re.compile("[0-9a-f]{64}")
NOT_READ = "0" * 64  # in place of the digest of a file that was not read
CHUNK_BYTES = 1 << 20
NO_MANIFEST = f"no {MANIFEST}, so nothing in this folder is proven"


def format_manifest(digests: Mapping[str, str]) -> str:
    """Return the manifest of a folder, sorted by name.

    Args:
        digests: The sha256 of each file, by its path in the folder.
    """
    lines = []
    for name in sorted(digests):
        escaped = "".join(ESCAPES.get(character, character) for character in name)
        lines.append(f"{'' if escaped == name else chr(92)}{digests[name]}  {escaped}\n")
    return "".join(lines)


def parse_manifest(text: str) -> dict[str, str]:
    """Return the sha256 of each file that a manifest lists, by its path in the folder.

    Raises:
        ValueError: If a line is no line of a manifest, or if the text is not what `format_manifest` writes.
    """
    digests: dict[str, str] = {}
    for number, line in enumerate(text.split("\n")[:-1] if text.endswith("\n") else text.split("\n"), 1):
        match = LINE.fullmatch(line)
        if not match:
            raise ValueError(f"line {number} is no digest and name")
        name = match[3]
        if match[1]:
            name = re.sub(r"\\(.)", lambda pair: {"n": "\n", "r": "\r"}.get(pair[1], pair[1]), name)
        if {"", ".", ".."} & {*name.split("/")}:
            raise ValueError(f"line {number} names {name}, which is no path in the folder")
        if name in digests:
            raise ValueError(f"line {number} names {name} a second time")
        digests[name] = match[2]
    if text != format_manifest(digests):
        raise ValueError("its lines end in CR and LF" if "\r" in text else "it is not as publishing writes it")
    return digests


def read_manifest(folder: str) -> dict[str, str]:
    """Return what the manifest of a folder lists.

    Raises:
        ValueError: If there is no manifest, or if it cannot be read.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):  # to open a FIFO waits
            raise ValueError(f"{MANIFEST} is not a file")
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            return parse_manifest(file.read())
    except FileNotFoundError:
        raise ValueError(NO_MANIFEST) from None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{MANIFEST}: {error}") from None


def list_files(folder: str) -> tuple[list[str], dict[str, str]]:
    """Return the paths of the files in a folder, and what is neither a file nor a folder with files.

    Triton takes an empty folder for a version, and follows links. Publishing writes neither.

    Returns: Paths in the folder, with "/" between their parts. The second value maps such a path to a description.
    """
    files: list[str] = []
    others: dict[str, str] = {}

    def walk(prefix: str) -> None:
        try:
            entries = sorted(os.scandir(os.path.join(folder, prefix)), key=lambda entry: entry.name)
        except OSError as error:
            others[prefix.rstrip("/") or "."] = f"unreadable: {error.strerror}"
            return
        if prefix and not entries:
            others[prefix.rstrip("/")] = "an empty folder"
        for entry in entries:
            name = prefix + entry.name
            if entry.is_symlink():
                others[name] = "a link"
            elif entry.is_dir():
                walk(name + "/")
            elif entry.is_file():
                files.append(name)
            else:
                others[name] = "a FIFO, a socket or a device"

    walk("")
    return files, others


def compare(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return a line for each difference between a manifest and a folder: changed, missing, added.

    Args:
        expected: What the manifest lists.
        found: The sha256 of each file, by its path in the folder. For what has none, a description.
    """
    names = {name for name in found if name not in UNLISTED or not SHA256.fullmatch(found[name])}

    def described(name: str) -> str:
        return name if SHA256.fullmatch(found[name]) else f"{name}, {found[name]}"

    return [
        *(f"changed: {described(name)}" for name in sorted(names & expected.keys()) if found[name] != expected[name]),
        *(f"missing: {name}" for name in sorted(expected.keys() - names)),
        *(f"added: {described(name)}" for name in sorted(names - expected.keys())),
    ]


class Progress:
    """A line about the bytes that were read, on a terminal only.

    Args:
        total: All bytes that will be read.
    """

    def __init__(self, total: int):
        self._total = total
        self._read = 0
        self._started = self._shown = time.monotonic()
        self._lock = threading.Lock()
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self.canceled = False

    def advance(self, count: int) -> None:
        if self.canceled:
            raise OSError(0, "canceled")
        with self._lock:
            self._read += count
            now = time.monotonic()
            if self._terminal and now - self._shown > 0.2:
                self._shown = now
                speed = self._read / (now - self._started)
                share, left = self._read / max(self._total, 1), (self._total - self._read) / speed
                sys.stderr.write(
                    f"\r\x1b[K{share:4.0%} of {self._total / 1e9:.1f} GB, {speed / 1e9:.2f} GB/s, {left:.0f} s left"
                )
                sys.stderr.flush()

    def end(self) -> None:
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def sha256_of(path: str, progress: Progress | None = None) -> str:
    """Return the sha256 of a file, in hex. It is read from the disk, not from the memory that the kernel caches it in.

    Raises:
        OSError: If it cannot be read, or if it is not a file.
    """
    result = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    # O_NONBLOCK: to open a FIFO would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a file")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            result.update(buffer[:count])
            if progress:
                progress.advance(count)
    return result.hexdigest()


def read_files(paths: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of each file, or "unreadable: ..." for one that cannot be read.

    Several files are read at once. A file with several names (hard links) is read once.
    """
    from concurrent.futures import ThreadPoolExecutor

    identities: dict[tuple[int, int], list[str]] = {}
    results: dict[str, str] = {}
    total = 0
    for path in dict.fromkeys(paths):
        try:
            status = os.stat(path)
        except OSError as error:
            results[path] = f"unreadable: {error.strerror}"
            continue
        names = identities.setdefault((status.st_dev, status.st_ino), [])
        total += 0 if names else status.st_size
        names.append(path)
    progress = Progress(total)

    def read(path: str) -> str:
        try:
            return sha256_of(path, progress)
        except OSError as error:
            return f"unreadable: {error.strerror}"

    groups = list(identities.values())
    pool = ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8))
    try:
        for names, digest in zip(groups, pool.map(read, (names[0] for names in groups))):  # noqa: B905  # not in Python 3.9
            results.update(dict.fromkeys(names, digest))
    except BaseException:  # Ctrl-C: the threads stop at their next megabyte
        progress.canceled = True
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown()
        progress.end()
    return results


def check(folder: str, models: Iterable[str], digests: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the differences between models and their manifests, by model.

    Args:
        folder: The repository.
        digests: What `read_files` returned for the files of these models.
    """
    problems = {}
    for model in models:
        path = f"{folder}/{model}"
        if os.path.islink(path) or not os.path.isdir(path):
            problems[model] = ["a link, not a folder" if os.path.islink(path) else "there is no such folder"]
            continue
        files, others = list_files(path)
        found = {name: digests.get(f"{path}/{name}", NOT_READ) for name in files}
        try:
            problems[model] = compare(read_manifest(path), {**found, **others})
        except ValueError as error:
            problems[model] = [str(error)]
        if SHA256.fullmatch(digests.get(f"{path}/config.pbtxt", "")):
            with open(f"{path}/config.pbtxt", encoding="utf-8", errors="replace") as file:
                mark = re.match("# Generated by doit: ([^,]+),", file.readline(1000))
            if mark and mark[1] != model:
                problems[model].append(f"this folder was published as {mark[1]}")
    return problems


def model_folders(folder: str) -> list[str]:
    """Return the names of the folders in a repository, each of which Triton takes for a model."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def files_of(folder: str, models: Iterable[str]) -> list[str]:
    """Return the paths of all files of these models."""
    return [f"{folder}/{model}/{name}" for model in models for name in list_files(f"{folder}/{model}")[0]]


def printable(text: str) -> str:
    """Return a text on one line, with escapes for what a terminal would obey or cannot show."""
    return text if text.isprintable() else ascii(text)[1:-1]


def main(arguments: list[str] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        description="Check every byte of a model repository against the manifests that its models were published with.",
        epilog="Exit code: 0 if all is as it was published, 1 if not, 2 for a mistake on the command line.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the model repository")
    # Without the default, a message about a missing FOLDER would ask for a MODEL, too.
    parser.add_argument("models", metavar="MODEL", nargs="*", default=[], help="must be there; without: all folders")
    options = parser.parse_args(arguments)
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        models = list(dict.fromkeys(options.models)) or model_folders(options.folder)
    except OSError as error:
        parser.error(f"{printable(options.folder)}: {error.strerror}")
    if not models:
        parser.error(f"{printable(options.folder)} has no model")
    problems = check(options.folder, models, read_files(files_of(options.folder, models)))
    for model, lines in problems.items():
        if not lines:
            print(f"{printable(model)}: ok")
        for line in lines:
            print(printable(f"{model}: {line}"))
    failed = sum(map(bool, problems.values()))
    print(f"{len(models) - failed} of {len(models)} models are as they were published")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
