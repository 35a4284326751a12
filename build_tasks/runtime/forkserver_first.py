"""The first import of the fork server, and imported by nothing else: switches the garbage collector off.

The imports that follow leave no garbage. Looking for it among ever more modules would take a fifth of their time.
forkserver_last switches the collector on again.
"""

import gc

gc.disable()
