"""The process that decodes videos: what `preprocess.media.child` runs for `VideoDecoder`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preprocess.media.child import Part, run_child
from preprocess.media.video.extract import Request, extract
from preprocess.media.video.reader import import_av


def decode(request: dict[str, Any], payload: bytes | None, where: str) -> Iterator[Part]:
    """Decodes the frames that a request chooses, as `extract` gives them."""
    source = Path(request.pop("path")) if payload is None else payload
    return extract(source, Request(**request), where=where)


def main() -> None:
    """Runs the process."""
    run_child(decode, load=import_av)
