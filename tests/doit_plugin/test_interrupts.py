"""A signal ends a command also where the main thread already waits."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.project import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows delivers no signals to threads")

# A thread receives the signal, and not the main thread. A signal that arrives just before a wait has the same effect:
# Python knows of it, and nothing ends the wait.
PROGRAM = """\
import os, queue, select, signal, threading, time
from build_tasks.doit_plugin import interrupts

def handler(number, frame):
    raise SystemExit(128 + number)

interrupts.end_waits()
for number in interrupts.ENDING:
    signal.signal(number, handler)
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.ENDING)
print("waits", flush=True)
{wait}
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "wait",
    [
        "queue.Queue().get()",  # as doit waits for the results of its threads
        "select.select([os.pipe()[0]], [], [])",  # as doit waits for the process of a stage
        "threading.Event().wait()",
        "time.sleep(1000)",
    ],
)
def test_a_signal_ends_a_wait_that_it_does_not_reach(wait: str, number: signal.Signals) -> None:
    program = PROGRAM.format(wait=wait)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    time.sleep(0.2)  # now it most likely waits; if not, the signal ends it in any case
    process.send_signal(number)
    try:
        assert process.wait(timeout=60) == 128 + number
    finally:
        process.kill()
        process.stdout.close()
