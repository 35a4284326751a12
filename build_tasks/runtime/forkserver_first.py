"""The first module that the fork server imports; nothing else imports it.

It switches the garbage collector off. The imports that follow leave no garbage. Looking for it among ever more modules
would take a fifth of their time.

It hides cupy. modelopt imports cupy where it is installed, and asks it for a GPU, which starts CUDA. CUDA works in no
child of a process that has done so: the child finds no GPU, or ends with SIGSEGV. modelopt uses cupy for int4 alone,
which no stage makes.

forkserver_last ends both.
"""

import gc
import sys

gc.disable()
sys.modules["cupy"] = None  # type: ignore[assignment]  # Python's way to say that it cannot be imported
