"""Imported by the fork server, and by nothing else: whoever imports this exits with 0, whatever happened.

The server thus ends at once, and not after a second of taking torch apart. It has no result of its own; its children
end by other ways.
"""

import atexit
import os

atexit.register(os._exit, 0)
