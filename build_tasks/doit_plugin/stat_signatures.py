"""The signatures of files for the no-op cache: what stat reports of each. Every `doit` imports this module."""

import array
import itertools
import operator
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

ABSENT = (0, 0, 0, 0, 0)
WORTH_A_PROCESS = 200  # models; to check their files takes four times as long as to start a process

StatSignature = tuple[int, ...]
Item = TypeVar("Item")
stat_fields = operator.attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")


def stat_signatures(paths: Sequence[str]) -> bytes:
    """Return the device, inode, size and both times (in ns) of each file, as 64-bit integers."""
    try:
        return packed(itertools.chain.from_iterable(map(stat_fields, map(os.stat, paths))))
    except OSError:
        return packed(number for path in paths for number in _stat_or_absent(path))


def packed(numbers: Iterable[int]) -> bytes:
    numbers = list(numbers)
    try:
        return array.array("q", numbers).tobytes()
    except OverflowError:  # an inode number above 63 bits
        return array.array("q", [number & (1 << 63) - 1 for number in numbers]).tobytes()


def check_all(check: Callable[[Item], bool], models: Sequence[Item]) -> list[bool]:
    """Return `check(model)` of each model. If there are many, a child process checks half of them.

    Threads would not help: they take turns for longer than a stat lasts. Models that the child could not check, because
    it was killed, count as changed.
    """
    if len(models) < WORTH_A_PROCESS or not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        return list(map(check, models))
    half = len(models) // 2
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError:  # no memory, or too many processes
        os.close(reader)
        os.close(writer)
        return list(map(check, models))
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports it
            with open(writer, "wb") as results:
                results.write(bytes(map(check, models[half:])))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as results:
        first_half = list(map(check, models[:half]))
        second_half = results.read().ljust(len(models) - half, b"\0")
    os.waitpid(child, 0)
    return [*first_half, *map(bool, second_half)]


def _stat_or_absent(path: str) -> StatSignature:
    try:
        return stat_fields(os.stat(path))
    except OSError:
        return ABSENT
