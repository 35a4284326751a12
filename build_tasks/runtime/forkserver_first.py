"""Imported by the fork server, as its first, and by nothing else: what follows are imports, and they leave no garbage.

To look for it among ever more modules would take a fifth of their time. `server`, the last, ends this.
"""

import gc

gc.disable()
