"""serve: Triton's server over model_repository/, in the foreground, until Ctrl-C"""

from typing import Any

from doit.exceptions import TaskFailed

from build_tasks.errors import UserError
from build_tasks.paths import BUILD, REPOSITORY
from build_tasks.serving import triton_server
from build_tasks.serving.check import reason_told
from build_tasks.serving.triton_server import Ports
from build_tasks.spec.model import Model
from build_tasks.triton.repository import published_models

LOG = f"{BUILD}/serve.log"

PARAMS = [
    triton_server.SERVER,
    {"name": "address", "long": "address", "type": str, "default": "127.0.0.1", "help": "0.0.0.0 lets others in"},
    *(
        {"name": name, "long": name, "type": int, "default": port, "help": f"port of {name}"}
        for name, port in Ports()._asdict().items()
    ),
]


def task(models: list[Model]) -> dict[str, Any]:
    return {
        "actions": [(serve, [models])],
        "params": PARAMS,
        "io": {"capture": False},
        "doc": f"On demand: serve {REPOSITORY}/, until Ctrl-C",
    }


def serve(models: list[Model], server: str, address: str, http: int, grpc: int, metrics: int) -> TaskFailed | None:
    """doit's action."""
    names, release = published_models(), max(model.release for model in models)
    if not names:
        return TaskFailed(f"{REPOSITORY}/ has no model; `doit` builds them")
    if others := sorted({model.release for model in models} - {release}):
        print(f"the specs name the releases {', '.join([*others, release])}: {release} serves", flush=True)
    try:
        kind = triton_server.which(server, release)
        if kind == "core":
            print(
                "the server core from PyPI has no backend but Python's, and runs ONNX and TorchScript models by the "
                "same libraries in that, on the CPU: to try a client with, not to measure by",
                flush=True,
            )
        ports = Ports(http, grpc, metrics)
        with triton_server.started(kind, release, ports, LOG, stand_ins=True, address=address) as running:
            for name in names:
                print(f"  {name}: {reason_told(running.load(name))}", flush=True)
            where = f"HTTP {address}:{http}, gRPC {address}:{grpc}, metrics {address}:{metrics}"
            print(f"serving: {where}; log: {LOG}; Ctrl-C ends it", flush=True)
            code = running.process.wait()
    except UserError as error:
        return TaskFailed(str(error))
    return TaskFailed(f"the server ended with exit code {code}; its log: {LOG}")
