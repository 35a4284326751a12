"""Imported by the tests' fork server: imports what stages need, as forkserver_first and forkserver_last do."""

import atexit
import contextlib
import gc
import importlib
import os
import sys

gc.disable()
sys.modules["cupy"] = None  # type: ignore[assignment]
for module in os.environ.get("PRELOADED_MODULES", "").split():
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
gc.freeze()
gc.enable()
sys.modules.pop("cupy")
atexit.register(os._exit, 0)
