"""A job that makes shards out of shards: by one process, or in parts on many machines.

Nothing but the shards is planned, and every process plans alike. So what is done follows from the
receipts, and the process that finds none missing completes the dataset. A note in the output
(`plan/SPLIT/plan.json`) says what is under way, for `status`, `gc` and other jobs.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from preprocess.job.board import Board
from preprocess.job.build import valid_receipts
from preprocess.job.engines.engine import node_libraries
from preprocess.job.job import Reporter
from preprocess.job.lease import output_lock, tidy_up
from preprocess.job.parts import PartOfJob, forget_parts, join_job, require_shared
from preprocess.job.plan import OwnDisk, Part, shard_name
from preprocess.job.planner import read_json
from shardspec import storage
from shardspec.errors import ConflictError, StorageError
from shardspec.manifest import MANIFEST_NAME, Manifest, Receipt, canonical_json, fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class OthersMissing:
    """How a part ended whose own shards are done, while others are not."""

    part: Part
    num_shards: int
    """Shards of this part."""
    missing_shards: int
    """Shards of other parts."""


@dataclass(frozen=True, kw_only=True)
class DividedJob:
    """What is made, and by which part."""

    out: str
    kind: str
    """For people."""
    dataset: str
    names: Mapping[str, Sequence[str]]
    """Of the shards of each split, in order."""
    build_keys: Mapping[str, str]
    sources: Mapping[str, Any]
    """By split, in plain JSON types: what differs between two jobs."""
    part: Part | None
    own_disk: OwnDisk = "refuse"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What all parts must agree on."""
        libraries = dict(node_libraries())
        return {
            "build_keys": dict(self.build_keys),
            "sources": dict(self.sources),
            "libraries": libraries,
        }

    @cached_property
    def key(self) -> str:
        """Hash of the identity."""
        return fingerprint(self.identity)

    @property
    def all_names(self) -> list[str]:
        """The shards of all splits, in order."""
        return [name for names in self.names.values() for name in names]

    @property
    def own_names(self) -> list[str]:
        """Those of this part, dealt split by split; all where there are no parts."""
        part = self.part or Part(index=0, count=1)
        return [name for names in self.names.values() for name in names[part.index :: part.count]]

    def receipts(self) -> dict[str, Receipt]:
        """Finds the receipts of finished shards, by name."""
        return valid_receipts(self.out, self.all_names, keys={*self.build_keys.values()})

    def others_missing(self, found: Mapping[str, Receipt]) -> OthersMissing | None:
        """Says what other parts have not done; None: nothing is missing."""
        missing = len(self.all_names) - len(found)
        if self.part is None or not missing:
            return None
        own = len(self.own_names)
        return OthersMissing(part=self.part, num_shards=own, missing_shards=missing)

    @contextmanager
    def held(self, report: Reporter) -> Iterator[tuple[Reporter, Callable[[], None]]]:
        """Holds the output, or the part.

        Args:
          report: Gets the progress.

        Yields:
          A reporter whose progress `status` sees, and a function that raises once another job may
          have the output.

        Raises:
          StorageError: `output_busy`, `part_busy`, `own_disk`.
          ConflictError: `job_conflict`: parts of another job are at work.
        """
        board = Board(report)
        if self.part is None:
            storage.prove_folder(self.out, machines=False)
            with output_lock(self.out, state=board.snapshot) as check:
                yield board, check
            return
        require_shared(self.out, self.part, self.own_disk)
        me = PartOfJob(
            part=self.part,
            job=self.key,
            title=f"{self.kind} {self.dataset}",
            identity=self.identity,
            dataset=self.dataset,
            split="",
        )
        with join_job(self.out, me, state=board.snapshot) as held:
            yield board, held.check

    def has_ended(self, error: StorageError) -> bool:
        """Whether a part was stopped because another may have completed the dataset meanwhile."""
        gone = ("lease_lost", "output_removed", "output_busy")
        return self.part is not None and error.reason in gone

    def note_url(self, split: str) -> str:
        """Where the output says what is under way."""
        return storage.join(self.out, "plan", split, "plan.json")

    def publish_notes(self) -> None:
        """Says in the output what is under way."""
        for split, names in self.names.items():
            usual = [
                shard_name(self.dataset, split, shard, num_shards=len(names))
                for shard in range(len(names))
            ]
            note = {
                "kind": "reshard",
                "build_key": self.build_keys[split],
                "dataset": self.dataset,
                "num_shards": len(names),
                **({} if usual == list(names) else {"names": list(names)}),
            }
            storage.publish_bytes(self.note_url(split), canonical_json(note, indent=1))

    def publish_manifest(self, manifest: Manifest) -> bool:
        """Completes the dataset.

        Returns:
          Whether this has; False: another part was first, with the same bytes.

        Raises:
          ConflictError: `manifest_conflict`: another job has.
        """
        url, payload = storage.join(self.out, MANIFEST_NAME), manifest.encode()
        fresh = not storage.exists(url)
        if not storage.compare_and_swap(url, payload, replacing=None):
            raise ConflictError("manifest_conflict.overtaken", where=self.out)
        return fresh

    def tidy(self, scratch: str) -> None:
        """Removes what only an unfinished job needs, this one or an abandoned one."""
        storage.delete(scratch)
        if storage.is_local(self.out):
            storage.delete_temporaries(self.out)
        self.forget_parts()
        # Last: while there is a note, the next run of the same command tidies up.
        for url, note in read_notes(self.out).items():
            if is_reshard(note):
                storage.delete(posixpath.dirname(url))

    def forget_parts(self) -> None:
        """Removes what the parts of this job have told each other."""
        forget_parts(self.out, self.key)

    def tidy_finished(self, scratch: str) -> None:
        """Removes what a run has left that ended between its commit and its end."""
        is_left = any(map(is_reshard, read_notes(self.out).values()))
        tidy_up(self.out, lambda: self.tidy(scratch), is_left=is_left)


def read_notes(out: str) -> dict[str, dict[str, Any]]:
    """Reads what the output's `plan` folder says of jobs under way: URL -> document.

    Of a `make shards` that is SPLIT.json, from its begin, and SPLIT/plan.json, when it has fetched;
    of a reshard only the latter. A broken one is {}: its owner is unknown.
    """
    folder = storage.join(out, "plan")
    names = [each.name for each in storage.list_objects(folder)]
    urls = [storage.join(folder, n) for n in names if re.fullmatch(r"[^/]+(/plan)?\.json", n)]
    return {url: read_json(url) or {} for url in urls}


def is_reshard(note: Mapping[str, Any]) -> bool:
    """Returns True if a note is of a job that makes shards out of shards."""
    return note.get("kind") == "reshard"


def check_unfinished(out: str) -> None:
    """Refuses an output with an unfinished `make shards`; an abandoned copy does not count.

    Raises:
      ConflictError: `job_conflict`.
    """
    for url, note in read_notes(out).items():
        if not is_reshard(note):
            raise ConflictError("job_conflict.unfinished", where=url)
