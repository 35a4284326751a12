"""A Triton server on this machine: how it starts, and how it loads a model.

    one of the servers of server_kinds.py ─► a process on this machine
                                                 │ HTTP (triton_client.py), with the key of this start
                                     load a model: None, or the reason why not

A request that loads a model may carry the model's files, and a Python model is code. So a server that is started here
takes such requests only with a random key, which no other client has. Source: docs/protocol/
extension_model_repository.md and docs/customization_guide/inference_protocols.md of Triton's server.

`doit check` and `doit serve` start a server. doit imports this module in runs that start none: imports that take long
stand inside the functions.
"""

import contextlib
import os
import re
import secrets
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import IO, NamedTuple

from build_tasks.errors import UserError
from build_tasks.paths import REPOSITORY
from build_tasks.runtime import hardware, resources
from build_tasks.serving import triton_core
from build_tasks.serving.server_kinds import IMAGE, require_free, succeeds
from build_tasks.serving.triton_client import KEY_NAME, Client
from build_tasks.triton.releases import VERSION_COMPATIBLE_OPTION

REPOSITORY_IN_IMAGE = "/models"

START_TIMEOUT = 120  # seconds until the server is live; in Docker, pip runs first
LIVE_TIMEOUT = 5  # seconds for one answer to "are you live?"
END_TIMEOUT = 5  # seconds until a process whose connection broke has ended
LOAD_TIMEOUT = 300  # seconds to load and warm up a model: a plan takes long, and the Python backend may hang

STRICT_OPTIONS = (
    *("--disable-auto-complete-config", "--exit-on-error=false", "--model-control-mode=explicit"),
    "--exit-timeout-secs=5",  # requests that still run when the server is stopped do not matter
    VERSION_COMPATIBLE_OPTION,  # a repository of this project may hold code anyway: its Python models
)

# The protocols that load models, map memory of other processes of this machine, and change what the server writes.
# Clients need none of them.
RESTRICTED_PROTOCOLS = "model-repository,shared-memory,trace,logging"

# The first release with --http-restricted-api. Source: src/command_line_parser.cc of the branches r23.10 and r23.11.
FIRST_RESTRICTED_RELEASE = "23.11"

# No bytecode beside Python models. The Python backend of release 24.10 ignores this (measured: its interpreter is
# isolated), so the core's Python sets it in another way, and published models keep bytecode out by themselves.
ENVIRONMENT = {"PYTHONDONTWRITEBYTECODE": "1"}


# The beginning of the stack in the message of a Python model's exception, and the same in the server's log.
STACK, ESCAPED_STACK = "\n\nAt:\n", "\\n\\nAt:\\n"


class NoAnswerError(UserError):
    """The server has ended, or does not answer any more."""


class Ports(NamedTuple):
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


class Launch(NamedTuple):
    """How a server is started. `environment` is added to the environment of this process."""

    command: list[str]
    environment: dict[str, str]
    description: str


def restrictions(key: str) -> list[str]:
    """The options that make a server refuse RESTRICTED_PROTOCOLS to requests without the key."""
    return [
        f"--{option}={RESTRICTED_PROTOCOLS}:{KEY_NAME}={key}"
        for option in ("http-restricted-api", "grpc-restricted-protocol")
    ]


def launch(kind: str, release: str, ports: Ports, address: str, backend_directory: str | None, key: str) -> Launch:
    """The command that starts a server.

    Triton takes the key on its command line only, where other users of this machine can read it.

    Args:
        kind: "local", "docker" or "core".
        release: Triton's release, which selects the image of Docker.
        ports: Ports of this machine.
        address: IPv4 address of this machine that the server listens on, as `bind_address` returns it.
        backend_directory: Folder with the backends of the core. Other servers have their own.
        key: Key of the restricted protocols.
    """
    if kind == "docker":
        return _launch_docker(release, ports, address, key)
    options = [f"--model-repository={os.path.abspath(REPOSITORY)}", *STRICT_OPTIONS, *restrictions(key)]
    for name, port in ports._asdict().items():
        options += [f"--{name}-address={address}", f"--{name}-port={port}"]
    if kind == "local":
        return Launch(["tritonserver", *options], ENVIRONMENT, "tritonserver on the PATH")
    options.append("--allow-gpu-metrics=false")
    if backend_directory:
        options.append(f"--backend-directory={backend_directory}")
    description = f"the server core {triton_core.RELEASE} from PyPI"
    environment = {**ENVIRONMENT, **triton_core.environment(backend_directory)}
    return Launch([triton_core.executable(), *options], environment, description)


def _launch_docker(release: str, ports: Ports, address: str, key: str) -> Launch:
    image = IMAGE.format(release)
    gpus = ["--gpus", "all"] if isinstance(hardware.gpu(), hardware.Gpu) else []
    mappings = [f"{address}:{port}:{inside}" for port, inside in zip(ports, Ports(), strict=True)]
    # The image does not have Pillow, which the Python models of ensembles decode images with.
    pip = shlex.join(["pip", "install", "--quiet", *triton_core.pillow_requirements()])
    options = shlex.join([f"--model-repository={REPOSITORY_IN_IMAGE}", *STRICT_OPTIONS, *restrictions(key)])
    script = f"{pip}; exec tritonserver {options}"
    command = [
        *("docker", "run", "--rm", "--init", *gpus, "--shm-size", "1g"),
        *(argument for mapping in mappings for argument in ("--publish", mapping)),
        *("--volume", f"{os.path.abspath(REPOSITORY)}:{REPOSITORY_IN_IMAGE}:ro"),
        *("--env", "PIP_BREAK_SYSTEM_PACKAGES=1", "--env", "PIP_CONSTRAINT="),  # as in container.py
        *(argument for name, value in ENVIRONMENT.items() for argument in ("--env", f"{name}={value}")),
        *(image, "bash", "-c", script),
    ]
    return Launch(command, {}, f"Docker's {image}")


class Server:
    """A running server.

    Args:
        http, grpc: host:port of the two protocols.
        log: The server's output, open for reading.
        process: The server's process, or that of `docker run`.
        key: Key of the restricted protocols.

    Attributes:
        is_core: Whether it is the core from PyPI, whose release may be older than that of the specs.
    """

    is_core = False

    def __init__(self, http: str, grpc: str, log: IO[str], process: "subprocess.Popen[bytes]", key: str = ""):
        self.http, self.grpc, self.log, self.process, self.key = http, grpc, log, process, key

    def load(self, model: str) -> str | None:
        """Load a model. Returns the reason if the server cannot load it, and None if it is loaded.

        The server writes some mistakes in a configuration only to its log: they are taken from there. Of the exception
        of a Python model, the reason has the first line; the server's log has its stack.

        Raises:
            NoAnswerError: If the server ends meanwhile, or does not answer within LOAD_TIMEOUT.
        """
        position = self.log.seek(0, os.SEEK_END)
        reason = self._send_load(model, position)
        if reason is None:
            return None
        self.log.seek(position)
        lines = self.log.read()
        not_polled = re.findall(rf"Poll failed for model directory '{re.escape(model)}': (.*)", lines)
        not_parsed = re.findall(r"Error parsing text-format inference\.ModelConfig: (.*)", lines)
        reason = "; ".join([*not_polled[-1:], *not_parsed[-1:]]) or reason.partition(STACK)[0]
        return re.sub(
            r"^load failed for model '[^']*': version \d+ is at UNAVAILABLE state: (Internal: TritonModelException: )?"
            r"|;?\s*$",
            "",
            reason,
        )

    def _send_load(self, model: str, position: int) -> str | None:
        """Send the request that loads a model, and return the server's reason if it cannot.

        A thread waits for the answer: if the server ends, the processes of its Python models keep the connection open
        for a while.

        Args:
            position: End of the log before the request.
        Raises:
            NoAnswerError: As of `load`.
        """
        answers: list[str | UserError | None] = []
        config = triton_core.config_without_newer_fields(f"{REPOSITORY}/{model}/config.pbtxt") if self.is_core else None

        def send() -> None:
            try:
                with contextlib.closing(Client("HTTP", self.http, timeout=LOAD_TIMEOUT, key=self.key)) as client:
                    answers.append(client.load(model, config))
            except UserError as error:
                answers.append(error)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        while thread.is_alive() and self.process.poll() is None:
            thread.join(0.2)
        if answers and not isinstance(answers[0], UserError):
            return answers[0]
        how = self.how_it_ended() or f"did not answer within {LOAD_TIMEOUT} s{busy_machine()}"
        self.log.seek(position)
        errors = re.findall(r'^E\d{4} \S+ \d+ [\w.]+:\d+\] "?(.*?)"?$', self.log.read(), re.MULTILINE)
        last_error = f"; its last error: {errors[-1].partition(ESCAPED_STACK)[0]}" if errors else ""
        raise NoAnswerError(f"the server {how} while it loaded this model{last_error}")

    def how_it_ended(self) -> str | None:
        """How the server has ended, "ended with SIGSEGV"; None if it runs.

        A connection breaks a moment before the process of a server that crashes has ended.
        """
        try:
            code = self.process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            return None
        # A shell, or Docker, adds 128 to the number of a signal.
        number = -code if code < 0 else code - 128
        known = number in [member.value for member in signal.Signals]
        return f"ended with {signal.Signals(number).name}" if known else f"ended with exit code {code}"


def free_ports() -> Ports:
    """Ports of the loopback interface that no process listens on."""
    import socket

    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in Ports._fields]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return Ports(*(each.getsockname()[1] for each in sockets))


@contextlib.contextmanager
def start(
    kind: str,
    release: str,
    ports: Ports,
    log: str,
    stubs: bool = False,
    address: str = "127.0.0.1",
    append: bool = False,
) -> Iterator[Server]:
    """Context manager for a server that is live and has loaded no model. It is stopped at the end.

    Args:
        kind, release, ports, address: As of `launch`.
        log: File for the server's output.
        stubs: Whether the core gets the stub backends. Other servers have their own backends.
        append: Whether the log keeps the output of an earlier server.
    Raises:
        UserError: If the server does not start, or must not.
    """
    if kind == "docker" and release < FIRST_RESTRICTED_RELEASE:
        raise UserError(
            f"Triton {release} cannot protect its HTTP port: whoever reaches it could run code. Set triton.release to "
            f"{FIRST_RESTRICTED_RELEASE} or newer, or use --server core"
        )
    require_free(ports._asdict(), address)
    os.makedirs(os.path.dirname(log), exist_ok=True)
    image = IMAGE.format(release)
    if kind == "docker" and not succeeds(["docker", "image", "inspect", image]):
        print(f"+ docker pull {image}", flush=True)
        if code := subprocess.run(["docker", "pull", image], check=False).returncode:
            raise UserError(f"docker pull {image} ended with exit code {code}")
    key = secrets.token_hex(32)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(triton_core.backend_directory(stubs)) if kind == "core" else None
        file = stack.enter_context(open(log, "a" if append else "w", encoding="utf-8"))
        launched = launch(kind, release, ports, address, folder, key)
        # With AIP_MODE, Triton opens another port, for Vertex AI, on all addresses.
        inherited = {name: value for name, value in os.environ.items() if name != "AIP_MODE"}
        environment = {**inherited, **launched.environment}
        process = subprocess.Popen(launched.command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            reader = stack.enter_context(open(log, encoding="utf-8", errors="replace"))
            host = "127.0.0.1" if address == "0.0.0.0" else address
            server = Server(f"{host}:{ports.http}", f"{host}:{ports.grpc}", reader, process, key)
            server.is_core = kind == "core"
            wait_until_live(server, launched.description, log)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def busy_machine() -> str:
    """Return what explains a server that is late, if other programs use this machine: " (load 8.1 on 2 cores)"."""
    load, cores = os.getloadavg()[0], resources.cores()
    return f" (this machine is busy: load {load:.1f} on {cores:g} cores; try again later)" if load > cores + 1 else ""


def wait_until_live(server: Server, description: str, log: str) -> None:
    """Wait until the server is live.

    Raises:
        UserError: If the server ends, or is not live within START_TIMEOUT seconds.
    """
    deadline, process = time.monotonic() + START_TIMEOUT, server.process
    with contextlib.closing(Client("HTTP", server.http, timeout=LIVE_TIMEOUT)) as client:
        while not client.live():
            if process.poll() is not None or time.monotonic() > deadline:
                with open(log, encoding="utf-8", errors="replace") as file:
                    last_lines = "".join(file.readlines()[-3:]).strip()
                late = f"did not answer within {START_TIMEOUT} s{busy_machine()}"
                ended = late if process.poll() is None else f"ended with exit code {process.returncode}"
                raise UserError(f"{description} {ended}: {last_lines} (the whole log: {log})")
            time.sleep(0.1)
