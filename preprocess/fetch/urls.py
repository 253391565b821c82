"""URLs of a job, on the disk: 20 million of them are 1.5 GB of text, and 3 GB as Python's strings.

They are lines of an unnamed temporary file, each URL once, in the order in which rows name them.
Whoever needs them reads them again from the first to the last.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

from yarl import URL

from preprocess.hash_table import TextSet
from shardspec import storage
from shardspec.errors import redacted_url

_USERINFO = re.compile(r"^(\s*(?:[a-zA-Z][a-zA-Z0-9+.-]*:)?[/\\]*)[^/?#\\]*@")
"""What the library that requests a URL takes for the user, whatever characters it has."""

_SENT_AS_IT_IS = re.compile(
    r"https?://(?!.*xn--)[a-z0-9.-]+(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+(?:\?[A-Za-z0-9._~=&-]+)?"
)
"""Most URLs: to see that the client changes nothing of them takes a tenth of the time."""

_HELD_BYTES = 2**20
"""Lines held in memory before they are written: a short list has no file at all."""

_READ_BYTES = 2**20


def redact(url: str) -> str:
    """Replaces the credentials in a URL; a URL without any comes back as it is.

    Signatures and tokens become hashes, so that two URLs that differ in them stay two.

    >>> redact("https://me:secret@example.com/a.jpg?size=@2x")
    'https://***@example.com/a.jpg?size=@2x'
    """
    if "@" not in url and "=" not in url and url.isascii():  # most URLs
        return url
    text = redacted_url(_USERINFO.sub(r"\1***@", url))
    # Of half a character, no line of a ledger could be read again.
    return text.encode(errors="backslashreplace").decode()


def request_of(url: str) -> str:
    """Writes the request that the client makes of a URL: what spellings of one request share.

    No fragment is sent; the case of the host, the port that is usual, dots in the path, and how a
    byte is written change nothing. Credentials are masked as by `redact`.

    >>> request_of("HTTP://Example.com:80/a/../%7eb.jpg#top")
    'http://example.com/~b.jpg'
    """
    text = redact(url)
    # Of half a character, the client sends nothing; what it makes of a backslash is its own.
    if _SENT_AS_IT_IS.fullmatch(text) or "\\" in text:
        return text
    try:
        parsed = URL(text.strip())
        port = parsed.port
    except ValueError:
        return text
    if parsed.scheme not in ("http", "https") or not parsed.raw_host:
        return text
    user = f"{parsed.raw_user}@" if parsed.raw_user else ""
    host = f"[{parsed.raw_host}]" if ":" in parsed.raw_host else parsed.raw_host
    usual = port == {"http": 80, "https": 443}[parsed.scheme]
    return f"{parsed.scheme}://{user}{host}{'' if usual else f':{port}'}{parsed.raw_path_qs}"


class UrlSpool:
    """A list of URLs that is read from its begin, or at a place that `add` has given."""

    def __init__(self, folder: str | None = None) -> None:
        """Makes an empty list.

        Args:
          folder: Local folder for the file; None for that of temporary files.
        """
        self.folder = folder
        self._fd = -1
        self._waiting = bytearray()
        """Lines that are not in the file yet."""
        self._written_bytes = 0
        self._num_urls = 0

    def __len__(self) -> int:
        return self._num_urls

    def __iter__(self) -> Iterator[str]:
        self._flush()
        held = bytes(self._waiting).splitlines(keepends=True)
        return map(_read, held if self._fd < 0 else read_lines(self._fd))

    def add(self, url: str) -> int:
        """Appends a URL; returns the place of its line.

        Raises:
          StorageError: The disk refused.
        """
        place = self._written_bytes + len(self._waiting)
        self._waiting += json.dumps(url).encode() + b"\n"
        self._num_urls += 1
        if len(self._waiting) >= _HELD_BYTES:
            if self._fd < 0:
                self._open()
            self._flush()
        return place

    def at(self, place: int) -> str:
        """Reads the URL of a place."""
        self._flush()
        if self._fd < 0:
            stop = self._waiting.index(b"\n", place) + 1
            return _read(bytes(self._waiting[place:stop]))
        return _read(read_line(self._fd, place))

    def _open(self) -> None:
        folder = self.folder or tempfile.gettempdir()
        with storage.translate_errors(folder):
            storage.make_folder(Path(folder))
            self._fd, name = tempfile.mkstemp(dir=folder)
            weakref.finalize(self, os.close, self._fd)
            os.unlink(name)

    def _flush(self) -> None:
        if self._fd < 0 or not self._waiting:
            return
        with storage.translate_errors(self.folder or tempfile.gettempdir()):
            write_all(self._fd, self._waiting)
        self._written_bytes += len(self._waiting)
        self._waiting.clear()


def unique_urls(urls: Iterable[str], folder: str | None = None) -> UrlSpool:
    """Lists URLs, the first of those that are one request; credentials make no other one.

    Args:
      urls: Any, in any number.
      folder: Local folder for a long list.

    >>> list(unique_urls(["http://h/b", "http://h/a", "http://h/b#1"]))
    ['http://h/b', 'http://h/a']
    """
    spool, known = UrlSpool(folder), TextSet()
    for url in urls:
        if known.add(request_of(url)):
            spool.add(url)
    return spool


def _read(line: bytes) -> str:
    # JSON in ASCII: a text without escapes is itself.
    return str(json.loads(line)) if b"\\" in line else line[1:-2].decode("ascii")


def write_all(descriptor: int, payload: bytes | bytearray) -> None:
    """Writes bytes at the end of a file, all of them."""
    left = memoryview(bytes(payload))
    while left:
        left = left[os.write(descriptor, left) :]


def read_lines(descriptor: int, place: int = 0) -> Iterator[bytes]:
    """Reads the lines of an open file, with their ends; moves nobody's place in it."""
    rest = b""
    while block := os.pread(descriptor, _READ_BYTES, place):
        place += len(block)
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def read_line(descriptor: int, place: int) -> bytes:
    """Reads the line that begins at a place of an open file."""
    size = 640  # a line of a ledger: mostly one read
    while True:
        block = os.pread(descriptor, size, place)
        stop = block.find(b"\n") + 1
        if stop or len(block) < size:
            return block[: stop or len(block)]
        size *= 4
