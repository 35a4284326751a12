"""The cores, memory and disk space of this machine that a build may use, within the limits of its control groups."""

import contextlib
import errno
import math
import os
import re
import shutil
from collections.abc import Iterator

from build_tasks.errors import UserError, first_lines

GROUPS = "/sys/fs/cgroup"

FULL = 1 << 16  # bytes free, below which a disk counts as full: a write that failed may have left a few behind
NO_SPACE = re.compile("|".join(map(os.strerror, (errno.ENOSPC, errno.EDQUOT))))  # libraries quote these in their errors


def cores() -> float:
    """Number of cores that this process may use. It is a fraction if a control group has such a quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([usable, *_quotas()])


def memory() -> int | None:
    """Bytes of memory that are free for this process now; None if the system does not report them.

    The kernel frees the memory of cached files when it needs it. MemAvailable includes it; from what a control group
    uses it is subtracted here.

    Source: the kernel's Documentation/filesystems/proc.rst (MemAvailable) and admin-guide/cgroup-v2.rst.
    """
    free = []
    with contextlib.suppress(OSError):
        free.append(_table("/proc/meminfo").get("MemAvailable:", 0) * 1024)
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in _groups("memory"):
            with contextlib.suppress(OSError, ValueError):  # "max": there is no limit
                used = int(_read(f"{group}/{usage}")) - _table(f"{group}/memory.stat").get(cached, 0)
                free.append(int(_read(f"{group}/{limit}")) - used)
    return max(0, min(free)) if free else None


def full_disk(*folders: str) -> str | None:
    """The message about the first of these folders whose disk is full; None if there is none."""
    for folder in filter(os.path.isdir, folders):
        disk = shutil.disk_usage(folder)
        if disk.free < FULL:
            return f"no space is left on the disk of {folder}/ ({disk.total / 1e6:,.1f} MB in all)"
    return None


@contextlib.contextmanager
def explain_full_disk(*folders: str) -> Iterator[None]:
    """Raise UserError instead of an exception of the block, if a full disk caused it.

    Libraries hide that cause: some abort the process, and some give no reason at all.

    Args:
        folders: Folders on the disks that the block writes to.
    """
    try:
        yield
    except Exception as error:
        reason = first_lines(error)  # without the lines of the log that follow in a CrashError
        if message := full_disk(*folders):
            raise UserError(f"{message}: {reason}") from error
        if NO_SPACE.search(reason):
            raise UserError(reason) from error
        raise


def _quotas() -> Iterator[float]:
    for group in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max" or -1: there is no quota
            quota, period = map(int, _read(f"{group}/cpu.max").split())
            yield quota / period
        with contextlib.suppress(OSError, ValueError):
            quota = int(_read(f"{group}/cpu.cfs_quota_us"))
            yield quota / int(_read(f"{group}/cpu.cfs_period_us")) if quota > 0 else math.inf


def _groups(controller: str) -> Iterator[str]:
    """The folders of this process's control groups, of version 1 and 2, from its own up to the outermost.

    In a container the inner paths may exist on the host only. The outermost folder is then the container's own group.
    """
    try:
        lines = _read("/proc/self/cgroup").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = f"{GROUPS}/{controller}" if controllers else GROUPS
        while path.strip("/"):
            yield f"{top}{path}"
            path = os.path.dirname(path)
        yield top


def _table(path: str) -> dict[str, int]:
    """The first number of each line of a file, by the word before it."""
    return {words[0]: int(words[1]) for line in _read(path).splitlines() if len(words := line.split()) > 1}


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()
