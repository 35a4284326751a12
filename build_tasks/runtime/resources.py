"""What of this machine a build may use: cores and memory, by affinity and by its control groups; and its disks."""

import contextlib
import errno
import math
import os
import re
import shutil
from collections.abc import Iterator

from build_tasks.errors import UserError, first_lines

GROUPS = "/sys/fs/cgroup"

FULL = 1 << 16  # bytes; what ran out of space has filled all but a fraction of what it wrote last
NO_SPACE = re.compile("|".join(map(os.strerror, (errno.ENOSPC, errno.EDQUOT))))  # libraries quote it in their errors


def cores() -> float:
    """Cores that this process may keep busy; a quota need not be whole."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([here, *_quotas()])


def memory() -> int | None:
    """Bytes that are free for this process now; None where nothing tells.

    Source: the kernel's Documentation/filesystems/proc.rst (MemAvailable) and admin-guide/cgroup-v2.rst. Of what a
    control group uses, the part that is cached files can be had, as it can of the machine.
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
    """What is to be said of the first of these folders whose disk is full."""
    for folder in filter(os.path.isdir, folders):
        disk = shutil.disk_usage(folder)
        if disk.free < FULL:
            return f"no space is left on the disk of {folder}/ ({disk.total / 1e6:,.1f} MB in all)"
    return None


@contextlib.contextmanager
def space(*folders: str) -> Iterator[None]:
    """Raises UserError for what fails here for want of space: a library may call that SIGABRT, or nothing at all."""
    try:
        yield
    except Exception as error:
        reason = first_lines(error)  # without the end of the log, which a crash has below it
        if said := full_disk(*folders):
            raise UserError(f"{said}: {reason}") from error
        if NO_SPACE.search(reason):
            raise UserError(reason) from error
        raise


def _quotas() -> Iterator[float]:
    for group in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max", or -1: there is none
            quota, period = map(int, _read(f"{group}/cpu.max").split())
            yield quota / period
        with contextlib.suppress(OSError, ValueError):
            quota = int(_read(f"{group}/cpu.cfs_quota_us"))
            yield quota / int(_read(f"{group}/cpu.cfs_period_us")) if quota > 0 else math.inf


def _groups(controller: str) -> Iterator[str]:
    """The folders of the control groups of this process, of either version, up to the outermost.

    In a container the inner ones may be told by a path that only the host has: there the outermost is the container's.
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
    """The first number of each line, by the word before it."""
    return {words[0]: int(words[1]) for line in _read(path).splitlines() if len(words := line.split()) > 1}


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()
