"""A target is published whole or not at all: scratch folders, and the rename that ends them."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator

from build_tasks.spec import BUILD

SCRATCH = f"{BUILD}/.scratch"


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A folder to build in; gone afterwards. What killed runs left behind is removed on the way."""
    os.makedirs(SCRATCH, exist_ok=True)
    _remove_abandoned()
    folder = tempfile.mkdtemp(prefix=f"{_host()}-{os.getpid()}-", dir=SCRATCH)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned() -> None:
    """Scratch folders of processes of this host that are no more."""
    if os.name != "posix":  # os.kill(pid, 0) would end the process there
        return
    for name in os.listdir(SCRATCH):
        host, pid, _ = name.rsplit("-", 2)
        if host == _host():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                shutil.rmtree(f"{SCRATCH}/{name}", ignore_errors=True)
            except PermissionError:
                pass


def _host() -> str:
    import socket

    return socket.gethostname()


def flush(path: str) -> None:
    """Wait until the file, or every file of the folder, is on the disk."""
    inside = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    for file in inside if os.path.isdir(path) else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace(source: str, target: str) -> None:
    """Put `source`, a file or a folder, in the place of `target` in one step.

    What stood there before ends up at `source` or is gone. On two file systems (build/ as a cache mount) the
    source is first copied beside the target.
    """
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        _swap(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = f"{os.path.dirname(target)}/.incoming-{os.path.basename(target)}"
        discard(copy)  # of a killed run
        if os.path.isdir(source):
            shutil.copytree(source, copy, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source, copy)
        flush(copy)
        _swap(copy, target)
        discard(copy)


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
        except OSError:  # another file system
            discard(path)


def discard(path: str) -> None:
    """Remove whatever is at a path that nobody looks at."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)
