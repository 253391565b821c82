"""The process that decodes videos: what `shardspec.child` runs for decoders of both halves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardspec.child import Part, run_child
from shardspec.video.clip import read_clip, store_clip
from shardspec.video.extract import Request, extract
from shardspec.video.reader import import_av


def answer(request: dict[str, Any], source: Path | bytes, where: str) -> Iterator[Part]:
    """Does the `work` of a request: "extract", "store" or "read"."""
    work = request.pop("work")
    if work == "extract":
        return extract(source, Request(**request), where=where)
    if work == "store":
        return store_clip(source, Request(**request), where=where)
    assert isinstance(source, bytes)
    return read_clip(source, **request, where=where)


def main() -> None:
    """Runs the process."""
    run_child(answer, load=import_av)


if __name__ == "__main__":
    main()
