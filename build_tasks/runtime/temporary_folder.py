"""A temporary folder of this run of doit, which also goes after a SIGKILL.

    TMPDIR ─► build-tasks-<random>/ ─┬─► pymp-*/        the socket of the fork server
              locked while doit runs └─► what stages and tools write to TMPDIR

The folder is removed when doit ends. If doit is killed, the fork server removes it; if both are, the next run does.
"""

import contextlib
import functools
import os
import shutil
import sys
import tempfile

from build_tasks.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None  # type: ignore[assignment]

PREFIX = "build-tasks-"
# A socket's path has at most 107 bytes, and multiprocessing adds /pymp-12345678/listener-12345678 to its folder.
# Source: man 7 unix; multiprocessing/connection.py, arbitrary_address.
MAX_SOCKET_FOLDER = 107 - 32


@functools.cache
def folder() -> str:
    """Return the path of this process's temporary folder. It is made at the first call.

    Raises:
        UserError: If no folder can be made there.
    """
    from multiprocessing import util

    try:
        parent = os.path.abspath(tempfile.gettempdir())
        _sweep(parent)
        path, descriptor = _locked_folder(parent)
    except OSError as error:
        raise UserError(f"TMPDIR: expected a folder that this user can write to: {error}") from error
    # multiprocessing removes its own folder, with the priority -100.
    util.Finalize(None, remove, args=(path,), exitpriority=-101)
    short = path
    if len(os.fsencode(path)) > MAX_SOCKET_FOLDER and sys.platform == "linux":
        short = f"/proc/{os.getpid()}/fd/{descriptor}"  # the same folder; all processes of this user can open it
    before = tempfile.tempdir
    tempfile.tempdir = short
    util.get_temp_dir()
    tempfile.tempdir = before
    return path


def remove(path: str) -> None:
    """Remove the temporary folder of a process, if the path is one's."""
    if os.path.basename(path).startswith(PREFIX):
        shutil.rmtree(path, ignore_errors=True)


def _locked_folder(parent: str) -> tuple[str, int]:
    """Make a folder, and return its path and a descriptor that holds its lock."""
    while True:
        path = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
        with contextlib.suppress(FileNotFoundError):  # another run has found it before it was locked, and removed it
            if fcntl is None:
                return path, -1
            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.exists(path):
                return path, descriptor
            os.close(descriptor)


def _sweep(parent: str) -> None:
    """Remove the folders of killed processes of this user: the kernel has ended their locks."""
    for entry in os.scandir(parent) if fcntl else []:
        with contextlib.suppress(OSError):
            if entry.name.startswith(PREFIX) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(entry.path)
                finally:
                    os.close(descriptor)
