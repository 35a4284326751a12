"""Run `doit` so that the processes of its stages come from a fork server that is already running.

    python shared_forkserver.py ADDRESS /path/of/doit [argument ...]

A fork server takes six seconds to import torch and timm, longer than the rest of most tests. Tests that are not about
the fork server share one, see `Project.start`. It differs from doit's own in two ways: the process of a stage imports
build_tasks itself, from the project under test, and has the environment and the session of pytest.
"""

import os
import runpy
import sys
from multiprocessing import forkserver, resource_tracker
from typing import Any

if __name__ == "__main__":
    address, doit = sys.argv[1:3]
    sys.argv[:] = sys.argv[2:]
    sys.path[0] = os.path.dirname(doit)
    server: Any = forkserver._forkserver
    server._forkserver_address = address
    server._forkserver_alive_fd = os.pipe()[1]  # a server of its own would live as long as this is open
    server.ensure_running = forkserver.ensure_running = resource_tracker.ensure_running
    runpy.run_path(doit, run_name="__main__")
