"""Local files with the bytes of a user's own ones: fetched, unpacked, in UTF-8 or as a table.

They are in a temporary folder of the process, and made once per version of the original: a job
opens its source several times.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardspec import storage
from shardspec.errors import SourceError

COPY_BYTES = 4 * 2**20
"""Copied at once."""

PACKED = (".gz", ".zst")
"""Suffixes of files that are unpacked."""

_COPIES: dict[tuple[str, str, str | None], Path] = {}
"""The copy of each version of a file."""
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""The folder of this process for copies; removed when it ends."""


def local_copy(url: str, packed: str = "") -> Path:
    """Gives a local file with the bytes of a URL, unpacked."""
    remote = "://" in url and not url.startswith("file://")
    path = Path(url.removeprefix("file://"))
    if remote:
        path = made_of(url, "copy", lambda target: storage.fetch_file(url, target))
    else:
        path.stat()
    if not packed:
        return path

    def unpack(target: Path) -> None:
        with path.open("rb") as stream, target.open("wb") as out:
            shutil.copyfileobj(_unpacked(stream, packed), out, COPY_BYTES)

    return made_of(str(path), "unpacked", unpack)


def utf8_copy(path: Path, name: str, encoding: str = "") -> Path:
    """Gives a file of the same text in UTF-8; the file itself where it is that already.

    Args:
      path: The file.
      name: What people call it.
      encoding: Its encoding; "" where it is UTF-8, or a UTF-16 or UTF-32 that its first bytes tell.

    Raises:
      SourceError: `source_encoding`.
    """
    if not encoding:
        with path.open("rb") as stream:
            encoding = json.detect_encoding(stream.read(4))
    if codecs.lookup(encoding).name.startswith("utf-8"):
        return path

    def rewrite(target: Path) -> None:
        try:
            with path.open("r", encoding=encoding, newline="") as source, target.open("wb") as out:
                while text := source.read(COPY_BYTES):
                    out.write(text.encode(errors="surrogatepass"))
        except UnicodeError:
            require_encoding(path, name, encoding)
            raise

    return made_of(str(path), encoding, rewrite)


def require_encoding(path: Path, name: str, encoding: str = "utf-8") -> None:
    """Refuses a file with bytes that its encoding does not have.

    Args:
      path: The file.
      name: What people call it.
      encoding: Its encoding.

    Raises:
      SourceError: `source_encoding`.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    start, lines = 0, 0
    with path.open("rb") as stream:
        while True:
            chunk = stream.read(COPY_BYTES)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                before, at = error.object[: error.start], start - held + error.start
                line = lines + before.count(b"\n") + 1
                wrong = f"0x{error.object[error.start]:02x}"
                raise SourceError(
                    "source_encoding", where=name, encoding=encoding, byte=wrong, at=at, line=line
                ) from error
            if not chunk:
                return
            start, lines = start + len(chunk), lines + chunk.count(b"\n")


def made_of(url: str, how: str, make: Callable[[Path], None]) -> Path:
    """Gives what `make` writes from a file, from an earlier call where the file is the same."""
    key = (url, how, storage.version(url))
    if key not in _COPIES:
        target = new_file()
        make(target)
        _COPIES[key] = target
    return _COPIES[key]


def new_file() -> Path:
    """Makes an empty file in the temporary folder."""
    if not _FOLDERS:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="vlm-shards-rows-"))
    descriptor, name = tempfile.mkstemp(dir=_FOLDERS[0].name)
    os.close(descriptor)
    return Path(name)


def _unpacked(stream: Any, packed: str) -> Any:
    if packed == ".gz":
        return gzip.GzipFile(fileobj=stream)
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd")
