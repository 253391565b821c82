"""What FETCH stores for PLAN and BUILD: image files by content.

<root>/packs, damaged         contents by their sha256 (`preprocess.fetch.packs`)
<root>/blobs/ab/abcdef...     one file per content, of older releases; only read
<root>/results                how downloads ended, of a store (`preprocess.job.shared_results`)
<root>/tokens                 marks, by which machines tell that they see the same root
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from preprocess.fetch.packs import PACK_BYTES, PackStore, Place
from shardspec import storage
from shardspec.errors import ConfigError, StorageError

_SHA256 = re.compile(r"[0-9a-f]{64}")

LOCAL_CACHE = "~/.cache/vlm-shards"
"""Where images are kept by default; and what has to be on a disk, where they are in a store."""


class BlobCache:
    """Contents by their sha256, in a folder or a store that any number of processes share."""

    def __init__(self, root: str | Path, *, pack_bytes: int = PACK_BYTES) -> None:
        """Names the folder or URL; a folder is created by the first `put`.

        Args:
          root: The folder or URL.
          pack_bytes: Length from which the file is full that contents are appended to.
        """
        self.url, self._pack_bytes = str(root), pack_bytes
        local = storage.local_path(self.url if storage.is_local(self.url) else LOCAL_CACHE)
        if not storage.is_local(self.url):
            key = hashlib.sha256(storage.absolute_url(self.url).encode()).hexdigest()[:16]
            local = local / "stores" / key
        self.local = local
        """Folder on this machine's disk, of this root alone."""
        self._packs = PackStore(self.url, local=local, pack_bytes=pack_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        # In another process, only what is published is there.
        return partial(BlobCache, pack_bytes=self._pack_bytes), (self.url,)

    @property
    def root(self) -> Path:
        """The folder, where it is a local one."""
        return storage.local_path(self.url)

    def _file_url(self, sha256: str) -> str:
        """Names the file that older releases had for a content."""
        return storage.join(self.url, "blobs", sha256[:2], sha256)

    @cached_property
    def _has_files(self) -> bool:
        return storage.exists(storage.join(self.url, "blobs"))

    def has(self, sha256: str, *, num_bytes: int | None = None) -> bool:
        """Returns True if a blob exists (with that length); its content is not read.

        Raises:
          ConfigError: `bad_sha256`: not 64 lower-case hexadecimal digits.
        """
        if any(num_bytes in (None, place.num_bytes) for place in self._find(sha256)):
            return True
        got = storage.size(self._file_url(sha256)) if self._has_files else None
        return got is not None and num_bytes in (None, got)

    def put(self, payload: bytes) -> str:
        """Stores a content and returns its sha256; a damaged copy of it is replaced.

        Raises:
          StorageError: The disk refused; nothing appeared.
        """
        sha256 = hashlib.sha256(payload).hexdigest()
        if self._read_packed(sha256, damaged=[]) is None:
            self._packs.append(sha256, payload)
        return sha256

    def get(self, sha256: str) -> bytes:
        """Reads a content and checks it.

        A damaged blob is removed, so that the next FETCH downloads it again.

        Raises:
          StorageError: `blob_missing` or `blob_corrupt`.
        """
        damaged: list[StorageError] = []
        payload = self._read_packed(sha256, damaged=damaged)
        if payload is None:
            payload = self._read_file(sha256)
        if payload is None:
            self._packs.refresh()
            payload = self._read_packed(sha256, damaged=damaged)
        if payload is not None:
            return payload
        where = f"{self.url} (sha256 {sha256})"
        raise damaged[0] if damaged else StorageError("blob_missing", where=where)

    def refresh(self) -> None:
        """Looks for what other processes have put, and what dead ones have left.

        Raises:
          StorageError: The disk or store refused.
        """
        self._packs.refresh()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Shows other processes at the end what was put in the block.

        After an exception, whoever looks for blobs next finds what was put: to publish it could
        take long, or fail for the same reason.

        Raises:
          StorageError: The disk or store refused.
        """
        try:
            yield
        except BaseException:
            self._packs.release()
            raise
        self._packs.flush()

    def _find(self, sha256: str) -> list[Place]:
        if not _SHA256.fullmatch(sha256):
            raise ConfigError("bad_sha256", got=repr(sha256))
        return self._packs.find(sha256)

    def _read_packed(self, sha256: str, *, damaged: list[StorageError]) -> bytes | None:
        """Reads the first copy that is right; the others that it met are marked, and listed."""
        for place in self._find(sha256):
            payload = self._packs.read(place)
            if payload is None:
                continue
            got = hashlib.sha256(payload).hexdigest()
            if got == sha256:
                return payload
            self._packs.mark_damaged(place)
            damaged.append(_corrupt(f"{self._packs.pack_url(place.pack)}:{place.start}", payload))
        return None

    def _read_file(self, sha256: str) -> bytes | None:
        if not self._has_files:
            return None
        url = self._file_url(sha256)
        try:
            payload = storage.read_bytes(url)
        except FileNotFoundError:
            return None
        if hashlib.sha256(payload).hexdigest() != sha256:
            storage.delete(url)
            raise _corrupt(url, payload)
        return payload

    def leave_token(self, name: str) -> None:
        """Leaves a mark by which another machine can tell that it sees the same cache."""
        storage.publish_bytes(storage.join(self.url, "tokens", name), b"")

    def has_token(self, name: str) -> bool:
        """Returns True if somebody has left this mark here."""
        return storage.exists(storage.join(self.url, "tokens", name), fresh=True)

    def remove_tokens(self, prefix: str) -> None:
        """Removes the marks whose names begin like this."""
        folder = storage.join(self.url, "tokens")
        names = [name for name in storage.list_names(folder) if name.startswith(prefix)]
        storage.delete_objects(folder, names)


def _corrupt(where: str, payload: bytes) -> StorageError:
    got = hashlib.sha256(payload).hexdigest()
    return StorageError("blob_corrupt", where=where, got_sha256=got, num_bytes=len(payload))
