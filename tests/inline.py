"""Jobs without processes and without a screen, for tests and benchmarks of what the jobs do."""

import contextlib
from unittest import mock

from preprocess.job.engines import local
from preprocess.job.engines.local import Deferred, TaskDone, TaskProgress


class Quiet:
    """A reporter that keeps what it was told."""

    def __init__(self):
        self.notes = []
        self.steps = []
        self.sent_bytes = 0

    def stage(self, name, total):
        pass

    def step(self, reason):
        self.steps.append(reason)

    def sent(self, num_bytes):
        self.sent_bytes += num_bytes

    def note(self, text):
        self.notes.append(text)


def run(tasks, *, work, context, num_workers):  # noqa: ARG001 - as preprocess.job.engines.local.run
    """Runs tasks in this process, one after the other: a process takes half a second to start."""
    for task in tasks:
        noted = []
        value = work(context, task, noted.append)
        if isinstance(value, Deferred):
            value = value.finish()
        yield from (TaskProgress(task=task, note=note) for note in noted)
        yield TaskDone(task=task, value=value)


@contextlib.contextmanager
def jobs():
    """Runs the tasks of jobs in this process until the block ends."""
    with mock.patch.object(local, "run", run):
        yield
