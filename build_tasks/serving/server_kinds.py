"""The Triton servers that this machine can start, and the addresses on which they may listen.

tritonserver on the PATH │ Docker, with the image of triton.release │ the core from PyPI (triton_core.py)
"""

import contextlib
import ipaddress
import shutil
import subprocess
from collections.abc import Mapping

from build_tasks.errors import UserError
from build_tasks.serving import triton_core

# Source: the container's page; see container.py for TensorRT's.
IMAGE = "nvcr.io/nvidia/tritonserver:{}-py3"
KINDS = ("auto", "local", "docker", "core")

SERVER_PARAM = {
    "name": "server", "long": "server", "type": str, "default": "auto", "choices": [(kind, "") for kind in KINDS],
    "help": "local: tritonserver on the PATH; docker; core: fetched by `doit tritonserver`; auto: the first of these",
}  # fmt: skip

# Older releases can be crashed, and may be made to run code, by requests without a login. Source: NVIDIA's security
# bulletin of August 2025 (CVE-2025-23310, CVE-2025-23311, CVE-2025-23319 and others).
FIRST_EXPOSED_RELEASE = "25.07"


def select_kind(kind: str, release: str) -> str:
    """The kind of server to start: `kind` itself, or for "auto" the first one that is available.

    Raises:
        UserError: If that kind, or any kind, is not available on this machine.
    """
    available = {
        "local": shutil.which("tritonserver") is not None,
        "docker": shutil.which("docker") is not None and succeeds(["docker", "version"]),
        "core": triton_core.installed(),
    }
    if kind == "auto":
        if first := next((name for name, is_available in available.items() if is_available), None):
            return first
        raise UserError(
            f"there is no Triton server on this machine: neither tritonserver on the PATH, nor Docker (for "
            f"{IMAGE.format(release)}), nor the server core from PyPI; {core_advice()}"
        )
    if not available[kind]:
        reasons = {
            "local": "there is no tritonserver on the PATH",
            "docker": "there is no docker on the PATH whose engine runs",
            "core": f"there is no {triton_core.CORE}; {core_advice()}",
        }
        raise UserError(f"--server {kind}: {reasons[kind]}")
    return kind


def core_advice() -> str:
    """Return how to get the server core, or why it does not run here."""
    return triton_core.unsupported_reason() or "`doit tritonserver` fetches it (some 70 MB)"


def succeeds(command: list[str]) -> bool:
    """Whether a command ends with exit code 0 within 20 seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    return False


def bind_address(kind: str, release: str, address: str) -> str:
    """The IPv4 address that a server listens on.

    Triton's HTTP server takes no names: for one, it listens on 255.255.255.255.

    Raises:
        UserError: If it is none, or if other machines would reach a release with known holes.
    """
    try:
        ip = ipaddress.IPv4Address("127.0.0.1" if address == "localhost" else address)
    except ValueError as error:
        raise UserError(f"--address: expected an IPv4 address, such as 127.0.0.1, found {address[:80]!r}") from error
    started = {"core": triton_core.RELEASE, "docker": release}.get(kind)  # the release of another server is unknown
    if started and started < FIRST_EXPOSED_RELEASE and not ip.is_loopback:
        raise UserError(
            f"--address {ip}: Triton {started} has holes that need no login, fixed in {FIRST_EXPOSED_RELEASE}; it "
            f"listens on 127.0.0.1 only. For other machines use --server local or docker with a newer release"
        )
    return str(ip)


def require_free(ports: Mapping[str, int], address: str) -> None:
    """Raise UserError if a process listens on a port: its answers would be taken for those of the new server.

    Args:
        ports: By the name of the option that sets them.
    """
    import socket

    for name, port in ports.items():
        with socket.socket() as each:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            try:
                each.bind((address, port))
            except OSError as error:
                found = f"port {port} of {address} cannot be used ({error.strerror})"
                raise UserError(f"{found}; `--{name} PORT` takes another one") from error
