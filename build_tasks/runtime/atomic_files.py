"""A target is published whole or not at all: scratch folders, and the rename that ends them.

And it is read and written as seldom as can be: copies share their bytes where the file system can, and whatever is
renamed, linked or copied here keeps the digest that is known of it (`digest.preserve_digest`, `digest.copy_digest`).
"""

import contextlib
import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator

from build_tasks.paths import BUILD
from build_tasks.runtime.digests import digest

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

SCRATCH = f"{BUILD}/.scratch"

# From this size on a copy may be a hard link. A smaller one takes milliseconds, and what people edit is among those.
LINKED_FROM = 32 << 20  # bytes
FICLONE = 0x40049409  # of linux/fs.h


@contextlib.contextmanager
def scratch_dir(parent: str = SCRATCH, prefix: str = "stage-") -> Iterator[str]:
    """A folder to build in; gone afterwards. What killed runs left behind is removed on the way.

    A folder in use is locked: the kernel ends a lock with its process, whatever host or container that was in.
    Source: man 2 flock. Where there is no flock, nothing is removed.
    """
    os.makedirs(parent, exist_ok=True)
    with locked(parent):
        for name in os.listdir(parent) if fcntl else []:
            if name.startswith(prefix):
                with contextlib.suppress(OSError), locked(f"{parent}/{name}", wait=False):
                    remove_tree(f"{parent}/{name}")
        folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
        in_use = contextlib.ExitStack()
        in_use.enter_context(locked(folder))
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            remove_tree(folder)
        shutil.rmtree(folder, ignore_errors=True)  # the rest, where one thing would not go
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
        with scratch_dir(near or os.path.dirname(target), prefix=".incoming-") as near:
            draft = f"{near}/{os.path.basename(target)}"
            copy(source, draft)
            flush(draft)
            try:
                _swap(draft, target)
            except OSError as again:  # a folder of a lower layer, which an overlay cannot rename
                if again.errno != errno.EXDEV:
                    raise
                remove_tree(target)
                os.rename(draft, target)


def copy(source: str, target: str) -> None:
    """Make `target`, a file or a folder, the same as `source`: in one pass at most, and without one where that can be.

    A clone where the file system knows those (XFS, Btrfs); of a large file a hard link; else a copy by the kernel. A
    link is the file itself, under another name: so that neither is written into by mistake, both are read-only, as the
    caches of ccache and DVC are. They are replaced and removed as ever.
    """
    if os.path.isdir(source):
        try:
            shutil.copytree(source, target, copy_function=copy, dirs_exist_ok=True)
        except shutil.Error as error:  # of each file, where it was and should have gone, and why not
            raise OSError(error.args[0][0][2]) from error
    else:
        with digest.copy_digest(source, target):
            if not (_cloned(source, target) or _linked(source, target)):
                shutil.copyfile(source, target)


def link(source: str, target: str, read_only: bool = False) -> bool:
    """Whether `target` could become another name of the file `source`, and both read-only if that is asked for."""
    with digest.preserve_digest(source):
        try:
            os.link(source, target)
        except OSError:  # another file system, one without links, one too many; or another user's file
            return False
        try:
            if read_only:
                os.chmod(target, stat.S_IMODE(os.stat(target).st_mode) & ~0o222)
        except OSError:
            os.remove(target)
            return False
    return True


def sync_dir(source: str, target: str) -> None:
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


def _cloned(source: str, target: str) -> bool:
    """Whether `target` shares the blocks of `source` until one is written to. Source: man 2 ioctl_ficlone."""
    if sys.platform != "linux" or fcntl is None:
        return False
    with open(source, "rb") as there, open(target, "wb") as here:
        try:
            fcntl.ioctl(here, FICLONE, there.fileno())
            return True
        except OSError:
            os.remove(target)
            return False


def _linked(source: str, target: str) -> bool:
    """Whether `target` is another name of the large file `source`. Windows does not replace what is read-only."""
    return os.name == "posix" and os.path.getsize(source) >= LINKED_FROM and link(source, target, read_only=True)


def _swap(source: str, target: str) -> None:
    with digest.preserve_digest(source), digest.preserve_digest(target):
        _put(source, target)


def _put(source: str, target: str) -> None:
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
    with scratch_dir() as folder:
        try:
            os.rename(path, f"{folder}/removed")
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            remove_tree(path)  # another file system, or an overlay's lower layer: there is no one step


def remove_tree(path: str) -> None:
    """Remove whatever is at a path."""
    if os.path.isdir(path) and not os.path.islink(path):
        for folder, _, names in os.walk(path):
            for file in (f"{folder}/{name}" for name in names):
                if os.lstat(file).st_nlink > 1:  # what it is elsewhere remains known
                    remove_tree(file)
        shutil.rmtree(path)
    elif os.path.lexists(path):
        with digest.preserve_digest(path):
            os.remove(path)
