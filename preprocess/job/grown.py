"""Whether the source of a finished split has got rows, and nothing else: see `generation`."""

from __future__ import annotations

from contextlib import suppress

from preprocess.job.generation import (
    BLOCK,
    Growth,
    RowMarks,
    StoredMarks,
    generation_of,
    read_marks,
)
from preprocess.job.job import Job, Reporter
from preprocess.job.stamps import Compared
from shardspec.errors import ConflictError, SampleError
from shardspec.manifest import SplitEntry
from shardspec.messages import counted


def find_growth(job: Job, entry: SplitEntry, report: Reporter) -> Compared | None:
    """Compares the rows of a finished split with those of its source, and finds the new ones.

    Args:
      job: The job; its `growth` is set where there are new rows.
      entry: The split as the manifest has it.
      report: Gets the progress.

    Returns:
      How the files were compared whose content no row holds; None where they were not.

    Raises:
      ConflictError: `source_changed`: an old row has changed or is missing, or a file of theirs; or
        the output has no marks of them.
    """
    generation = generation_of(entry)
    stored = read_marks(job.marks_url(generation), build_key=entry.build_key)
    if stored is None:
        raise ConflictError("source_changed.unmarked", where=job.marks_url(generation))
    marks = _compare_rows(job, stored, report)
    compared = job.compare_files(generation, rows="more" if stored.frames else "any")
    require_same_files(job, compared)
    if len(job.dataset) > stored.num_examples:
        job.growth = Growth(generation=generation + 1, before=entry, marks=marks, stored=stored)
        report.note(
            f"{counted(len(job.examples), 'new row')} after {stored.num_examples:,}: generation "
            f"{job.generation} of split {job.settings.split}"
        )
    return compared


def require_same_files(job: Job, compared: Compared | None) -> None:
    """Refuses a source with changed files.

    Raises:
      ConflictError: `source_changed`.
    """
    if compared is not None and compared.num_changed:
        raise ConflictError(
            "source_changed.files",
            where=job.settings.source,
            changed=compared.num_changed,
            compared=compared.num_files,
            facts={**compared.changed, "how": compared.how},
        )


def _compare_rows(job: Job, stored: StoredMarks, report: Reporter) -> RowMarks:
    """Reads the old rows once, and refuses them at the first block that differs."""
    marks, want = RowMarks(), [*stored.blocks]
    num_old = stored.num_examples
    if num_old % BLOCK:
        want.append(stored.last)
    report.stage("compare rows", num_old)
    for i in range(min(num_old, len(job.dataset))):
        example = None
        with suppress(SampleError):  # as when it was planned
            example = job.dataset[i]
        marks.add(example)
        report.step("")
        if marks.num_examples % BLOCK == 0 or marks.num_examples == num_old:
            first = i // BLOCK * BLOCK
            if marks.last != want[first // BLOCK]:
                file, row = job.dataset.rows.locate(job.dataset.row_numbers(first)[0])
                raise ConflictError(
                    "source_changed.rows",
                    where=job.settings.source,
                    first=first,
                    last=i,
                    file=file,
                    row=row,
                )
    if len(job.dataset) < num_old:
        raise ConflictError(
            "source_changed.removed",
            where=job.settings.source,
            got=len(job.dataset),
            want=num_old,
        )
    return marks
