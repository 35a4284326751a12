"""The Dask cluster of a farm: its address, what its workers have, and whether they fit this machine.

BUILD_SCHEDULER ─► loopback, or TLS ─► Client ─► workers: resources, versions ─► refused, or used
"""

import contextlib
import ipaddress
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any
from urllib.parse import urlsplit

from build_tasks.errors import UserError, first_lines, listed
from build_tasks.farm import remote
from build_tasks.farm.units import PYTORCH, SLOT, TENSORRT, gpu_resource
from build_tasks.runtime.distributions import installed_version

SCHEDULER = "BUILD_SCHEDULER"
STARTUP = 120  # seconds for the workers of this machine to start
STEP = 0.1  # seconds between two looks at the units
POLL = 2.0  # seconds between two looks at the workers
LOST = "the scheduler has gone; what was finished is in the build cache, and the next `doit farm` goes on from there"
TIMEOUT = 15  # seconds to reach the scheduler
INSTALL = "pip install -r requirements-farm.txt"
# Distributions of the farm itself, in addition to the tools of the stages.
FARM_DISTRIBUTIONS = ("distributed", "dask", "doit", "msgspec", "fsspec")


def check_address(address: str) -> str:
    """Return the address of a scheduler.

    Raises:
        UserError: If it is none, or if it is not loopback and has no TLS: whoever reaches a scheduler of Dask can run
            code on all of its workers.
    """
    parts = urlsplit(address)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("tcp", "tls") or not host or not port:
        raise UserError(f"expected the address of a Dask scheduler, tls://host:8786, found {address!r}")
    if parts.scheme == "tcp" and not is_loopback(host):
        raise UserError(
            f"{address} has no TLS: whoever reaches it can run code on its workers; use tls:// with certificates "
            "(docs/how-to/farm.md shows how to make them)"
        )
    return address


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, by its name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def connect(address: str) -> Any:
    """Return Dask's client.

    Raises:
        UserError: If the scheduler cannot be reached, or if Dask is not installed.
    """
    try:
        import cloudpickle
        from distributed import Client, Security
    except ImportError as error:
        raise UserError(f"a farm needs Dask distributed ({INSTALL}): {first_lines(error)}") from error
    cloudpickle.register_pickle_by_value(remote)
    try:
        security = Security() if address.startswith("tls://") else None  # from Dask's configuration
        return Client(address, security=security, timeout=TIMEOUT, set_as_default=False)
    except Exception as error:  # of the connection, of the certificates
        raise UserError(f"{address}: {first_lines(error)}") from error


def with_its_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of remote.py in a form that Dask sends with its code, and not as the name of a module.

    Dask takes cloudpickle, which `connect` prepares for this, only for what pickle cannot send.
    """
    return lambda *arguments: function(*arguments)


def workers_of(client: Any) -> dict[str, dict[str, Any]]:
    """Return what the scheduler knows about its workers, by address."""
    found: dict[str, dict[str, Any]] = client.scheduler_info(n_workers=-1)["workers"]
    return found


def count_resources(client: Any) -> dict[str, int]:
    """Return the number of workers that have a resource, by its name.

    Raises:
        UserError: If the scheduler has gone.
    """
    if client.status != "running":
        raise UserError(LOST)
    try:
        return dict(Counter(name for worker in workers_of(client).values() for name in worker["resources"]))
    except (OSError, TimeoutError) as error:
        raise UserError(LOST) from error


def wait_for_any(client: Any, futures: Collection[Any]) -> list[Any]:
    """Wait until one of Dask's futures is done, for POLL seconds at most; returns those that are done.

    Raises:
        UserError: If the scheduler has gone.
    """
    end = time.monotonic() + POLL
    while not (done := [future for future in futures if future.done()]) and time.monotonic() < end:
        if client.status != "running":
            raise UserError(LOST)
        time.sleep(STEP)
    return done


def check_versions(client: Any, tools: Collection[str]) -> None:
    """Compare the versions of the workers with those of this machine. What one of them does not have is not compared.

    Raises:
        UserError: If one differs. The results of such a worker would have another key in the build cache.
    """
    distributions = sorted({*tools, *FARM_DISTRIBUTIONS})
    here = remote.describe(distributions)
    for address, there in client.run(remote.describe, distributions).items():
        name = workers_of(client).get(address, {}).get("name", address)
        differences = [
            f"{tool} {version}, here {here[tool]}"
            for tool, version in there.items()
            if here.get(tool) not in (None, version)
        ]
        if differences:
            raise UserError(f"worker {name} has other versions: {listed(differences)}; install the same on both")


def resources_here() -> dict[str, float]:
    """Return the resources of this machine: a slot for a build, PyTorch, the GPU with TensorRT and with PyTorch."""
    from build_tasks.runtime import hardware

    resources: dict[str, float] = {SLOT: 1}
    if installed_version("torch"):
        resources[PYTORCH] = 1
    device = hardware.gpu()
    if isinstance(device, hardware.Gpu):
        if hardware.missing_requirements() is None:
            resources[gpu_resource(TENSORRT, device.compute_capability)] = 1
        if hardware.missing_for_package("gpu") is None and hardware.compiler():  # AOTInductor needs both
            resources[gpu_resource(PYTORCH, device.compute_capability)] = 1
    return resources


def worker_name() -> str:
    """Return a readable name for a worker of this machine."""
    return re.sub(r"[^\w.-]+", "-", f"{os.uname().nodename}-{os.getpid()}")


def worker_command(address: str, name: str, folder: str) -> list[str]:
    """Return the command that starts Dask's own worker, with what this machine has.

    Args:
        address: Of the scheduler.
        folder: For files of the worker.
    """
    declared = " ".join(f"{resource}={count:g}" for resource, count in resources_here().items())
    options = ["--resources", declared, "--nthreads", "1", "--nworkers", "1", "--memory-limit", "0", "--no-dashboard"]
    return [
        *(sys.executable, "-m", "distributed.cli.dask_worker", address, "--name", name, *options),
        *("--local-directory", f"{folder}/.dask", "--no-nanny", "--death-timeout", "60"),
    ]


@contextlib.contextmanager
def start_local(workers: int, folder: str) -> Iterator[str]:
    """Context manager for a scheduler and workers on this machine; its value is the address.

    Args:
        folder: For the checkouts and logs of the workers.
    """
    try:
        from distributed import LocalCluster
    except ImportError as error:
        raise UserError(f"a farm needs Dask distributed ({INSTALL}): {first_lines(error)}") from error
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(
            LocalCluster(
                n_workers=0, processes=False, protocol="tcp://", host="127.0.0.1", dashboard_address="127.0.0.1:0",
                silence_logs="error",
            )
        )  # fmt: skip
        for number in range(workers):
            name = f"worker-{number}"
            log = stack.enter_context(open(f"{folder}/{name}.log", "w", encoding="utf-8"))
            command = [*worker_command(scheduler.scheduler_address, name, folder), "--host", "127.0.0.1"]
            environment = {**os.environ, remote.FOLDER: f"{folder}/{name}"}
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        yield scheduler.scheduler_address
