"""Reading TOML on every supported Python (the standard library has it from 3.11 on)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file into plain Python values.

    Raises:
      OSError: It cannot be read.
      ValueError: It is not TOML.
    """
    return parse_toml(path.read_bytes())


def parse_toml(payload: bytes) -> dict[str, Any]:
    """Reads a TOML document; errors as `load_toml`."""
    try:
        return dict(tomllib.loads(payload.decode("utf-8")))
    except RecursionError:
        raise ValueError("nested too deeply") from None
