"""Sizes in bytes and ages as people write and read them."""

from __future__ import annotations

import re

from shardspec.errors import ConfigError


def parse_bytes(text: str) -> int:
    """Reads a size such as 256MiB, 1GiB, 512MB or a plain number of bytes.

    >>> parse_bytes("256MiB") == 256 * 2**20
    True

    Raises:
      ConfigError: `size_text`.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in units:
        raise ConfigError("size_text.text", got=text)
    count = float(match[1]) * units[match[2].upper()]
    if count >= 2**63:
        raise ConfigError("size_text.large", got=text[:80])
    return int(count)


def parse_age_s(text: str) -> float:
    """Reads an age such as 90s, 30m, 24h or 7d, in seconds.

    >>> parse_age_s("24h")
    86400.0

    Raises:
      ConfigError: `age_text`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise ConfigError("age_text", got=text)
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def size_text(count: float) -> str:
    """Writes a size in the unit that suits it.

    >>> size_text(512), size_text(256 * 2**20)
    ('512 B', '256.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def age_text(seconds: float) -> str:
    """Writes a duration in the unit that suits it.

    >>> age_text(12.34), age_text(600), age_text(90_000)
    ('12.3 s', '10.0 min', '25.0 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
