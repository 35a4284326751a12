"""Each stage runs in a child process of its own, forked from a server that has imported the heavy libraries once.

    doit ──► fork server (torch, timm, onnx … imported) ──► child: one stage, then gone
       ◄──────────────── result, refusal or last words ────────┘

A segfault, an out-of-memory kill or a Ctrl-C ends a child, never the build's state. Twenty models cost one import.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from build_tasks.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# Imported by the server before its first child; what is not installed is passed over.
PRELOAD = [
    "torch", "torch.onnx", "timm", "timm.utils.model", "PIL.Image", "safetensors.torch",
    "onnx", "onnxslim", "onnxruntime", "polygraphy.comparator", "polygraphy.backend.onnxrt",
    "modelopt.onnx.autocast", "modelopt.onnx.quantization", "matplotlib.pyplot", "rich.table",
    "build_tasks.weights", "build_tasks.labels", "build_tasks.reference", "build_tasks.torchscript",
    "build_tasks.onnx", "build_tasks.precision", "build_tasks.engine", "build_tasks.measure", "build_tasks.server",
]  # fmt: skip

PATIENCE = 10  # seconds for a child to end after its last word; a thread of some library may keep it

terminal: TextIO = sys.stderr  # in a child: where a person may be watching, while the rest goes to the log

_starting = threading.Lock()


class CrashError(Exception):
    """A stage that neither succeeded nor refused; the message ends with where to look."""


def call(function: Callable[..., Any], *arguments: object, log: str) -> Any:
    """`function(*arguments)` in a child of its own, whose output goes to the file `log`.

    Raises UserError as the function did, CrashError for everything else.
    """
    from multiprocessing.connection import wait

    os.makedirs(os.path.dirname(log), exist_ok=True)
    if multiprocessing.parent_process() is not None:
        _follow_parent()  # this is a worker of `doit -P process`, which must not outlive doit either
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = _context().Process(target=_run, args=(sender, log, function, arguments), daemon=True)
    child.start()
    sender.close()
    try:
        wait([receiver, child.sentinel])
        kind, value = receiver.recv() if receiver.poll() else ("death", None)
    except EOFError:
        kind, value = "death", None
    finally:
        receiver.close()
        child.join(timeout=0 if sys.exc_info()[0] else PATIENCE)
        child.kill()
        child.join()
    if kind == "result":
        return value
    if kind == "refusal":
        raise UserError(value)
    raise CrashError(f"{value or _obituary(child.exitcode)}\n{_last_lines(log)}(the whole log: {log})")


def _context() -> Any:
    """The fork server's context; the server is started by the first call.

    Its hash seed is fixed: the order of sets must not show in an artifact.
    """
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    with _starting:
        context.set_forkserver_preload(["__main__", *PRELOAD])
        seed = os.environ.get("PYTHONHASHSEED")
        os.environ["PYTHONHASHSEED"] = "0"
        try:
            forkserver.ensure_running()
        finally:
            if seed is None:
                del os.environ["PYTHONHASHSEED"]
            else:
                os.environ["PYTHONHASHSEED"] = seed
    return context


@functools.cache
def _follow_parent() -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _run(sender: "Connection", log: str, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches doit, and doit ends the child
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _follow_parent()
    global terminal
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        message: tuple[str, Any] = "result", function(*arguments)
    except UserError as error:
        message = "refusal", str(error)
    except ModuleNotFoundError as error:
        message = "refusal", not_installed(error)
    except BaseException as error:  # a SystemExit of a library, too, is a crash of the stage
        traceback.print_exc()
        message = "crash", f"{type(error).__name__}: {error}"
    sender.send(message)
    with contextlib.suppress(OSError, ValueError):  # whatever the stage did to them
        sys.stdout.flush()
        sys.stderr.flush()


def not_installed(error: ModuleNotFoundError) -> str:
    """What to do about a package that a stage needs."""
    return f"the package {error.name} is not installed here: pip install -r requirements.txt"


def _die_with_parent() -> None:
    """A process whose doit was killed must not go on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _obituary(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = ", most likely for want of memory" if name == "SIGKILL" else ""
        return f"the stage's process was killed by {name}{hint}"
    return f"the stage's process ended without a word (exit code {exitcode})"


def _last_lines(log: str, count: int = 12) -> str:
    try:
        with open(log, errors="replace") as file:
            return "".join(f"  | {line.rstrip()}\n" for line in file.readlines()[-count:])
    except OSError:
        return ""
