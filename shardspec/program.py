"""What a program does where nobody reads its output any more: it ends quietly, as `head -1` wants.

Any pipe that breaks raises BrokenPipeError, also that of a store or a child. Only those of standard
output and standard error are looked at here; the others are errors.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

READER_GONE = 141
"""Exit code of it, as shells have it (128 + SIGPIPE)."""

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it (128 + SIGINT)."""


def exit_code(run: Callable[[], int]) -> int:
    """Runs a program to its end, its output written, and returns its exit code.

    Args:
      run: Does what the command line says, and gives the exit code.
    """
    try:
        try:
            return run()
        finally:
            # At the interpreter's end it would be too late: a failure there is printed.
            for stream in _streams():
                stream.flush()
    except (BrokenPipeError, SystemExit) as ended:
        unread = [stream for stream in _streams() if _is_unread(stream)]
        # argparse exits with 0 where it could not write its help.
        if not unread or (isinstance(ended, SystemExit) and ended.code):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in unread:  # for what is left in their buffers
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return READER_GONE


def _streams() -> list[TextIO]:
    """Lists standard output and error; Python has None for one that the shell closed."""
    streams: list[TextIO | None] = [sys.stdout, sys.stderr]
    return [stream for stream in streams if stream is not None]


def _is_unread(stream: TextIO) -> bool:
    """Returns True if the reading end of a pipe is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # no file: a notebook's, a test's
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
