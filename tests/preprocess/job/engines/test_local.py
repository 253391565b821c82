"""The local engine, with real processes that finish, fail, and are killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from preprocess.job.engines import local
from preprocess.job.engines.local import MAX_ATTEMPTS, TaskDone, TaskLost, TaskProgress, run
from shardspec.errors import SampleError, StorageError

ROOT = Path(__file__).parents[4]

# What workers run must be importable by them: spawned children take over the parent's sys.path.
TASKS = """
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from preprocess.job.engines.local import Deferred
from shardspec.errors import SampleError


def finish_later(folder, task, report):
    (Path(folder) / f"begun-{task}").touch()

    def rest():
        while task == 0 and not (Path(folder) / "begun-1").exists():
            report("waits")
            time.sleep(0.01)
        seen = sorted(path.name for path in Path(folder).glob("begun-*"))
        (Path(folder) / f"finished-{task}").touch()
        return seen

    return Deferred(finish=rest)


def fail_later(folder, task, report):
    def rest():
        raise SampleError("gone", what="the store is gone", where=f"task {task}")

    return Deferred(finish=rest)


def die_later(folder, task, report):
    def rest():
        marker = Path(folder) / str(task)
        if task == 0 and not marker.exists():
            while not (Path(folder) / "next").exists():
                time.sleep(0.01)
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    if task == 1:
        (Path(folder) / "next").touch()
        time.sleep(0.2 if not (Path(folder) / "0").exists() else 0)
    return Deferred(finish=rest)


def tidy_up(folder, task, report):
    def rest():
        try:
            while True:
                report("a part")
                time.sleep(0.01)
        except BaseException as error:
            (Path(folder) / "tidied").write_text(type(error).__name__)
            raise

    return Deferred(finish=rest)


def tidy_slowly(folder, task, report):
    def rest():
        try:
            while True:
                report("a part")
                time.sleep(0.01)
        except BaseException as error:
            time.sleep(2)
            (Path(folder) / "tidied").write_text(type(error).__name__)
            raise

    return Deferred(finish=rest)


def never_tidies(folder, task, report):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report("deaf")
    time.sleep(600)


def square(context, task, report):
    report(("begins", task))
    return context["offset"] + task * task


def tell_pid(context, task, report):
    return os.getpid()


def die_first(folder, task, report):
    marker = Path(folder) / str(task)
    if task == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def die_always(context, task, report):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(context, task, report):
    os._exit(7)


def refuse(context, task, report):
    raise SampleError("bad_row", what="a bad row", where=f"row {task}", got=1)


def stumble(context, task, report):
    return {}[f"no such key {task}"]


def break_pipe(context, task, report):
    raise BrokenPipeError("the upload broke off")


class Unreadable:
    def __reduce__(self):
        return os._exit, (7,)


def sleep_silently(context, task, report):
    report("asleep")
    time.sleep(600)


def second_waits(folder, task, report):
    (Path(folder) / f"pid-{task}").write_text(str(os.getpid()))
    while task == 1 and not (Path(folder) / "go").exists():
        report("waiting")
        time.sleep(0.02)
    return os.getpid()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def work(folder):
    """The module of the tasks, in a folder of its own on sys.path."""
    import importlib

    (folder / "engine_tasks.py").write_text(TASKS)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("engine_tasks")
    sys.path.remove(str(folder))
    del sys.modules["engine_tasks"]


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    assert multiprocessing.active_children() == []


def kill_and_wait(pid):
    (process,) = [p for p in multiprocessing.active_children() if p.pid == pid]
    process.kill()
    process.join()


@pytest.mark.parametrize("num_workers", [1, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_every_task_gives_its_result_whatever_the_number_of_workers(work, num_workers):
    context = {"offset": 100}
    events = list(run(range(5), work=work.square, context=context, num_workers=num_workers))
    done = {event.task: event.value for event in events if isinstance(event, TaskDone)}
    assert done == {task: 100 + task * task for task in range(5)}
    progress = [event for event in events if isinstance(event, TaskProgress)]
    assert sorted(event.note for event in progress) == [("begins", task) for task in range(5)]
    assert all(event.note[1] == event.task for event in progress)
    assert len(events) == 10


@pytest.mark.slow
def test_no_more_processes_start_than_there_are_tasks(work):
    events = run([4, 7], work=work.tell_pid, context=None, num_workers=8)
    first = next(events)
    assert len(multiprocessing.active_children()) == 2
    rest = list(events)
    assert {event.task for event in [first, *rest]} == {4, 7}


def test_without_tasks_nothing_happens(work):
    assert list(run([], work=work.square, context=None, num_workers=4)) == []


def test_killed_worker_costs_only_its_task_which_runs_again(work, tmp_path):
    events = list(run(range(4), work=work.die_first, context=str(tmp_path), num_workers=2))
    assert [e for e in events if isinstance(e, TaskLost)] == [TaskLost(task=1, exit_code=-9)]
    assert sorted(e.task for e in events if isinstance(e, TaskDone)) == [0, 1, 2, 3]
    lost = events.index(TaskLost(task=1, exit_code=-9))
    assert lost < events.index(TaskDone(task=1, value=1))


@pytest.mark.slow
@pytest.mark.parametrize("name, exit_code", [("die_always", -9), ("leave", 7)])
def test_task_that_always_takes_its_worker_down_stops_the_job(work, name, exit_code):
    events = run([3], work=getattr(work, name), context=None, num_workers=2)
    lost = []
    with pytest.raises(StorageError) as caught:
        lost.extend(events)
    error = caught.value
    assert (error.reason, error.where) == ("worker_died", "task 3")
    assert error.facts == {"attempts": MAX_ATTEMPTS, "exit_code": exit_code}
    assert list(events) == []


@pytest.mark.slow
def test_worker_that_dies_before_it_has_read_its_context_stops_the_job(work):
    context = (work.Unreadable(), bytes(4 * 2**20))  # more than fits into any pipe
    with pytest.raises(StorageError) as caught:
        list(run([3], work=work.square, context=context, num_workers=1))
    assert caught.value.facts == {"attempts": MAX_ATTEMPTS, "exit_code": 7}


@pytest.mark.slow
def test_worker_killed_between_two_tasks_costs_nothing_but_a_new_one(work):
    events = run(range(3), work=work.tell_pid, context=None, num_workers=1)
    first = next(events)
    kill_and_wait(first.value)
    rest = list(events)
    assert rest[0] == TaskLost(task=1, exit_code=-9)
    assert [event.task for event in rest[1:]] == [1, 2]
    assert first.value not in [event.value for event in rest[1:]]


@pytest.mark.slow
def test_idle_worker_that_is_killed_does_not_stop_the_others(work, tmp_path):
    events = run(range(2), work=work.second_waits, context=str(tmp_path), num_workers=2)
    done = next(event for event in events if isinstance(event, TaskDone))
    assert done.task == 0
    kill_and_wait(done.value)
    assert isinstance(next(events), TaskProgress)
    (tmp_path / "go").touch()
    rest = [event for event in events if not isinstance(event, TaskProgress)]
    assert [event.task for event in rest] == [1]
    assert isinstance(rest[0], TaskDone)


def test_the_rest_of_a_task_runs_beside_the_next_one_and_only_one_does(work, tmp_path):
    context = str(tmp_path)
    events = list(run(range(4), work=work.finish_later, context=context, num_workers=1))
    seen = {event.task: event.value for event in events if isinstance(event, TaskDone)}
    assert sorted(seen) == [0, 1, 2, 3]
    assert "begun-1" in seen[0]  # it went on while task 1 was worked on
    assert "begun-2" not in seen[0]  # task 2 waits for it


def test_a_rest_that_fails_stops_the_job(work, tmp_path):
    with pytest.raises(SampleError) as caught:
        list(run(range(3), work=work.fail_later, context=str(tmp_path), num_workers=1))
    assert caught.value.reason == "gone"


def test_a_worker_that_dies_costs_what_it_worked_on_and_what_was_under_way(work, tmp_path):
    events = list(run(range(3), work=work.die_later, context=str(tmp_path), num_workers=1))
    assert {e.task for e in events if isinstance(e, TaskLost)} == {0, 1}
    assert sorted(e.task for e in events if isinstance(e, TaskDone)) == [0, 1, 2]


def test_a_worker_that_is_ended_tidies_up_first(work, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "TIDY_S", 120.0)  # the machine may be busy
    events = run([0], work=work.tidy_up, context=str(tmp_path), num_workers=1)
    next(event for event in events if isinstance(event, TaskProgress))
    events.close()
    assert (tmp_path / "tidied").read_text() == "SystemExit"


def test_a_worker_ended_while_it_waits_for_the_rest_lets_that_tidy_up(work, tmp_path, monkeypatch):
    # Without the wait, the signal mostly comes before the worker sees that its pipe was closed.
    terminate = BaseProcess.terminate
    monkeypatch.setattr(BaseProcess, "terminate", lambda self: (time.sleep(0.5), terminate(self)))
    monkeypatch.setattr(local, "TIDY_S", 120.0)
    events = run([0], work=work.tidy_slowly, context=str(tmp_path), num_workers=1)
    next(event for event in events if isinstance(event, TaskProgress))
    events.close()
    assert (tmp_path / "tidied").read_text() == "SystemExit"


def test_a_worker_that_does_not_listen_is_killed(work, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "TIDY_S", 0.2)
    events = run([0], work=work.never_tidies, context=str(tmp_path), num_workers=1)
    next(event for event in events if isinstance(event, TaskProgress))
    events.close()
    assert multiprocessing.active_children() == []


def test_error_of_the_project_crosses_as_itself(work):
    with pytest.raises(SampleError) as caught:
        list(run([5], work=work.refuse, context=None, num_workers=1))
    error = caught.value
    assert (error.reason, error.where, error.facts) == ("bad_row", "row 5", {"got": 1})


def test_unexpected_error_carries_the_traceback_of_the_worker(work):
    with pytest.raises(RuntimeError) as caught:
        list(run([5], work=work.stumble, context=None, num_workers=1))
    text = str(caught.value)
    assert text.startswith("task 5 failed:")
    assert "in stumble" in text
    assert "KeyError: 'no such key 5'" in text


def test_broken_pipe_of_the_task_itself_is_its_failure(work):
    with pytest.raises(RuntimeError, match="the upload broke off"):
        list(run([5], work=work.break_pipe, context=None, num_workers=1))


@pytest.mark.slow
def test_failure_of_one_task_ends_the_workers_of_the_others(work, tmp_path):
    events = run(range(2), work=work.second_waits, context=str(tmp_path), num_workers=2)
    next(event for event in events if isinstance(event, TaskProgress))
    assert multiprocessing.active_children()
    with pytest.raises(ZeroDivisionError):
        events.throw(ZeroDivisionError())
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_closing_the_events_early_ends_even_silent_processes(work):
    events = run(range(2), work=work.sleep_silently, context=None, num_workers=2)
    next(event for event in events if isinstance(event, TaskProgress))
    events.close()
    assert multiprocessing.active_children() == []


def lives(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, *, timeout_s=60):
    stop_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < stop_s, "waited too long"
        time.sleep(0.02)


def test_workers_end_when_the_supervisor_is_killed(work, folder, tmp_path):
    # Task 0 ends, so its worker waits for more; task 1 is still at work and reports.
    script = tmp_path / "supervise.py"
    script.write_text(
        "import sys, engine_tasks\n"
        "from preprocess.job.engines.local import TaskDone, run\n"
        "if __name__ == '__main__':\n"
        "    work = engine_tasks.second_waits\n"
        "    for event in run(range(2), work=work, context=sys.argv[1], num_workers=2):\n"
        "        if isinstance(event, TaskDone):\n"
        "            print(event.task, flush=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True
    ) as supervisor:
        try:
            assert supervisor.stdout.readline() == "0\n"
            wait_for(lambda: (tmp_path / "pid-1").exists() and (tmp_path / "pid-1").read_text())
            pids = [int((tmp_path / f"pid-{task}").read_text()) for task in range(2)]
            assert len({*pids}) == 2
            assert all(lives(pid) for pid in pids)
        finally:
            supervisor.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(lives(pid) for pid in pids), timeout_s=60)
