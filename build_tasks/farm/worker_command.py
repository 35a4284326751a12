"""worker: `doit worker tls://host:8786` offers this machine to a farm, until Ctrl-C

this machine ─► resources: a slot, PyTorch, its kind of GPU ─► Dask's own worker ─► units of `doit farm`
"""

import os
import sys
from typing import Any
from urllib.parse import urlsplit

from doit.cmd_base import Command
from doit.exceptions import InvalidCommand

from build_tasks.doit_plugin.command_line import OneLineMistakes
from build_tasks.errors import UserError
from build_tasks.farm import cluster, remote
from build_tasks.paths import BUILD
from build_tasks.runtime import resources


class Worker(OneLineMistakes, Command):  # type: ignore[misc]  # doit has no types
    """The command."""

    takes_names_first = True
    doc_purpose = "offer this machine to a farm, until Ctrl-C"
    doc_usage = "ADDRESS [--name NAME] [--host ADDRESS]"
    doc_description = (
        "ADDRESS is the one of the Dask scheduler, tls://host:8786. The worker builds one unit at a time, in a "
        "checkout of its own under build/.farm, with BUILD_MEMORY and the other variables of this machine. See "
        "docs/how-to/farm.md."
    )
    cmd_options = (
        {"name": "name", "long": "name", "type": str, "default": "", "help": "a name for messages"},
        {"name": "host", "long": "host", "type": str, "default": "", "help": "the address that it listens on"},
    )

    def execute(self, params: dict[str, Any], args: list[str]) -> int:
        if len(args) != 1:
            raise InvalidCommand("expected the address of a scheduler, tls://host:8786")
        try:
            address = cluster.check_address(args[0])
        except UserError as error:
            raise InvalidCommand(str(error)) from error
        name = params["name"] or cluster.worker_name()
        os.environ.setdefault(remote.FOLDER, os.path.abspath(f"{BUILD}/.farm/{name}"))
        command = cluster.worker_command(address, name, os.environ[remote.FOLDER])
        if host := params["host"] or (urlsplit(address).hostname if address.startswith("tcp://") else None):
            command += ["--host", host]  # a worker without TLS listens on the loopback address, too
        print(f"worker {name}: {', '.join(cluster.resources_here())}; {resources.cores():g} cores", flush=True)
        os.execv(sys.executable, command)
        return 0
