"""EVENTS: what a job does, one JSON object a line, appended to a file on this machine.

    {"time_unix_s": 1764489600.1, "event": "shard", "shard": 17, "seconds": 41.2}

Events: `start`, `stage` (one begins), `failures` (of the stage that ends, by class), `shard` (one
is built), `retry` (a worker died, its shard is built again), `stall` (nothing happens any more),
`commit`, `end`. They are for people and their tools; no job reads them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from shardspec import storage


class EventLog:
    """Appends events to a file; without one, to nothing. Threads may share it."""

    def __init__(self, path: str | None) -> None:
        """Names the file; its folder is created."""
        self._path = None if path is None else Path(path)
        if self._path is not None:
            with storage.translate_errors(str(self._path)):
                storage.make_folder(self._path.parent)

    def write(self, event: str, **facts: Any) -> None:
        """Appends an event, at once and as a whole."""
        if self._path is None:
            return
        line = json.dumps({"time_unix_s": round(time.time(), 3), "event": event, **facts})
        with storage.translate_errors(str(self._path)), self._path.open("a") as stream:
            stream.write(line + "\n")
