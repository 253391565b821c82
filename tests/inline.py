"""Jobs without processes and without a screen, for tests and benchmarks of what the jobs do."""

import contextlib
import pickle
from unittest import mock

from preprocess.job import lease
from preprocess.job.engines import local, ray_cluster
from preprocess.job.engines.local import Deferred, TaskDone, TaskProgress
from shardspec import storage


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


def run(tasks, *, work, context, num_workers, given=local.number_only):  # noqa: ARG001 - as local.run
    """Runs tasks in this process, one after the other: a process takes half a second to start."""
    for task in tasks:
        noted = []
        value = work(context, given(task), noted.append)
        if isinstance(value, Deferred):
            value = value.finish()
        yield from (TaskProgress(task=task, note=note) for note in noted)
        yield TaskDone(task=task, value=value)


@contextlib.contextmanager
def cluster(num_nodes):
    """Makes ENGINE=ray run in this process, as on some machines; gives what each task was sent.

    Everything crosses as bytes, as it would between machines.
    """
    sent = []

    def on_nodes(ray, tasks, *, work, context, given, num_gpus):  # noqa: ARG001 - as ray_cluster.run
        work, context = pickle.loads(pickle.dumps((work, context)))
        for task in tasks:
            own = pickle.loads(pickle.dumps(given(task)))
            sent.append(own)
            yield from run([task], work=work, context=context, num_workers=1, given={task: own}.get)

    with (
        mock.patch.object(ray_cluster, "connected", return_value=contextlib.nullcontext()),
        mock.patch.object(ray_cluster, "num_nodes", return_value=num_nodes),
        mock.patch.object(ray_cluster, "run", on_nodes),
    ):
        yield sent


@contextlib.contextmanager
def jobs():
    """Runs the tasks of jobs in this process until the block ends."""
    with mock.patch.object(local, "run", run):
        yield


class _Killed(BaseException):
    pass


class Processes:
    """Makes calls in this process look like processes that are killed, one after the other.

    A killed one does nothing more: each further change to storage fails too, so that its leases
    stay as they were; the next process sees that their holder has another start.
    """

    def __init__(self, patch):
        self.number, self.calls, self.at = 0, 0, None
        real = lease._this_process
        patch.setattr(lease, "_this_process", lambda: {**real(), "born": f"{self.number}"})
        patch.setattr(lease, "_born", lambda pid: f"{self.number}")
        for name in ("publish_bytes", "publish_file", "compare_and_swap", "delete"):
            patch.setattr(storage, name, self._counted(getattr(storage, name)))
        patch.setattr(storage, "delete_objects", self._counted(storage.delete_objects))

    def _counted(self, function):
        def call(*args, **more):
            self.calls += 1
            if self.at is not None and self.calls >= self.at:
                raise _Killed
            return function(*args, **more)

        return call

    def run(self, work, chosen, *, at=None):
        """Runs a job; tells how many changes it made, or None where it was killed."""
        self.number, self.calls, self.at = self.number + 1, 0, at
        try:
            work(chosen)
        except _Killed:
            return None
        finally:
            self.at = None
        return self.calls
