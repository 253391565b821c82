"""The fetcher's threads: one future for each piece of work, and no thread too few."""

import threading
from functools import partial
from unittest import mock

from loader.reading import fetcher as fetcher_module
from loader.reading.fetcher import Fetcher
from shardspec.storage import RetryPolicy


def submit(fetcher, work):
    """Submits work; returns its future, and an event that is set when `done` was called."""
    ended = threading.Event()
    futures = []

    def done(future):
        futures.append(future)
        ended.set()

    future = fetcher.submit(work, done=done)
    return future, futures, ended


def test_work_ends_with_its_own_future():
    fetcher = Fetcher(RetryPolicy())
    results = []
    future, passed, ended = submit(fetcher, lambda: results.append(1))
    assert ended.wait(60)
    assert future.exception(60) is None
    assert passed == [future]
    assert results == [1]


def test_a_failure_is_the_futures_and_the_thread_serves_on():
    fetcher = Fetcher(RetryPolicy())

    def fail():
        raise SystemExit("even this")

    future, passed, ended = submit(fetcher, fail)
    assert ended.wait(60)
    assert passed == [future]
    assert isinstance(future.exception(60), SystemExit)
    _, _, ended = submit(fetcher, lambda: None)
    assert ended.wait(60)


def test_everything_that_is_submitted_runs_at_once():
    fetcher = Fetcher(RetryPolicy())
    for _ in range(3):  # the second time by threads that are idle
        together = threading.Barrier(9)
        ends = [submit(fetcher, partial(together.wait, 60))[2] for _ in range(8)]
        together.wait(60)
        assert all(ended.wait(60) for ended in ends)


def test_threads_keep_no_process_alive_and_end_when_they_are_idle():
    with mock.patch.object(fetcher_module, "_IDLE_S", 0.01):
        fetcher = Fetcher(RetryPolicy())
        threads = []
        _, _, ended = submit(fetcher, lambda: threads.append(threading.current_thread()))
        assert ended.wait(60)
        assert threads[0].daemon
        threads[0].join(60)
        assert not threads[0].is_alive()
        _, _, ended = submit(fetcher, lambda: None)
        assert ended.wait(60)
