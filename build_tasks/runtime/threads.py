"""The cores of one stage's process, and how what it records comes to depend on none of them.

With the number of threads, PyTorch and ONNX Runtime add up in another order, and the last bits of an answer change. So
what is only checked is computed with all the cores that a process has; what is recorded, batch by batch, each with one
thread, and as many batches at once as there are cores, within bounds.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 4  # batches at most: each takes memory
share = 1  # cores of this process; a child is told how many


def limit(cores: int) -> None:
    """Let this process compute with so many cores."""
    global share
    share = cores
    os.environ["OMP_NUM_THREADS"] = str(cores)  # what is loaded or started later reads it
    _torch(cores)


def each(function: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """`function` of each value, in order, several at once, each with one thread of PyTorch."""
    from concurrent.futures import ThreadPoolExecutor

    try:
        with ThreadPoolExecutor(min(share, AT_ONCE), initializer=_torch, initargs=(1,)) as pool:
            return list(pool.map(function, values))
    finally:
        _torch(share)


def _torch(threads: int) -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
