"""Memory: no more stages run at once than fit into it.

    available memory ─► budget ─► stages that fit run; others wait in the order of their requests; one alone always runs

The memory that a stage needs is an estimate, too high rather than too low; see `need`. The process of a stage uses the
memory of a tensor again when the tensor is freed; see `call_with_heap`.
"""

import contextlib
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from build_tasks.errors import UserError
from build_tasks.runtime import resources

T = TypeVar("T")

VARIABLE = "BUILD_MEMORY"  # environment variable: GB that all stages of a run may use together
SHARE = 0.8  # share of the available memory that is used if the variable is not set

# Memory of a stage's process, without the memory shared with the fork server. Measured, in MB: torchscript and onnx of
# efficientnet_b3, at batch 64 of 288 x 288 and with inputs of 49 and 98, took 2454 and 4922; onnx of vit_small, at
# batch 32 of 224 x 224 and with inputs of 176, took at most 1072. All other stages, of these models and of smaller
# ones, took at most 431.
BASE = 300e6  # bytes
COPIES = 4  # assumed number of copies of the inputs in memory
TENSORS = 36  # as large as the network's input, that exist at once

# Parameters of glibc's allocator, see mallopt(3).
M_TRIM_THRESHOLD = -1  # free bytes at the end of the heap, above which they are returned to the system
M_MMAP_THRESHOLD = -3  # bytes of a block that is mapped by itself, and returned to the system when it is freed
# Tensors up to this size are on the heap. At 256 MB, efficientnet_b3 at batch 64 takes a third less CPU time again, but
# gaps between tensors of several sizes take 0.7 GB more. At 64 MB, peaks were at most 7 % above those without the heap.
LARGEST_ON_HEAP = 64 << 20


def need(inputs: int, samples: int, values: int) -> int:
    """Estimate the memory that a stage's process needs, in bytes.

    Args:
        inputs: Bytes of the stage's input files.
        samples: The largest batch that the stage computes.
        values: The number of values of one sample.
    """
    return int(BASE + COPIES * inputs + TENSORS * samples * 4 * values)


class Budget:
    """Bytes of memory that threads share. A request that does not fit waits; one above the budget runs alone.

    Requests are served in their order, so that small ones cannot delay a large one for ever.

    Args:
        size: Bytes; 0 stands for the memory that is available at the first request.
    """

    def __init__(self, size: float = 0):
        self.size = size
        self._reserved: list[int] = []
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, need: int, report_wait: Callable[[], None]) -> Iterator[None]:
        """Reserve bytes; calls `report_wait` once if they are not free at once, then waits for them."""
        request = object()
        with self._changed:
            self.size = self.size or available()
            self._queue.append(request)
            try:
                if not self._fits(request, need):
                    report_wait()
                self._changed.wait_for(lambda: self._fits(request, need))
                self._reserved.append(need)
            finally:  # even after an interrupt, because the next request must not wait for this one
                self._queue.remove(request)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._reserved.remove(need)
                self._changed.notify_all()

    def _fits(self, request: object, need: int) -> bool:
        return self._queue[0] is request and (not self._reserved or sum(self._reserved) + need <= self.size)


def call_with_heap(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a process that keeps the memory of freed tensors for the next ones, until it ends.

    By default glibc returns it to the system, and the kernel fills the memory of each new tensor with zeros. That was
    nearly half of the CPU time of a stage that runs large batches. Nothing changes with other C libraries.
    """
    if sys.platform == "linux":
        import ctypes

        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return function(*arguments)


def from_environment() -> float | None:
    """The bytes that BUILD_MEMORY allows; None if it is not set.

    Raises:
        UserError: If it is not a positive number.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    try:
        size = float(text) * 1e9
    except ValueError:
        size = 0.0
    if not size > 0:
        raise UserError(f"{VARIABLE}: expected a number of GB, found {text!r}")
    return size


def available() -> float:
    """Bytes that the stages of this run may use together; infinity if the system does not report its memory."""
    free = resources.memory()
    return from_environment() or (math.inf if free is None else SHARE * free)
