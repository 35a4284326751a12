"""A target is published whole or not at all: scratch folders, and the rename that ends them."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator

from build_tasks.digests import digest
from build_tasks.spec import BUILD

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

SCRATCH = f"{BUILD}/.scratch"


@contextlib.contextmanager
def scratch(parent: str = SCRATCH, prefix: str = "stage-") -> Iterator[str]:
    """A folder to build in; gone afterwards. What killed runs left behind is removed on the way.

    A folder in use is locked: the kernel ends a lock with its process, whatever host or container that was in.
    Source: man 2 flock. Where there is no flock, nothing is removed.
    """
    os.makedirs(parent, exist_ok=True)
    with locked(parent):
        for name in os.listdir(parent) if fcntl else []:
            if name.startswith(prefix):
                with contextlib.suppress(OSError), locked(f"{parent}/{name}", wait=False):
                    shutil.rmtree(f"{parent}/{name}")
        folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
        in_use = contextlib.ExitStack()
        in_use.enter_context(locked(folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        in_use.close()


@contextlib.contextmanager
def locked(folder: str, wait: bool = True) -> Iterator[None]:
    """Hold the folder's lock; OSError where another process does, and this one shall not wait."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def size(path: str) -> int | None:
    """In bytes, of a file, or of all in a folder; None where nothing is."""
    if os.path.isdir(path):
        return sum(os.path.getsize(f"{folder}/{name}") for folder, _, names in os.walk(path) for name in names)
    return os.path.getsize(path) if os.path.exists(path) else None


def flush(path: str) -> None:
    """Wait until the file, or every file of the folder, is on the disk."""
    inside = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    for file in inside if os.path.isdir(path) else [path]:
        descriptor = os.open(
            file, os.O_RDONLY if os.name == "posix" else os.O_RDWR
        )  # Windows flushes what it may write
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace(source: str, target: str, near: str | None = None) -> None:
    """Put `source`, a file or a folder, in the place of `target` in one step.

    What stood there before ends up at `source` or is gone. On two file systems (build/ as a cache mount) the
    source is first copied beside the target, or into the folder `near`.
    """
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        _swap(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with scratch(near or os.path.dirname(target), prefix=".incoming-") as near:
            copy = f"{near}/{os.path.basename(target)}"
            if os.path.isdir(source):
                shutil.copytree(source, copy, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(source, copy)
            flush(copy)
            try:
                _swap(copy, target)
            except OSError as again:  # a folder of a lower layer, which an overlay cannot rename
                if again.errno != errno.EXDEV:
                    raise
                discard(target)
                os.rename(copy, target)


def update(source: str, target: str) -> None:
    """Make the folder `target` like `source`, entry by entry, and leave alone what is equal.

    A link in `source` stands for the entry that is there. Folders come first, config.pbtxt last of what is new, and
    what `source` has no more goes at the end: whoever looks meanwhile finds what the configuration speaks of.
    """
    if not os.path.isdir(target):
        return replace(source, target)
    here = {entry.name: entry for entry in os.scandir(source)}
    for entry in sorted(here.values(), key=lambda e: (e.name == "config.pbtxt", not e.is_dir(), e.name)):
        there = f"{target}/{entry.name}"
        if not entry.is_symlink() and digest(entry.path, remember=False) != digest(there):
            replace(entry.path, there, near=os.path.dirname(target))
    for name in set(os.listdir(target)) - here.keys():
        remove(f"{target}/{name}")
    return None


def _swap(source: str, target: str) -> None:
    if not os.path.isdir(target) and not (os.path.isdir(source) and os.path.lexists(target)):
        os.replace(source, target)
    elif not _exchange(source, target):
        aside = f"{source}.old"  # the only moment in which nothing stands at the target
        os.rename(target, aside)
        os.rename(source, target)
        os.rename(aside, source)


def _exchange(source: str, target: str) -> bool:
    """Exchange two paths in one step; False where the system cannot (it is Linux's renameat2).

    Source: man 2 renameat2, RENAME_EXCHANGE.
    """
    import ctypes

    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(at_fdcwd, os.fsencode(source), at_fdcwd, os.fsencode(target), rename_exchange) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def remove(path: str) -> None:
    """Remove a file or a folder, which disappears from its place in one step."""
    with scratch() as folder:
        try:
            os.rename(path, f"{folder}/removed")
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            discard(path)  # another file system, or an overlay's lower layer: there is no one step


def discard(path: str) -> None:
    """Remove whatever is at a path."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)
