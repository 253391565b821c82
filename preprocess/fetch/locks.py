"""The kernel's locks of files: they end with their process, and with it alone."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from typing import Literal

Lock = Literal["held", "busy", "no_locks"]


def lock_file(descriptor: int, *, wait: bool = False) -> Lock:
    """Locks an open file for this process alone.

    Args:
      descriptor: The file; the lock ends when it is closed.
      wait: Whether to wait for another process that has the lock.

    Returns:
      "held"; "busy" where another has it; "no_locks" where the file system has none.

    Raises:
      OSError: The lock failed otherwise.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return "busy"
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return "no_locks"
    return "held"


def close_file(descriptor: int) -> None:
    """Closes a file; a full network disk refuses only now what was written to it.

    What that loses is noticed without it: files are flushed before they are published, and of
    others each content is compared with its sha256.
    """
    with suppress(OSError):
        os.close(descriptor)
