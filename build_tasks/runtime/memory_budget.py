"""Memory: no more stages run at once than fit.

    available memory ─► budget ─► stage, stage │ stage waits, in the order of asking; one alone always runs

What a stage needs is an estimate that errs upwards; see `need`.
"""

import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator

from build_tasks.errors import UserError
from build_tasks.runtime import resources

VARIABLE = "BUILD_MEMORY"  # GB that the stages of a run may use together
SHARE = 0.8  # of what is available, without it

# Of a stage's process, beyond what it shares with the fork server. Measured, in MB: torchscript and onnx of
# efficientnet_b3, at batch 64 of 288 x 288 and with inputs of 49 and 98, took 2405 and 2653; of vit_small, at 32 of
# 224 x 224 and with 88 and 176, 612 and 970; any other stage, of them and of smaller ones, at most 431.
BASE = 300e6  # bytes
COPIES = 4  # of its inputs
TENSORS = 32  # as large as the network's input, that live at once


def need(inputs: int, images: int, image: list[int]) -> int:
    """Bytes that a stage's process may need.

    inputs: their bytes. images: the largest batch that it computes, image: (channels, height, width) of each.
    """
    return int(BASE + COPIES * inputs + TENSORS * images * 4 * math.prod(image))


class Budget:
    """Bytes that are shared by threads. What does not fit waits; what would never fit runs alone.

    size: without it, what there is when the first one asks.
    Who came first is first served, so that a large request is not kept waiting by small ones for ever.
    """

    def __init__(self, size: float = 0):
        self.size = size
        self._held: list[int] = []
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def held(self, need: int, waits: Callable[[], None]) -> Iterator[None]:
        """Have so many bytes; `waits` is called where they are not to be had at once."""
        me = object()
        with self._changed:
            self.size = self.size or available()
            self._queue.append(me)
            try:
                if not self._fits(me, need):
                    waits()
                self._changed.wait_for(lambda: self._fits(me, need))
                self._held.append(need)
            finally:  # whatever ends the wait: who comes next shall not wait for this one
                self._queue.remove(me)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(need)
                self._changed.notify_all()

    def _fits(self, who: object, need: int) -> bool:
        return self._queue[0] is who and (not self._held or sum(self._held) + need <= self.size)


def from_environment() -> float | None:
    """The bytes that the environment allows; None where it says nothing. UserError for what is no size."""
    told = os.environ.get(VARIABLE)
    if told is None:
        return None
    try:
        size = float(told) * 1e9
    except ValueError:
        size = 0.0
    if not size > 0:
        raise UserError(f"{VARIABLE}: expected a number of GB, found {told!r}")
    return size


def available() -> float:
    """Bytes that the stages of this run may use together."""
    free = resources.memory()
    return from_environment() or (math.inf if free is None else SHARE * free)
