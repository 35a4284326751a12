"""Imported by the fork server of tests: what stages import, as preload.py and server.py of build_tasks do it."""

import atexit
import contextlib
import gc
import importlib
import os

gc.disable()
for module in os.environ.get("IMPORTED", "").split():
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
gc.freeze()
gc.enable()
atexit.register(os._exit, 0)
