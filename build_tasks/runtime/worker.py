"""Each stage runs in a child process of its own, forked from a server that has imported the heavy libraries once.

    doit ──► fork server (torch, timm, onnx … imported) ──► child: one stage, then gone
       ◄──────────────── result, refusal or last words ────────┘

A segfault, an out-of-memory kill or a Ctrl-C ends a child, never the build's state. Twenty models cost one import. As
many children run at once as doit has threads, if they fit into memory; they share the cores.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.runtime import progress, resources, threads
from build_tasks.runtime.memory_budget import Budget
from build_tasks.runtime.progress import Message, ignore

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# Imported by the server before its first child; what is not installed is passed over.
OWN = [
    *(f"build_tasks.stages.{name}" for name in (
        "weights", "labels", "reference", "torchscript", "cast", "onnx", "precision", "engine", "measure",
    )),
    "build_tasks.formats.torchscript_graph",
]  # fmt: skip
# Before that, what takes a second or two each, for the stages that this run may come to.
NETWORKS = ("torch", "timm", "timm.utils.model", "PIL.Image", "safetensors.torch")
GRAPHS = ("torch", "torch.onnx", "onnx", "onnxslim", "onnxruntime")
RUNS = ("torch", "onnxruntime", "polygraphy.comparator", "polygraphy.backend.onnxrt")
CONVERSIONS = ("modelopt.onnx.autocast", "modelopt.onnx.quantization", *GRAPHS, *RUNS)
PRELOAD = {
    **dict.fromkeys(("weights", "labels", "torchscript", "preprocess"), NETWORKS),
    **dict.fromkeys(("reference", "bench"), (*NETWORKS, *RUNS)),
    **dict.fromkeys(("precision", "repair", "layers"), CONVERSIONS),
    "cast": ("torch",),
    "onnx": GRAPHS,
    "measure": RUNS,
    "summary": ("matplotlib.pyplot",),
}
stages: Collection[str] = ()  # that this run may come to

budget = Budget()  # of all stages that run

PATIENCE = 10  # seconds for a child to end after its last word; a thread of some library may keep it

DEATH = ("death", None)  # the last word of a child that had none
SERVER_GONE = 255  # what multiprocessing says of a child whose fork server died; see its popen_forkserver.py
# Of what starts Python here: the order of sets must not show in an artifact, nor the number of cores in NumPy's sums.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}

_starting = threading.Lock()


audience: Callable[[str, Message], None] = ignore  # in doit's process: who hears what a stage has to tell


class CrashError(Exception):
    """A stage that neither succeeded nor refused; the message ends with where to look."""


def call(function: Callable[..., Any], *arguments: object, log: str, task: str = "") -> Any:
    """`function(*arguments)` in a child of its own, whose output goes to the file `log`.

    task: on whose behalf the child tells how far it is.
    Raises UserError as the function did, CrashError for everything else.
    """
    os.makedirs(os.path.dirname(log), exist_ok=True)
    hear = _listener()
    connection, child = _started(log, function, arguments)
    try:
        with contextlib.suppress(ConnectionError):  # it is dead already, as its next word will say
            connection.send(share())
        kind, value = _next_word(connection, child)
        while kind == "message":
            hear(task, value)
            kind, value = _next_word(connection, child)
    finally:
        connection.close()
        child.join(timeout=0 if sys.exc_info()[0] else PATIENCE)
        child.kill()
        child.join()
        if child.exitcode == SERVER_GONE and os.name == "posix":  # then nobody knows how the child is
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
    if kind == "result":
        return value
    if kind == "refusal":
        raise UserError(value)
    raise CrashError(f"{value or _obituary(child.exitcode)}\n{_last_lines(log)}(the whole log: {log})")


@contextlib.contextmanager
def room(task: str, need: int) -> Iterator[None]:
    """Have so many bytes of memory for a task's process, which may take waiting."""
    hear = _listener()

    def waits() -> None:
        hear(task, f"  {task} waits for memory: it may need {need / 1e9:.1f} of {budget.size / 1e9:.1f} GB")

    with budget.held(need, waits):
        yield


def share() -> int:
    """The cores of one stage's process. OMP_NUM_THREADS, of whoever started doit, is a bound to it.

    `doit -n` has a thread for each stage that it may run at once, and ends it when there is nothing left for it.
    """
    from doit.runner import MThreadRunner

    jobs = sum(isinstance(thread, MThreadRunner.DaemonThread) for thread in threading.enumerate())
    cores = max(1, int(resources.cores() / max(1, jobs)))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


def _listener() -> Callable[[str, Message], None]:
    if multiprocessing.parent_process() is None:
        return audience
    _follow_parent()  # this is a worker of `doit -P process`, which must not outlive doit either
    return ignore  # whose reporter is in another process


def _started(log: str, function: Callable[..., Any], arguments: tuple[object, ...]) -> tuple["Connection", Any]:
    """A child, and the connection to it. It does nothing before it is told its share of the cores.

    A fork server that was killed is started anew, also if that happens right now.
    """
    pauses = [1.0, 0.1]  # seconds, the last first: for a moment, what has been killed still looks alive
    while True:
        ours, theirs = multiprocessing.Pipe()
        child = _context().Process(target=_run, args=(theirs, log, function, arguments), daemon=True)
        try:
            with _environment():
                child.start()  # and the fork server, where it does not run yet
            return ours, child
        except (EOFError, ConnectionError) as error:
            ours.close()
            if not pauses:
                raise CrashError(
                    "the fork server, which stages' processes come from, is killed again and again"
                ) from error
            time.sleep(pauses.pop())
        finally:
            theirs.close()


def _next_word(connection: "Connection", child: Any) -> tuple[str, Any]:
    """What a child says next, or that it has ended without a word."""
    from multiprocessing.connection import wait

    wait([connection, child.sentinel])
    try:
        word: tuple[str, Any] = connection.recv() if connection.poll() else DEATH
    except (EOFError, ConnectionError):
        return DEATH
    return word


def _context() -> Any:
    """How children begin: from a fork server, or, on Windows, as processes that import everything themselves."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    first, last = (f"build_tasks.runtime.forkserver_{place}" for place in ("first", "last"))
    context.set_forkserver_preload(["__main__", first, *heavy(stages), *OWN, last])
    return context


def heavy(stages: Collection[str]) -> list[str]:
    """What takes long to import for these stages, each once."""
    return list(dict.fromkeys(module for stage in PRELOAD if stage in stages for module in PRELOAD[stage]))


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    with _starting:
        before = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@functools.cache
def _follow_parent() -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _run(connection: "Connection", log: str, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches doit, and doit ends the child
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _follow_parent()
    progress.connect(connection)
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        threads.limit(connection.recv())
        message: tuple[str, Any] = "result", function(*arguments)
    except UserError as error:
        message = "refusal", str(error)
    except ModuleNotFoundError as error:
        message = "refusal", not_installed(error)
    except BaseException as error:  # a SystemExit of a library, too, is a crash of the stage
        with contextlib.suppress(OSError):  # the disk is full, say
            traceback.print_exc()
        message = "crash", f"{type(error).__name__}: {error}"
    connection.send(message)
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
    if exitcode == SERVER_GONE:
        return "the fork server, which the stage's process came from, was killed; the stage was ended with it"
    return f"the stage's process ended without a word (exit code {exitcode})"


def _last_lines(log: str, count: int = 12) -> str:
    try:
        with open(log, errors="replace") as file:
            return "".join(f"  | {line.rstrip()}\n" for line in file.readlines()[-count:])
    except OSError:
        return ""
