"""serve: a Triton server over model_repository/, in the foreground, until Ctrl-C

model_repository/ ─► server (triton_server.py) ─► every model loaded ─► HTTP, gRPC, metrics
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from doit.exceptions import TaskFailed

from build_tasks.errors import UserError
from build_tasks.paths import BUILD, REPOSITORY
from build_tasks.serving import server_kinds, triton_server
from build_tasks.serving.check import format_load_result, loading_line
from build_tasks.serving.triton_server import Ports
from build_tasks.spec.model import Model
from build_tasks.triton.repository import published_models

LOG = f"{BUILD}/serve.log"

PARAMS = [
    server_kinds.SERVER_PARAM,
    {
        "name": "address", "long": "address", "type": str, "default": "127.0.0.1",
        "help": "IPv4 address where the server listens; 0.0.0.0 admits other machines (Triton 25.07 or newer)",
    },
    *(
        {"name": name, "long": name, "type": int, "default": port, "help": f"port of {name}"}
        for name, port in Ports()._asdict().items()
    ),
]  # fmt: skip


def task(models: list[Model]) -> dict[str, Any]:
    """doit's task `serve`."""
    return {
        "actions": [(serve, [models])],
        "params": PARAMS,
        "io": {"capture": False},
        "doc": f"On demand: serve {REPOSITORY}/, until Ctrl-C",
    }


def serve(models: list[Model], server: str, address: str, http: int, grpc: int, metrics: int) -> TaskFailed | None:
    """doit's action: start a server, load every model, and wait until the server ends.

    If the specs name several releases, the newest serves all models.
    """
    names, release = published_models(), max(model.release for model in models)
    if not names:
        return TaskFailed(f"{REPOSITORY}/ has no model; `doit` builds them")
    if others := sorted({model.release for model in models} - {release}):
        print(f"the specs name the releases {', '.join([*others, release])}; {release} serves all models", flush=True)
    try:
        kind = server_kinds.select_kind(server, release)
        address = server_kinds.bind_address(kind, release, address)
        if kind == "core":
            print(
                "the server core from PyPI has only the Python backend: stubs run ONNX and TorchScript models in it, "
                "with the same libraries, on the CPU; use it to try clients, not to measure",
                flush=True,
            )
        ports = Ports(http, grpc, metrics)
        print(f"starting Triton ({kind}); log: {LOG}", flush=True)
        with triton_server.start(kind, release, ports, LOG, stubs=True, address=address) as running:
            print(loading_line(names), flush=True)
            for name in names:
                try:
                    print(f"  {name}: {format_load_result(running.load(name))}", flush=True)
                except triton_server.NoAnswerError as error:
                    return TaskFailed(f"{name}: {error}; the server's log: {LOG}")
            urls = f"HTTP {address}:{http}, gRPC {address}:{grpc}, metrics {address}:{metrics}"
            try:
                with interruptible():
                    print(f"serving: {urls}; log: {LOG}; Ctrl-C stops the server", flush=True)
                    code = running.process.wait()
            except KeyboardInterrupt:
                print("stopped", flush=True)
                return None
    except UserError as error:
        return TaskFailed(str(error))
    return TaskFailed(f"the server ended with exit code {code}; its log: {LOG}")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Context manager in which Ctrl-C raises KeyboardInterrupt. Elsewhere it ends the run, with exit code 130."""
    if threading.current_thread() is not threading.main_thread():  # doit -n 2; only the main thread sets handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
