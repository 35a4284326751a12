"""The first module that the fork server imports; nothing else imports it. It switches the garbage collector off.

The imports that follow leave no garbage. Looking for it among ever more modules would take a fifth of their time.
forkserver_last switches the collector on again.
"""

import gc

gc.disable()
