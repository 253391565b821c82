"""States of loaders in the files that checkpoints are made of: JSON, or what torch.save wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from shardspec.errors import StateError

_FIELDS = {"version", "step", "seed", "data", "order"}
"""What tells the state of a loader from other dictionaries of a checkpoint."""


def find_state(path: str) -> Mapping[str, Any]:
    """Reads a file and finds the state of a loader in it, however deep in the checkpoint it is.

    Raises:
      StateError: `state_file`, it cannot be read, or holds none or several that differ.
    """
    payload = _load(Path(path))
    found: list[Mapping[str, Any]] = []
    for state in _states(payload):
        if state not in found:
            found.append(state)
    if len(found) != 1:
        raise StateError("state_file.states", where=path, number=len(found))
    return found[0]


def _load(path: Path) -> object:
    try:
        content = path.read_bytes()
        if content.lstrip()[:1] in (b"{", b"["):
            return json.loads(content)
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever torch makes of other bytes
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StateError("state_file.unreadable", where=str(path), error=text[:300]) from error


def _states(value: object) -> Iterator[Mapping[str, Any]]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            if set(value) >= _FIELDS:
                yield value
            else:
                waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
