"""The cores of one stage's process. The recorded figures do not depend on their number.

With another number of threads, PyTorch and ONNX Runtime add numbers in another order, which changes the last bits of an
output. So only outputs that are not recorded are computed with all cores of the process. Recorded outputs are computed
with one thread per batch, and several batches run in parallel.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 4  # maximum number of batches in parallel, because each takes memory
share = 1  # number of cores of this process; doit sends it to each child


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
