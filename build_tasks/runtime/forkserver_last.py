"""The last import of the fork server, and imported by nothing else: a process that imports it always exits with 0.

The server then ends at once, and does not take a second to dismantle torch. It has no result of its own, and its
children end in other ways. What was imported so far is no garbage: a collection in a child would copy all of it.
"""

import atexit
import gc
import os

gc.freeze()
gc.enable()  # forkserver_first had disabled it
atexit.register(os._exit, 0)
