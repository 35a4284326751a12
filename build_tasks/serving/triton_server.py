"""Triton's server on this machine: which there is, how it is started, and what it says of a model.

Every doit imports this, so that what takes time to import is imported where it is used.

    tritonserver on the PATH │ Docker, with the image of triton.release │ the core from PyPI in build/.tritonserver

`doit tritonserver` fetches the third, and `doit serve` runs one of them over model_repository/.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from build_tasks.errors import UserError
from build_tasks.paths import BUILD, REPOSITORY
from build_tasks.runtime import atomic_files, hardware

CORE = f"{BUILD}/.tritonserver"
REQUIREMENTS = "requirements-tritonserver.txt"
CORE_RELEASE = "24.10"  # of the core that REQUIREMENTS name

# Source: the container's page; see container.py for TensorRT's.
IMAGE = "nvcr.io/nvidia/tritonserver:{}-py3"
IN_IMAGE = "/models"

KINDS = ("auto", "local", "docker", "core")
PYTHON_BACKENDS = "build_tasks/serving/stub_backends"
WAIT = 120  # seconds for the server to be alive; in Docker, pip goes first

LOADING = 300  # seconds for a model, warm-up and all: a plan takes long, and the Python backend may hang

SERVER = {
    "name": "server", "long": "server", "type": str, "default": "auto", "choices": [(kind, "") for kind in KINDS],
    "help": "local: tritonserver on the PATH; docker; core: the one that `doit tritonserver` fetches; auto: the first",
}  # fmt: skip

STRICT = (
    *("--disable-auto-complete-config", "--exit-on-error=false", "--model-control-mode=explicit"),
    "--exit-timeout-secs=5",  # what still runs then is of no interest
)


class Ports(NamedTuple):
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


class Launch(NamedTuple):
    """How a server is started."""

    command: list[str]
    environment: dict[str, str]
    told: str  # which server it is


def which(kind: str, release: str) -> str:
    """The kind of server that is used here. UserError where there is none."""
    there = {
        "local": shutil.which("tritonserver") is not None,
        "docker": shutil.which("docker") is not None and _answers(["docker", "version"]),
        "core": os.path.isdir(CORE),
    }
    if kind == "auto":
        if found := next((k for k, here in there.items() if here), None):
            return found
        raise UserError(
            f"there is no Triton here: neither tritonserver on the PATH, nor Docker (for {IMAGE.format(release)}), nor "
            "the server core from PyPI, which `doit tritonserver` fetches (some 70 MB)"
        )
    if not there[kind]:
        lacking = {
            "local": "there is no tritonserver on the PATH",
            "docker": "there is no docker here whose engine runs",
            "core": f"there is no {CORE}: `doit tritonserver` fetches it (some 70 MB)",
        }
        raise UserError(lacking[kind])
    return kind


def _answers(command: list[str]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    return False


def launch(kind: str, release: str, ports: Ports, address: str, backends: str | None) -> Launch:
    """The command of a server. backends: a folder of backends for the core; other servers have their own."""
    if kind == "docker":
        gpus = ["--gpus", "all"] if isinstance(hardware.gpu(), hardware.Gpu) else []
        published = [f"{address}:{port}:{inside}" for port, inside in zip(ports, Ports(), strict=True)]
        # The Python models of ensembles decode with Pillow, which the image does not have.
        pip = shlex.join(["pip", "install", "--quiet", *re.findall(r"^pillow==\S+", _text(REQUIREMENTS) or "", re.M)])
        script = f"{pip}; exec tritonserver --model-repository={IN_IMAGE} {shlex.join(STRICT)}"
        command = [
            *("docker", "run", "--rm", "--init", *gpus, "--shm-size", "1g"),
            *(part for mapping in published for part in ("--publish", mapping)),
            *("--volume", f"{os.path.abspath(REPOSITORY)}:{IN_IMAGE}:ro"),
            *("--env", "PIP_BREAK_SYSTEM_PACKAGES=1", "--env", "PIP_CONSTRAINT="),  # as in container.py
            *(IMAGE.format(release), "bash", "-c", script),
        ]
        return Launch(command, {}, f"Docker's {IMAGE.format(release)}")
    flags = [f"--model-repository={os.path.abspath(REPOSITORY)}", *STRICT]
    flags += [
        f"--{name}-{what}={value}"
        for name, port in ports._asdict().items()
        for what, value in (("address", address), ("port", port))
    ]
    if kind == "local":
        return Launch(["tritonserver", *flags], {}, "tritonserver on the PATH")
    package = os.path.abspath(f"{CORE}/package")
    environment = {
        "LD_LIBRARY_PATH": f"{package}/nvidia_pytriton.libs",
        "PATH": f"{os.path.abspath(CORE)}/python/bin{os.pathsep}{os.environ['PATH']}",
        "TRITON_PYTHON_BACKENDS_PATH": os.pathsep.join(path for path in sys.path if path.endswith("-packages")),
    }
    command = [f"{package}/pytriton/tritonserver/bin/tritonserver", *flags, "--allow-gpu-metrics=false"]
    if backends:
        command.append(f"--backend-directory={os.path.abspath(backends)}")
    return Launch(command, environment, f"the server core {CORE_RELEASE} from PyPI")


@contextlib.contextmanager
def backends(kind: str, stand_ins: bool) -> Iterator[str | None]:
    """A folder of backends for the core: Python's, and, as stand-ins in Python, those for ONNX and TorchScript."""
    if kind != "core":
        yield None
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="backends-") as folder:
        home = f"{CORE}/package/pytriton/tritonserver"
        shutil.copytree(f"{home}/backends/python", f"{folder}/python")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copy(f"{home}/python_backend_stubs/{version}/triton_python_backend_stub", f"{folder}/python")
        if stand_ins:
            for name in os.listdir(PYTHON_BACKENDS):
                if os.path.exists(f"{PYTHON_BACKENDS}/{name}/model.py"):
                    os.makedirs(f"{folder}/{name}")
                    shutil.copy(f"{PYTHON_BACKENDS}/{name}/model.py", f"{folder}/{name}")
        yield folder


class Server:
    """A server that runs: where it listens, and what it writes."""

    def __init__(self, http: str, grpc: str, log: IO[str], process: "subprocess.Popen[bytes]"):
        self.http, self.grpc, self.log, self.process = http, grpc, log, process

    def request(self, path: str, body: dict[str, Any] | None = None, timeout: float = 600) -> tuple[int, str]:
        """HTTP's status and answer. OSError where nothing answers."""
        import urllib.error
        import urllib.request

        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/{path}", data, timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def alive(self) -> bool:
        try:
            return self.request("health/live", timeout=5)[0] == 200
        except OSError:
            return False

    def load(self, name: str) -> str | None:
        """Load a model. Why it cannot be, None where it is.

        What the server finds wrong in a configuration it tells to its standard error alone.
        """
        self.log.seek(0, os.SEEK_END)
        place = self.log.tell()
        try:
            status, answer = self.request(f"repository/models/{name}/load", {}, timeout=LOADING)
        except OSError as error:  # it hangs, or has ended
            return f"the server did not answer within {LOADING} s, or ended ({error})"
        if status == 200:
            return None
        reason = str(json.loads(answer)["error"])
        self.log.seek(place)
        said = self.log.read()
        polled = re.findall(rf"Poll failed for model directory '{re.escape(name)}': (.*)", said)
        parsed = re.findall(r"Error parsing text-format inference\.ModelConfig: (.*)", said)
        reason = "; ".join([*polled[-1:], *parsed[-1:]]) or reason
        return re.sub(r"^load failed for model '[^']*': version \d+ is at UNAVAILABLE state: |;?\s*$", "", reason)


def free_ports() -> Ports:
    """Ports of the loopback that nobody listens on."""
    import socket

    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in Ports._fields]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return Ports(*(each.getsockname()[1] for each in sockets))


@contextlib.contextmanager
def started(
    kind: str,
    release: str,
    ports: Ports,
    log: str,
    stand_ins: bool = False,
    address: str = "127.0.0.1",
) -> Iterator[Server]:
    """A server that is alive, with nothing loaded; gone afterwards. UserError where it does not start.

    log: where its output goes.
    """
    os.makedirs(os.path.dirname(log), exist_ok=True)
    image = IMAGE.format(release)
    if kind == "docker" and not _answers(["docker", "image", "inspect", image]):
        print(f"+ docker pull {image}", flush=True)
        if code := subprocess.run(["docker", "pull", image], check=False).returncode:
            raise UserError(f"docker pull {image} ended with exit code {code}")
    with backends(kind, stand_ins) as folder, open(log, "w+", encoding="utf-8") as file:
        start = launch(kind, release, ports, address, folder)
        process = subprocess.Popen(
            start.command, env={**os.environ, **start.environment}, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            with open(log, encoding="utf-8", errors="replace") as reader:
                host = "127.0.0.1" if address == "0.0.0.0" else address
                server = Server(f"{host}:{ports.http}", f"{host}:{ports.grpc}", reader, process)
                wait(server, start, log)
                yield server
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait(server: Server, start: Launch, log: str) -> None:
    """Until the server is alive. UserError where it ends, or is not within WAIT seconds."""
    until, process = time.monotonic() + WAIT, server.process
    while not server.alive():
        if process.poll() is not None or time.monotonic() > until:
            with open(log, encoding="utf-8", errors="replace") as file:
                last = "".join(file.readlines()[-3:]).strip()
            ended = f"ended with exit code {process.returncode}" if process.poll() is not None else "does not answer"
            raise UserError(f"{start.told} {ended}: {last} (all of it: {log})")
        time.sleep(0.1)


def task() -> dict[str, Any]:
    return {
        "actions": [fetch],
        "uptodate": [lambda: _text(f"{CORE}/installed") == _wanted()],
        "io": {"capture": False},
        "doc": f"On demand: fetch Triton's server core from PyPI -> {CORE}, for check and serve",
    }


def _wanted() -> str:
    return f"{sys.version_info[:2]}\n{_text(REQUIREMENTS)}"


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return None


def fetch() -> Any:
    """doit's action: the core and its NumPy in a folder, and a Python that sees them and nothing else."""
    from doit.exceptions import TaskFailed

    with atomic_files.scratch_dir() as folder:
        draft = f"{folder}/tritonserver"
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        line += ["--no-deps", "--only-binary=:all:", "--target", f"{draft}/package", "-r", REQUIREMENTS]
        print(f"+ {shlex.join(line)}", flush=True)
        if code := subprocess.run(line, check=False).returncode:
            return TaskFailed(
                f"pip ended with exit code {code}; the core is for Linux on x86-64, and Python 3.11 and 3.12"
            )
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", f"{draft}/python"], check=True)
        site = f"{draft}/python/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        with open(f"{site}/package.pth", "w", encoding="utf-8") as file:
            file.write(f"{os.path.abspath(CORE)}/package\n")
        with open(f"{draft}/installed", "w", encoding="utf-8") as file:
            file.write(_wanted())
        atomic_files.replace(draft, CORE)
    return None
