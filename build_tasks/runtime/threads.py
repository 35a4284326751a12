"""The cores of one stage's process. What a stage records does not depend on their number.

PyTorch and ONNX Runtime add up in another order with another number of threads, which changes the last bits of an
answer. Answers that are only checked are therefore computed with all cores of the process. Answers that are recorded
are computed batch by batch, each batch with one thread, and several batches at once.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 4  # batches at most, because each takes memory
share = 1  # cores of this process; doit sends the number to each child


def limit(cores: int) -> None:
    """Let this process compute with this number of cores."""
    global share
    share = cores
    os.environ["OMP_NUM_THREADS"] = str(cores)  # for libraries and processes that are loaded later
    _limit_torch(cores)


def each(function: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """The results of a function for all values, in their order; several at once, each with one thread of PyTorch."""
    from concurrent.futures import ThreadPoolExecutor

    try:
        with ThreadPoolExecutor(min(share, AT_ONCE), initializer=_limit_torch, initargs=(1,)) as pool:
            return list(pool.map(function, values))
    finally:
        _limit_torch(share)


def _limit_torch(threads: int) -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
