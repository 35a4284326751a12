"""`doit` whose stages' processes come from a fork server that runs already.

    python warm.py ADDRESS /path/of/doit [argument ...]

To start a fork server takes six seconds of importing torch and timm, more than the rest of most tests; those that are
not about it share one, see `Project.start`. What differs from a fork server of doit's own: a stage's process imports
build_tasks itself, from the project that is tested; environment and session are pytest's.
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
    server._forkserver_alive_fd = os.pipe()[1]  # a server of one's own would live as long as this is held
    server.ensure_running = resource_tracker.ensure_running
    runpy.run_path(doit, run_name="__main__")
