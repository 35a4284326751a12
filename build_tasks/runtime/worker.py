"""Each stage runs in a child process of its own, forked from a server that has imported the heavy libraries once.

    doit ──► fork server (torch, timm, onnx … imported) ──► child: runs one stage, then ends
       ◄─────────── messages, then the result or the error ──────┘

A segfault, an out-of-memory kill or a Ctrl-C ends a child, and leaves the state of the build as it was. Twenty models
cost one import. Each thread of doit runs one child, if memory allows it. The children share the cores.
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
from build_tasks.runtime import progress, resources, temporary_folder, threads
from build_tasks.runtime.limits import ADVICE, STAGE_TIME, limit
from build_tasks.runtime.memory_budget import Budget
from build_tasks.runtime.progress import Message, ignore

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# The fork server imports these before its first child. It skips modules that are not installed.
STAGE_MODULES = [
    *(f"build_tasks.stages.{name}" for name in (
        "weights", "labels", "reference", "torchscript", "cast", "onnx", "precision", "engine", "aoti", "measure",
    )),
    *(f"build_tasks.formats.{name}" for name in (
        "checkpoints", "fp32_comparison", "input_samples", "onnx_export", "onnx_import", "per_sample_filters",
        "state_dicts", "torch_program", "torch_signature", "torchscript_device", "torchscript_graph",
    )),
]  # fmt: skip
# Before them it imports libraries that take a second or two each, for the stages that may run in this call of doit.
NETWORKS = ("torch", "timm", "timm.utils.model", "PIL.Image", "PIL.JpegImagePlugin", "safetensors.torch")
GRAPHS = ("torch", "torch.onnx", "onnx", "onnxslim", "onnxruntime")
RUNS = ("torch", "onnxruntime", "polygraphy.comparator", "polygraphy.cuda", "polygraphy.backend.onnxrt")
CONVERSIONS = ("modelopt.onnx.autocast", "modelopt.onnx.quantization", *GRAPHS, *RUNS)
HEAVY_LIBRARIES = {
    **dict.fromkeys(("weights", "labels", "torchscript", "aoti", "preprocess"), NETWORKS),
    "reference": (*NETWORKS, "torchvision.transforms.v2", *RUNS),
    "bench": (*NETWORKS, *RUNS),
    **dict.fromkeys(("precision", "repair", "layers"), CONVERSIONS),
    "cast": ("torch",),
    "onnx": GRAPHS,
    "measure": RUNS,
    "summary": ("matplotlib.pyplot",),
}
expected_stages: Collection[str] = ()  # the stages that may run; the reporter sets them

budget = Budget()  # the memory of all stages that run

HAS_FORK_SERVER = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
EXIT_TIMEOUT = 10  # seconds for a child to end after its result; a thread of some library may keep it alive

MAX_WAIT = 1e6  # seconds of one wait; the system's call takes no more than some 2e6
NO_MESSAGE = ("ended", None)  # stands for the messages of a child that has ended without a result
SERVER_KILLED = 255  # multiprocessing's exit code of a child whose fork server died; see its popen_forkserver.py
# For every Python process that starts here. An artifact must depend neither on the order of sets, nor on the number of
# cores, which affects the order in which NumPy adds.
# Logs are in UTF-8, whatever the locale is.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONUTF8": "1",
    "PYTHONIOENCODING": "utf-8:backslashreplace",
}

_starting = threading.Lock()


listener: Callable[[str, Message], None] = ignore  # in doit's process: takes a task and a message of its stage


class CrashError(Exception):
    """A stage ended without a result and without a UserError. The message ends with the path of its log."""


def call(function: Callable[..., Any], *arguments: object, log: str, task: str = "") -> Any:
    """Call a function in a child process of its own and return its result.

    Args:
        log: File that takes the output of the child.
        task: Name of the task that the child's progress messages belong to.

    Raises:
        UserError: If the function raises it, or takes longer than a stage may.
        CrashError: If the child fails in any other way.
    """
    os.makedirs(os.path.dirname(log), exist_ok=True)
    emit = _listener()
    minutes = limit(STAGE_TIME)
    connection, child = _start_child(log, function, arguments)
    end = time.monotonic() + 60 * minutes
    try:
        with contextlib.suppress(ConnectionError):  # the child has already ended, as _next_message will find
            connection.send(cores_per_stage())
        kind, value = _next_message(connection, child, end)
        while kind == "message":
            emit(task, value)
            kind, value = _next_message(connection, child, end)
    except TimeoutError as error:
        raise UserError(
            f"it takes longer than {minutes:g} minutes, as {STAGE_TIME} allows for a stage; {ADVICE} (the log: {log})"
        ) from error
    finally:
        connection.close()
        child.join(timeout=0 if sys.exc_info()[0] else EXIT_TIMEOUT)
        child.kill()
        child.join()
        if child.exitcode == SERVER_KILLED and os.name == "posix":  # the child itself may still be alive
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
    if kind == "result":
        return value
    if kind == "error":
        raise UserError(*value.split("\n"), limit=None)
    raise CrashError(f"{value or _exit_reason(child.exitcode)}\n{_last_lines(log)}(the whole log: {log})")


@contextlib.contextmanager
def reserve_memory(task: str, need: int) -> Iterator[None]:
    """Reserve bytes of the memory budget for a task's process; waits until they are free."""
    emit = _listener()

    def report_wait() -> None:
        emit(task, f"  {task} waits for memory: it may need {need / 1e9:.1f} of {budget.size / 1e9:.1f} GB")

    with budget.reserve(need, report_wait):
        yield


def cores_per_stage() -> int:
    """Number of cores for the process of one stage. OMP_NUM_THREADS in doit's environment is an upper bound.

    `doit -n` has a thread for each stage that may run at once, and ends a thread that has nothing left to do.
    """
    from doit.runner import MThreadRunner

    jobs = sum(isinstance(thread, MThreadRunner.DaemonThread) for thread in threading.enumerate())
    cores = max(1, int(resources.cores() / max(1, jobs)))
    bound = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(bound)) if bound.isdecimal() and int(bound) else cores


def _listener() -> Callable[[str, Message], None]:
    if multiprocessing.parent_process() is None:
        return listener
    _exit_with_parent()  # this is a worker of `doit -P process`, and must not outlive doit either
    return ignore  # the reporter is in another process


def _start_child(log: str, function: Callable[..., Any], arguments: tuple[object, ...]) -> tuple["Connection", Any]:
    """Start a child, which waits for its number of cores; return the connection to it, and its process.

    A fork server that was killed is started again, also if it is killed while it starts.
    """
    pauses = [1.0, 0.1]  # seconds, the last one first: a killed server looks alive for a moment
    while True:
        connection, end_of_child = multiprocessing.Pipe()
        child = _context().Process(target=_run, args=(end_of_child, log, function, arguments), daemon=True)
        try:
            with _environment():
                if HAS_FORK_SERVER:
                    _start_fork_server()
                child.start()
            return connection, child
        except (EOFError, ConnectionError) as error:
            connection.close()
            if not pauses:
                raise CrashError(
                    "the fork server, which stages' processes come from, is killed again and again"
                ) from error
            time.sleep(pauses.pop())
        finally:
            end_of_child.close()


def _next_message(connection: "Connection", child: Any, end: float) -> tuple[str, Any]:
    """Wait for the next message of a child; NO_MESSAGE if it has ended without one.

    Args:
        end: The time at which it must have ended, by the monotonic clock.
    Raises:
        TimeoutError: If it is later than that.
    """
    from multiprocessing.connection import wait

    while not wait([connection, child.sentinel], timeout=min(max(end - time.monotonic(), 0), MAX_WAIT)):
        if time.monotonic() >= end:
            raise TimeoutError
    try:
        message: tuple[str, Any] = connection.recv() if connection.poll() else NO_MESSAGE
    except (EOFError, ConnectionError):
        return NO_MESSAGE
    return message


def _context() -> Any:
    """The start method of children: a fork server or, on Windows, new processes that import everything themselves."""
    if not HAS_FORK_SERVER:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    first, last = (f"build_tasks.runtime.forkserver_{position}" for position in ("first", "last"))
    context.set_forkserver_preload(["__main__", first, *heavy_libraries(expected_stages), *STAGE_MODULES, last])
    return context


def heavy_libraries(stages: Collection[str]) -> list[str]:
    """The libraries that take long to import and that these stages need, each once."""
    return list(dict.fromkeys(name for stage in HEAVY_LIBRARIES if stage in stages for name in HEAVY_LIBRARIES[stage]))


def _start_fork_server() -> None:
    """Start the fork server if it does not run. Ctrl-C does not reach it: it would answer with a traceback of imports.

    doit itself waits for it without this block. The server ends with doit.
    """
    from multiprocessing import forkserver, resource_tracker

    resource_tracker.ensure_running()  # it would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    with _starting:
        variables = {**ENVIRONMENT, "TMPDIR": temporary_folder.folder()}
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@functools.cache
def _exit_with_parent() -> None:
    """From now on this process ends when doit ends, even if doit is killed."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(connection: "Connection", log: str, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches doit, and doit ends the child
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _exit_with_parent()
    progress.connect(connection)
    try:
        with open(log, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        threads.limit(connection.recv())
        message: tuple[str, Any] = "result", function(*arguments)
    except UserError as error:
        message = "error", str(error)
    except ModuleNotFoundError as error:
        message = "error", not_installed(error)
    except BaseException as error:  # includes a library's SystemExit, which is a crash of the stage
        with contextlib.suppress(OSError):  # the disk may be full
            traceback.print_exc()
        message = "crash", f"{type(error).__name__}: {error}"
    connection.send(message)
    with contextlib.suppress(OSError, ValueError):  # the stage may have closed them
        sys.stdout.flush()
        sys.stderr.flush()


def not_installed(error: ModuleNotFoundError) -> str:
    """The message about a package that a stage needs and that is not installed, with the command that installs it."""
    return f"the package {error.name} is not installed here: pip install -r requirements.txt"


def _exit_reason(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = ", most likely because memory ran out" if name == "SIGKILL" else ""
        return f"the stage's process was killed by {name}{hint}"
    if exitcode == SERVER_KILLED:
        return "the fork server, which the stage's process came from, was killed; the stage was ended with it"
    return f"the stage's process ended without a result (exit code {exitcode})"


def _last_lines(log: str, count: int = 12) -> str:
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            return "".join(f"  | {line.rstrip()}\n" for line in file.readlines()[-count:])
    except OSError:
        return ""
