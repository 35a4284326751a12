"""Targets appear complete or not at all: they are built in a scratch folder, and a rename moves them to their path.

    scratch folder ─► draft ─► flushed to the disk ─► rename ─► target

Files are read and written as seldom as possible. Copies share their bytes if the file system can do that, and what is
renamed, linked or copied here keeps its cached digest (`digest.preserve_digest`, `digest.copy_digest`).
"""

import contextlib
import errno
import functools
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator

from build_tasks.paths import BUILD, TRANSIT
from build_tasks.runtime import progress, sqlite_files
from build_tasks.runtime.digests import WORTH_A_PAUSE, digest
from build_tasks.runtime.exchange import exchange

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None  # type: ignore[assignment]

SCRATCH = f"{BUILD}/.scratch"
# These files say that a folder was generated here. Where a folder cannot disappear in one step, they are removed last:
# if a kill interrupts the removal, the next run recognizes the rest of the folder.
MARK_FILES = ("config.pbtxt", "provenance.json")

WAIT_SECONDS = 1.0  # for a lock, before a line says so

# From this size on, a copy may be a hard link. To copy a smaller file takes milliseconds, and people edit small files.
LINKED_FROM = 32 << 20  # bytes
FICLONE = 0x40049409  # from linux/fs.h
WITHOUT_CLONES: set[tuple[int, int]] = set()  # pairs of devices whose file system has no clones


@contextlib.contextmanager
def scratch_dir(parent: str = SCRATCH, prefix: str = "stage-") -> Iterator[str]:
    """Context manager for a new folder to build in, which is removed afterwards.

    It first removes the folders that killed runs have left. A folder in use is locked, and the kernel ends a lock with
    its process, also on another host or in a container. Without flock nothing is removed.

    Args:
        parent: Where the folder is made.
        prefix: How its name begins.

    Source: man 2 flock.
    """
    make_folder(parent)
    with locked(parent):
        _sweep(parent, prefix)
        folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
        in_use = contextlib.ExitStack()
        in_use.enter_context(locked(folder))
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            remove_tree(folder)
        shutil.rmtree(folder, ignore_errors=True)  # the remaining files, if one file could not be removed
        in_use.close()


def make_folder(path: str) -> None:
    """Make a folder of this project in build/. A file in its place is moved aside, because nothing can work with it."""
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError:
        if not path.startswith(f"{BUILD}/."):
            raise
        sqlite_files.set_aside(path)
        os.makedirs(path, exist_ok=True)


def sweep(parent: str, prefix: str) -> None:
    """Remove the scratch folders in `parent` that killed runs have left."""
    with locked(parent):
        _sweep(parent, prefix)


def _sweep(parent: str, prefix: str) -> None:
    for name in os.listdir(parent) if fcntl else []:
        if name.startswith(prefix):
            with contextlib.suppress(OSError), locked(f"{parent}/{name}", wait=False):
                remove_tree(f"{parent}/{name}")


@contextlib.contextmanager
def locked(folder: str, wait: bool = True) -> Iterator[None]:
    """Context manager that holds the lock of a folder. A line says so if it waits for longer than WAIT_SECONDS.

    Raises:
        OSError: If another process holds it and `wait` is False.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, folder, wait)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: str, wait: bool) -> None:
    """Take the lock of an open folder. Other threads and processes hold it for milliseconds, or for a whole engine."""
    silent_until, pause = time.monotonic() + WAIT_SECONDS, 0.001
    while time.monotonic() < silent_until:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not wait:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    progress.emit(f"  waiting for another process, which has locked {folder}/")
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def size(path: str) -> int | None:
    """The size of a file, or of all files in a folder, in bytes; None if the path does not exist."""
    if os.path.isdir(path):
        return sum(os.path.getsize(f"{folder}/{name}") for folder, _, names in os.walk(path) for name in names)
    return os.path.getsize(path) if os.path.exists(path) else None


def flush(path: str) -> None:
    """Wait until the file, or every file in the folder, is on the disk.

    Hard links are left out: only files that are on the disk get a second name. The system is first told to write the
    small files. Otherwise each fsync would wait for a commit of the file system's journal for its file alone.
    """
    inside = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    statuses = {file: os.stat(file) for file in (inside if os.path.isdir(path) else [path])}
    files = [file for file, status in statuses.items() if status.st_nlink == 1]
    for file in files if len(files) > 1 and hasattr(os, "posix_fadvise") else ():
        if statuses[file].st_size < WORTH_A_PAUSE:  # what is written of a large file would leave the memory
            with open(file, "rb", buffering=0) as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for file in files:
        # Windows flushes only files that are open for writing.
        with open(file, "rb" if os.name == "posix" else "rb+", buffering=0) as opened:
            os.fsync(opened.fileno())


def replace(source: str, target: str, near: str | None = None) -> None:
    """Move `source`, a file or a folder, to the path `target` in one step.

    What was at `target` before is afterwards at `source`, or is removed. If the two paths are on different file systems
    (build/ may be a cache mount), the source is first copied to the file system of the target.

    Args:
        near: The folder for that copy, instead of the target's own.
    """
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        _rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with scratch_dir(near or os.path.dirname(target), prefix=TRANSIT) as folder:
            draft = f"{folder}/{os.path.basename(target)}"
            copy(source, draft)
            flush(draft)
            try:
                _rename(draft, target)
            except OSError as second_error:  # an overlay file system cannot rename a folder of a lower layer
                if second_error.errno != errno.EXDEV:
                    raise
                remove_tree(target)
                os.rename(draft, target)


def copy(source: str, target: str, hard_link: bool = True) -> None:
    """Copy `source`, a file or a folder, to `target`: in one pass over the bytes, or in none if possible.

    On file systems with clones (XFS, Btrfs) the target becomes a clone. Otherwise a large file becomes a hard link, and
    a small file is copied by the kernel. A hard link is a second name of the same file. The file is made read-only, as
    in the caches of ccache and DVC, so that nobody writes into it by mistake. Both names can still be replaced and
    removed.

    Args:
        hard_link: Whether a large file may become a hard link.
    """
    if os.path.isdir(source):
        try:
            each = functools.partial(copy, hard_link=hard_link)
            shutil.copytree(source, target, copy_function=each, dirs_exist_ok=True)
        except shutil.Error as error:  # holds (source, target, reason) for each file that failed
            raise OSError(error.args[0][0][2]) from error
    else:
        with digest.copy_digest(source, target):
            if not (_cloned(source, target) or (hard_link and _linked(source, target))):
                shutil.copyfile(source, target)


def link(source: str, target: str, read_only: bool = False) -> bool:
    """Make `target` a hard link to the file `source`.

    Args:
        read_only: Whether to remove the permission to write from the file.

    Returns: Whether that succeeded.
    """
    with digest.preserve_digest(source):
        try:
            os.link(source, target)
        except OSError:  # another file system, no links there, too many links, or another user's file
            return False
        try:
            if read_only:
                os.chmod(target, stat.S_IMODE(os.stat(target).st_mode) & ~0o222)
        except OSError:
            os.remove(target)
            return False
    return True


def sync_dir(source: str, target: str) -> None:
    """Make the folder `target` equal to `source`, entry by entry; entries that are equal stay untouched.

    A symbolic link in `source` means that `target` keeps its own entry of that name. Folders are updated first, and
    config.pbtxt is the last of the new entries; then the entries that `source` does not have are removed. A server that
    reads the folder meanwhile finds everything that its config.pbtxt names.
    """
    if not os.path.isdir(target):
        return replace(source, target)
    entries = {entry.name: entry for entry in os.scandir(source)}
    for entry in sorted(entries.values(), key=lambda e: (e.name == "config.pbtxt", not e.is_dir(), e.name)):
        path = f"{target}/{entry.name}"
        if not entry.is_symlink() and digest(entry.path, remember=False) != digest(path):
            replace(entry.path, path, near=os.path.dirname(target))
    for name in set(os.listdir(target)) - entries.keys():
        remove(f"{target}/{name}", near=os.path.dirname(target))
    return None


def _cloned(source: str, target: str) -> bool:
    """Make `target` share the blocks of `source` until one of them is written to; returns whether that succeeded.

    Source: man 2 ioctl_ficlone.
    """
    disks = os.stat(source).st_dev, os.stat(os.path.dirname(target) or ".").st_dev
    if sys.platform != "linux" or fcntl is None or disks in WITHOUT_CLONES:
        return False
    with open(source, "rb") as original, open(target, "wb") as clone:
        try:
            fcntl.ioctl(clone, FICLONE, original.fileno())
            return True
        except OSError as error:
            os.remove(target)
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                WITHOUT_CLONES.add(disks)
            return False


def _linked(source: str, target: str) -> bool:
    """Make `target` a hard link if `source` is large; returns whether it is one.

    Not on Windows, which does not replace read-only files.
    """
    return os.name == "posix" and os.path.getsize(source) >= LINKED_FROM and link(source, target, read_only=True)


def _rename(source: str, target: str) -> None:
    with digest.preserve_digest(source), digest.preserve_digest(target):
        if not os.path.isdir(target) and not (os.path.isdir(source) and os.path.lexists(target)):
            os.replace(source, target)
        elif not exchange(source, target):
            old = f"{source}.old"
            os.rename(target, old)  # until the next line there is no target
            os.rename(source, target)
            os.rename(old, source)


def remove(path: str, near: str | None = None) -> None:
    """Remove a file or a folder. It disappears from its path in one step.

    The exception is a folder of an overlay's lower layer, which cannot be renamed: it is removed in place.

    Args:
        near: The folder that it is moved to first if build/ is on another file system, instead of its own parent.
    """
    for parent, prefix in ((SCRATCH, "stage-"), (near or os.path.dirname(path), TRANSIT)):
        with scratch_dir(parent, prefix) as folder:
            try:
                return os.rename(path, f"{folder}/removed")
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
    return remove_tree(path)


def remove_tree(path: str) -> None:
    """Remove the file, link or folder at a path, if there is one. Other names of a file keep their digest."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISDIR(status.st_mode):
        for name in sorted(os.listdir(path), key=lambda name: name in MARK_FILES):
            remove_tree(f"{path}/{name}")
        os.rmdir(path)
    else:
        with digest.preserve_digest(path) if status.st_nlink > 1 else contextlib.nullcontext():
            os.remove(path)
