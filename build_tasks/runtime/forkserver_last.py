"""The last module that the fork server imports; nothing else imports it. The process that imports it exits with 0.

The server then ends at once, and does not take a second to dismantle torch. The exit code 0 hides no error: the
server has no result, and its children exit in other ways. The imported modules are never garbage, and a collection in
a child would copy their memory.

The server ends after doit, also if doit was killed, and removes doit's temporary folder.
"""

import atexit
import gc
import os
import sys

from build_tasks.runtime import temporary_folder

gc.freeze()
gc.enable()  # forkserver_first had disabled it
sys.modules.pop("cupy")  # and hidden this one
atexit.register(os._exit, 0)
atexit.register(temporary_folder.remove, os.environ.get("TMPDIR", ""))
