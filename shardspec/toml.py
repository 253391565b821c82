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
    """Reads a TOML file into plain Python values."""
    with path.open("rb") as stream:
        return dict(tomllib.load(stream))
