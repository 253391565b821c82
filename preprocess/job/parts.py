"""A job in parts: how processes on several machines join one job, and what they tell each other.

All of it is in the output, so the parts need nothing else in common (and the image cache, where the
samples need it). `.lease` names the job: its identity, and into how many parts it is divided.
`.parts/JOB` holds, for each part, a lease with what it is doing, and the results of its downloads.

1. A part takes its own lease: two processes with the same part are refused.
2. It enters itself into `.lease`: the job must be the same in every field of its identity, code and
   libraries included. Each entry is a new version of `.lease`, so that a job that has looked for
   living parts and found none does not take over an output that one has just joined.
3. One part at a time holds the claim to plan; the others wait for the plan.

A part that ends leaves its lease as a note. When the dataset is complete, all of it is removed.
Nothing of this is seen by readers or decides any byte.
"""

from __future__ import annotations

import gzip
import logging
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from preprocess.fetch import FetchResult, LedgerReader, encode_result, read_ledger
from preprocess.job.build import scratch_folder
from preprocess.job.conflicts import find_differences, table
from preprocess.job.lease import (
    LEASE_NAME,
    PARTS_FOLDER,
    Lease,
    Life,
    Watch,
    folder_check,
    naming_removal,
    part_name,
    parts_folder,
    read_lease,
    require_no_parts,
)
from preprocess.job.plan import OwnDisk, Part
from preprocess.job.shared_results import publish_lines
from shardspec import storage
from shardspec.documents import read_json
from shardspec.errors import ConflictError, ShardsError, StorageError
from shardspec.manifest import canonical_json

_FETCHED = re.compile(r"fetched-(\d{5})-of-(\d{5})-[0-9a-f]{16}\.jsonl\.gz")
_FROZEN = "fetched.json"
_CLAIM = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartOfJob:
    """Who joins which job."""

    part: Part
    job: str
    """Hash of the identity."""
    title: str
    """For people."""
    identity: Mapping[str, Any]
    """In plain JSON types."""
    dataset: str
    split: str


class HeldPart:
    """A part that this process holds."""

    def __init__(
        self, output: str, me: PartOfJob, *, state: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Names the part; touches nothing yet."""
        self.me = me
        self.output = output
        self.folder = storage.join(output, parts_folder(me.job))
        self._record_url = storage.join(output, LEASE_NAME)
        self._check_folder: Callable[[], None] = lambda: None
        self._watch = Watch()
        self._entered = False
        """Whether the output is this job's: before, the lease may be renewed while it waits."""
        part = me.part
        self._lease = Lease(
            output,
            f"{parts_folder(me.job)}/{part_name(part.index, part.count)}",
            busy="part_busy.part",
            facts={"part": str(part)},
            state=lambda: {"part": part.index, **state()},
            guard=self._still_joined,
        )

    def join(self) -> None:
        """Joins the job.

        Raises:
          StorageError: `part_busy`, `output_busy`.
          ConflictError: `job_conflict`: another job in parts is alive.
        """
        if storage.is_local(self.output):
            with storage.translate_errors(self.output):
                storage.make_folder(storage.local_path(self.output))
            self._check_folder = folder_check(self.output)
        self._lease.take()
        try:
            self._enter()
            self._entered = True
        except BaseException:
            self._lease.give_back()
            raise

    def check(self) -> None:
        """Makes sure that this process still holds the part.

        Raises:
          StorageError: `lease_lost`, `output_removed`.
        """
        self._check_folder()
        self._lease.check()

    def end(self, outcome: str) -> None:
        """Leaves a note of how the part has ended."""
        self._lease.end(outcome)

    @contextmanager
    def claim_plan(self) -> Iterator[Callable[[], None]]:
        """Holds the claim to plan.

        Yields:
          A function that raises StorageError `lease_lost` once another part may hold it.

        Raises:
          StorageError: `part_busy`: another part holds it.
        """
        lease = Lease(
            self.output,
            f"{parts_folder(self.me.job)}/{_CLAIM}",
            busy="part_busy.plan",
            waits=logging.DEBUG,  # it is looked at again and again
            guard=self._still_joined,
        )
        lease.take()
        try:
            yield lease.check
        finally:
            lease.give_back()

    def life(self, index: int) -> Life:
        """Says whether another part is alive; it takes several calls where that is unknown."""
        name = part_name(index, self.me.part.count)
        return self._watch.look(storage.join(self.folder, name))[0]

    def publish_fetched(self, results: Mapping[str, FetchResult], scratch: str) -> None:
        """Hands the results of this part's downloads to the part that plans.

        Args:
          results: The results.
          scratch: Local folder for unfinished files.
        """
        part = self.me.part
        name = publish_lines(
            self.folder,
            map(encode_result, results.values()),
            name=lambda digest: f"fetched-{part.index:05d}-of-{part.count:05d}-{digest}.jsonl.gz",
            scratch=scratch,
        )
        older = [n for n in self._fetched_names() if n[:22] == name[:22] and n != name]
        storage.delete_objects(self.folder, older)

    def not_fetched(self) -> list[int]:
        """Lists the parts whose downloads are not finished."""
        if storage.exists(storage.join(self.folder, _FROZEN), fresh=True):
            return []
        found = {int(name[8:13]) for name in self._fetched_names()}
        return [index for index in range(self.me.part.count) if index not in found]

    def read_fetched(self, scratch: str) -> LedgerReader:
        """Reads the results of all parts; whoever plans next gets the same ones.

        Args:
          scratch: Local folder for unfinished files.

        Raises:
          FileNotFoundError: A part has downloaded again in between.
        """
        url = storage.join(self.folder, _FROZEN)
        names = {name[:22]: name for name in self._fetched_names()}
        storage.compare_and_swap(url, canonical_json(sorted(names.values())), replacing=None)
        with scratch_folder(scratch) as folder:
            packed, joined = folder / "packed", folder / "fetched.jsonl"
            with storage.translate_errors(str(joined)), joined.open("wb") as stream:
                for name in _names(storage.read_bytes(url)):
                    storage.fetch_file(storage.join(self.folder, name), packed)
                    with gzip.open(packed) as lines:
                        shutil.copyfileobj(lines, stream)
            return read_ledger(joined)

    def forget_fetched(self) -> None:
        """Lets whoever plans next take results that parts have handed in since."""
        storage.delete(storage.join(self.folder, _FROZEN))

    def _fetched_names(self) -> list[str]:
        count = f"{self.me.part.count:05d}"
        found = [_FETCHED.fullmatch(name) for name in storage.list_names(self.folder, fresh=True)]
        return [match[0] for match in found if match is not None and match[2] == count]

    def _enter(self) -> None:
        me, turn = self.me, 0.02 * (1 + self.me.part.index % 16)
        mark = uuid.uuid4().hex
        while True:
            version = storage.version(self._record_url)
            found = None if version is None else read_lease(self._record_url)
            if version is not None and found is not None and not self._is_ours(found):
                self._require_free(version, found)
            joined = int(found.get("joined", 0)) if found is not None else 0
            record = {
                "job": me.job,
                "parts": me.part.count,
                "title": me.title,
                "dataset": me.dataset,
                "split": me.split,
                "identity": me.identity,
                "joined": joined + 1,
                "by": mark,
            }
            if storage.compare_and_swap(
                self._record_url, canonical_json(record), replacing=version
            ):
                return
            threading.Event().wait(turn)  # many may start in the same moment

    def _is_ours(self, record: Mapping[str, Any]) -> bool:
        return record.get("job") == self.me.job and record.get("parts") == self.me.part.count

    def _require_free(self, version: str, found: Mapping[str, Any]) -> None:
        if "parts" not in found:
            Lease(self.output, LEASE_NAME).require_free(version, found)
            return
        try:
            require_no_parts(self.output, found)
        except StorageError as error:
            if found.get("job") == self.me.job:
                raise ConflictError(
                    "job_conflict.parts_number",
                    where=self.output,
                    parts=found.get("parts"),
                    part=str(self.me.part),
                ) from error
            differences = find_differences(found.get("identity"), dict(self.me.identity))
            raise ConflictError(
                "job_conflict.parts",
                where=self.output,
                title=found.get("title"),
                host=error.facts.get("host"),
                table=table(differences, heads=("of the parts at work", "of this part")),
            ) from error

    def _still_joined(self, late: bool) -> bool:
        """Checks that the output is this job's; late, another job may be about to take it."""
        if not self._entered:
            return True
        if not late:
            record = read_lease(self._record_url)
            return record is not None and self._is_ours(record)
        try:
            self._enter()
        except ConflictError:
            return False
        except StorageError as error:
            if error.reason != "output_busy":
                raise
            return False
        return True


@contextmanager
def join_job(
    output: str, me: PartOfJob, *, state: Callable[[], Mapping[str, Any]]
) -> Iterator[HeldPart]:
    """Holds a part of a job for this process.

    Args:
      output: The output.
      me: The part, and the job.
      state: Called at each renewal of the lease: what the part is doing, in a few hundred bytes.

    Raises:
      StorageError: `part_busy`: another process has this part; `output_busy`: another job has the
        output.
      ConflictError: `job_conflict`: parts of another job are at work.
    """
    held = HeldPart(output, me, state=state)
    held.join()
    outcome = "interrupted"
    try:
        if storage.is_local(output):
            with naming_removal(output, held.check):
                yield held
        else:
            yield held
        outcome = "done"
    except ShardsError as error:
        outcome = f"failed: {error.reason}"
        raise
    except Exception:
        outcome = "failed"
        raise
    finally:
        held.end(outcome)


def require_shared(output: str, part: Part, own_disk: OwnDisk) -> None:
    """Refuses an output that parts on other machines cannot see: each would begin one of its own.

    That a part sees the same output as the others shows when it joins them; whether there are
    others that it does not see shows nowhere.

    Raises:
      StorageError: `own_disk`, `disk_unfit`.
    """
    machines = part.count > 1 and own_disk == "refuse"
    if machines and storage.is_own_disk(output):
        raise StorageError("own_disk", where=output, part=str(part))
    storage.prove_folder(output, machines=machines)


def forget_parts(output: str, job: str) -> None:
    """Removes what the parts of a job have told each other, and its hold on the output.

    One that joins while this is done leaves something; it does the same before it ends.
    """
    url = storage.join(output, LEASE_NAME)
    record = read_lease(url)
    if record is not None and "parts" in record and record.get("job") == job:
        storage.delete(url)
    storage.delete(storage.join(output, parts_folder(job)))
    storage.delete_if_empty(storage.join(output, PARTS_FOLDER))


def _names(payload: bytes) -> list[str]:
    names = read_json(payload)
    if not isinstance(names, list) or not all(
        isinstance(name, str) and _FETCHED.fullmatch(name) for name in names
    ):
        raise StorageError("plan_rows", where=_FROZEN, error="want a list of names")
    return names
