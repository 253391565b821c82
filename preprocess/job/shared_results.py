"""Results that machines share: how downloads ended, beside the images in an object store.

    <CACHE>/results/<dataset>[.<part>].<unix_s>.<sha256>.jsonl.gz   results of one run of FETCH
    <local>/results/<the same name>.jsonl                           a copy, unpacked
    <local>/results/<ledger>.shared                                 length of what others can see

A ledger is on the disk of the machine that writes it, since a store cannot append. What a run has
added to it is published at its end, as one object that never changes; a run that was killed leaves
its share to the next one with the same ledger. Another machine copies each object once, before it
requests URLs that it knows nothing about. An object that is damaged or gone costs requests only.

Where the cache is a folder, its ledgers are there, and nothing is done here.
"""

from __future__ import annotations

import gzip
import logging
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from preprocess.fetch import FetchResult, Ledger, encode_result, read_ledger
from preprocess.job.build import scratch_folder
from preprocess.job.job import Job
from preprocess.recipe import file_sha256
from shardspec import storage
from shardspec.errors import StorageError

logger = logging.getLogger(__name__)

_NAME = re.compile(
    r"(?P<dataset>[^./]+)(?:\.\d{5,}-of-\d{5,})?\.(?P<unix_s>\d+)\.(?P<digest>[0-9a-f]{16})\.jsonl\.gz"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """An object with results."""

    name: str
    dataset: str
    unix_s: int
    """When the last of them came, by the clock of the machine that requested it."""
    digest: str
    """Begin of the sha256 of the object."""
    num_bytes: int


class SharedResults:
    """What other machines know, and what they are told of the ledger of one job."""

    def __init__(self, job: Job, ledger: Ledger) -> None:
        """Reads nothing of the store yet.

        Args:
          job: The job.
          ledger: Its ledger, before anything is copied into it.
        """
        self._job, self._ledger = job, ledger
        self._is_local = storage.is_local(job.blobs.url)
        self._url = storage.join(job.blobs.url, "results")
        self._folder = job.blobs.local / "results"
        self._mark = self._folder / f"{ledger.path.stem}.shared"
        self._shared_bytes = 0
        """Length of the ledger's begin that other machines know."""
        if not self._is_local:
            with suppress(FileNotFoundError, ValueError):
                known_bytes = int(self._mark.read_bytes())
                # The ledger may have been removed, and another one begun.
                self._shared_bytes = known_bytes if ledger.is_border(known_bytes) else 0
        self._had_bytes = ledger.num_bytes

    def of_dataset(self) -> list[Shared]:
        """Lists the results of the same dataset, the latest first."""
        return [each for each in self._listed if each.dataset == self._job.name]

    def of_others(self) -> list[Shared]:
        """Lists the results of other datasets, the latest first."""
        return [each for each in self._listed if each.dataset != self._job.name]

    def read(self, shared: Shared) -> Mapping[str, FetchResult]:
        """Reads an object, from this machine's copy if it has one; {} where it is damaged."""
        path = self._folder / shared.name.removesuffix(".gz")
        url = storage.join(self._url, shared.name)
        with suppress(FileNotFoundError):  # removed since it was listed
            if path.exists() or self._copy(shared, path):
                try:
                    return read_ledger(path)
                except StorageError:
                    path.unlink()
            logger.warning("passed over damaged results, whose URLs are requested: %s", url)
        return {}

    def note_copied(self) -> None:
        """Says that what was just added to the ledger is known to others."""
        if self._shared_bytes >= self._had_bytes:
            self._share_until(self._ledger.num_bytes)

    def publish(self) -> None:
        """Lets other machines see what was added to the ledger.

        Raises:
          StorageError: The store refused.
        """
        stop = self._ledger.num_bytes
        if self._is_local or stop <= self._shared_bytes:
            return
        unix_s = 0

        def lines() -> Iterator[bytes]:
            nonlocal unix_s
            for result in self._ledger.read(self._shared_bytes):
                unix_s = max(unix_s, result.finished_unix_s)
                yield encode_result(result)

        publish_lines(
            self._url,
            lines(),
            name=lambda digest: f"{self._ledger.path.stem}.{unix_s}.{digest}.jsonl.gz",
            scratch=self._job.scratch,
        )
        self._share_until(stop)

    @cached_property
    def _listed(self) -> list[Shared]:
        if self._is_local:
            return []
        objects = storage.list_objects(self._url)
        found = [(_NAME.fullmatch(each.name), each.num_bytes) for each in objects]
        shared = [
            Shared(
                name=match[0],
                dataset=match["dataset"],
                unix_s=int(match["unix_s"]),
                digest=match["digest"],
                num_bytes=num_bytes,
            )
            for match, num_bytes in found
            if match
        ]
        return sorted(shared, key=lambda each: each.unix_s, reverse=True)

    def _copy(self, shared: Shared, path: Path) -> bool:
        """Unpacks an object to a file; False where it is damaged."""
        with scratch_folder(self._job.scratch) as folder:
            packed, lines = folder / "packed", folder / "lines"
            storage.fetch_file(storage.join(self._url, shared.name), packed)
            if not file_sha256(packed).startswith(shared.digest):
                return False
            try:
                with gzip.open(packed) as source, lines.open("wb") as target:
                    shutil.copyfileobj(source, target)
            except (gzip.BadGzipFile, EOFError, zlib.error):
                return False
            storage.publish_file(str(path), lines)
            return True

    def _share_until(self, num_bytes: int) -> None:
        if not self._is_local and num_bytes != self._shared_bytes:
            storage.publish_bytes(str(self._mark), str(num_bytes).encode())
            self._shared_bytes = num_bytes


def publish_lines(
    url: str, lines: Iterable[bytes], *, name: Callable[[str], str], scratch: str
) -> str:
    """Publishes lines as one packed object; memory holds a few of them.

    Args:
      url: The folder.
      lines: The lines, with their ends.
      name: Gives the name, from the begin of the object's sha256, when all lines have been read.
      scratch: Local folder for unfinished files.

    Returns:
      The name.
    """
    with scratch_folder(scratch) as folder:
        path = folder / "packed"
        with (
            storage.translate_errors(str(path)),
            path.open("wb") as raw,
            gzip.GzipFile("", "wb", 3, raw, mtime=0) as stream,
        ):
            stream.writelines(lines)
        named = name(file_sha256(path)[:16])
        storage.publish_file(storage.join(url, named), path)
    return named
