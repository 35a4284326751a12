"""Changes of model_repository/: one process at a time, nothing is lost for good, and no leftovers.

    publish ─┐                            ┌─► replaced in one step
             ├─► repository_lock, sweep ──┤
    prune ───┘                            └─► build/.trash/<time>-<name> ─► emptied by a run a day later

All processes that share build/ take the same lock. It is held while something in the repository is replaced or removed,
not while a model is built.
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator

from build_tasks.errors import UserError
from build_tasks.paths import BUILD, REPOSITORY, TRANSIT, TRASH
from build_tasks.runtime import atomic_files
from build_tasks.runtime.digests import digest

LOCK = f"{BUILD}/.publishing"  # a folder, because flock works on folders
TRASH_SECONDS = 24 * 60 * 60
UMASK_VARIABLE = "REPOSITORY_UMASK"
FILE_MODE, FOLDER_MODE = 0o644, 0o755  # nothing is published with wider modes


@contextlib.contextmanager
def repository_lock() -> Iterator[None]:
    """Context manager that holds the lock of the repository. It first removes what killed runs have left there."""
    atomic_files.make_folder(LOCK)
    with atomic_files.locked(LOCK):
        if leftovers():
            atomic_files.sweep(REPOSITORY, TRANSIT)
        yield


def install(
    draft: str,
    folder: str,
    move: Callable[[str, str], None],
    overwrite_error: Callable[[str], str | None],
    umask: str | None,
) -> None:
    """Move the draft of a model into the repository.

    Args:
        move: Puts the draft in the place of the folder, or updates the folder to be equal to it.
        overwrite_error: Returns why the folder must not be replaced, None if it may be.
        umask: Of the published files; None for the umask of this process.
    Raises:
        UserError: If the folder must not be replaced.
    """
    set_modes(draft, umask)
    with repository_lock():
        if error := overwrite_error(folder):  # again, because the build took a while
            raise UserError(error)
        move(draft, folder)
        set_modes(folder, umask)  # the versions that are not in the draft, too
        if umask is not None:
            _open_repository(umask)


def copy(source: str, target: str, published: str | None = None) -> None:
    """Copy a file or a folder, and compare the copy with it.

    Args:
        published: A file that may have the same content. Then the target becomes a hard link to it, so that a changed
            config.pbtxt does not copy the artifact again.
    Raises:
        UserError: If the copy differs from the source.
    """
    if published is None or digest(published) != digest(source) or not atomic_files.link(published, target):
        # A file of the user keeps its mode and its number of names.
        atomic_files.copy(source, target, hard_link=source.startswith(f"{BUILD}/"))
    if digest(target, remember=False) != digest(source):
        raise UserError(f"{target}: the copy of {source} differs from it; check the disk for errors")


def leftovers() -> list[str]:
    """The folders of the repository that a killed run left on their way in or out, or that a run uses now."""
    try:
        return [name for name in os.listdir(REPOSITORY) if name.startswith(TRANSIT)]
    except OSError:
        return []


def trash(path: str) -> str:
    """Move a file or a folder to the trash in build/, and return its new path.

    From another file system it is copied. It leaves its own path when the copy is complete.
    """
    stamp = _stamp(time.time())
    atomic_files.make_folder(TRASH)
    target = f"{TRASH}/{stamp}-{os.path.basename(path)}"
    while os.path.lexists(target):  # the same name a second time within one second
        target += "+"
    try:
        os.rename(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with atomic_files.scratch_dir() as folder:
            atomic_files.copy(path, f"{folder}/copy")
            atomic_files.flush(f"{folder}/copy")
            os.rename(f"{folder}/copy", target)
        atomic_files.remove(path)
    return target


def expired_trash() -> list[str]:
    """What has been in the trash for more than a day."""
    before = _stamp(time.time() - TRASH_SECONDS)
    try:
        return sorted(name for name in os.listdir(TRASH) if name < before)
    except OSError:
        return []


def empty_trash(all_of_it: bool = False) -> None:
    """Remove what has been in the trash for more than a day, or all that is in it."""
    names = expired_trash()
    if all_of_it and os.path.isdir(TRASH):
        names = os.listdir(TRASH)
    for name in names:
        atomic_files.remove(f"{TRASH}/{name}")


def _stamp(seconds: float) -> str:
    """A time in UTC, as names in the trash begin with it. Their order is that of the times."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))


def umask_from_environment() -> str | None:
    """The umask of published files that REPOSITORY_UMASK names, as three octal digits; None if it is not set.

    Raises:
        UserError: If it is not an octal number of at most three digits.
    """
    text = os.environ.get(UMASK_VARIABLE)
    if text is None:
        return None
    try:
        umask = int(text, 8)
    except ValueError:
        umask = -1
    if not 0 <= umask <= 0o777:
        raise UserError(f"{UMASK_VARIABLE}: expected three octal digits such as 022, found {text[:20]!r}")
    return f"{umask:03o}"


def set_modes(path: str, umask: str | None) -> None:
    """Give a file or a folder, and all below it, the modes of published files.

    These are at most 0644 and 0755, without the bits of `umask`. Without `umask` the existing modes hold, which follow
    from the umask of the process that wrote the files. A file that is read-only, as hard links are, stays so. Symbolic
    links are skipped.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return
    mode, is_folder = stat.S_IMODE(status.st_mode), stat.S_ISDIR(status.st_mode)
    limit = FOLDER_MODE if is_folder else FILE_MODE if mode & 0o200 else FILE_MODE & ~0o222
    expected = mode & limit if umask is None else limit & ~int(umask, 8)
    if mode != expected:
        with digest.preserve_digest(path):
            os.chmod(path, expected)
    for name in os.listdir(path) if is_folder else []:
        set_modes(f"{path}/{name}", umask)


def _open_repository(umask: str) -> None:
    """Let those users into model_repository/ itself whom `umask` admits. Nobody is shut out."""
    mode = os.stat(REPOSITORY).st_mode & 0o7777
    if (wider := mode | FOLDER_MODE & ~int(umask, 8)) != mode:
        os.chmod(REPOSITORY, wider)
