"""Exchanges two files or folders in one step, where the system can do that."""

import errno
import os


def exchange(source: str, target: str) -> bool:
    """Exchange the files or folders at two paths in one step; returns False if the system cannot do that.

    Linux can, with renameat2.

    Source: man 2 renameat2, RENAME_EXCHANGE.
    """
    import ctypes

    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(at_fdcwd, os.fsencode(source), at_fdcwd, os.fsencode(target), rename_exchange) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)
