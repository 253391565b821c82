"""One job per output, on object stores too: real processes, a real store that decides."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from preprocess.job import lease
from preprocess.job.lease import LEASE_NAME, output_lock
from shardspec import storage
from shardspec.errors import StorageError

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["memory", "s3", "gcs"])
def out(request, tmp_path):
    if request.param == "memory":
        yield f"memory://{tmp_path.name}/out"
        storage.delete(f"memory://{tmp_path.name}")
        return
    server = request.getfixturevalue(f"{request.param}_server")
    with server.entered():
        yield f"{server.bucket}/{tmp_path.name}/out"


@pytest.fixture
def s3_out(s3_server, tmp_path):
    with s3_server.entered():
        yield f"{s3_server.bucket}/{tmp_path.name}/out"


@pytest.fixture
def beating(monkeypatch):
    """A lease that beats ten times a second."""
    monkeypatch.setattr(lease, "BEAT_S", 0.1)


@pytest.fixture
def quick(beating, monkeypatch):  # noqa: ARG001
    """A lease that beats ten times a second and is dead after one."""
    monkeypatch.setattr(lease, "TTL_S", 1.0)


def read(out):
    return json.loads(storage.read_bytes(storage.join(out, LEASE_NAME)))


def holder_of_another_machine(out):
    """Puts a lease in place as a job somewhere else would."""
    holder = {"job": "other", "host": "elsewhere", "pid": 1, "boot": "b", "pids": "p", "born": "9"}
    storage.publish_bytes(storage.join(out, LEASE_NAME), json.dumps(holder).encode())
    return holder


def refused(out):
    with pytest.raises(StorageError) as caught, output_lock(out):
        pass
    assert caught.value.reason == "output_busy"
    return caught.value


def test_an_output_is_held_by_one_and_free_when_it_is_done(out):
    with output_lock(out) as check:
        check()
        assert refused(out).facts["pid"] == os.getpid()
        check()
    assert storage.list_names(out) == []
    with output_lock(out):
        pass


def test_one_of_eight_that_come_at_once_gets_it(out):
    barrier, done = threading.Barrier(8), threading.Event()

    def come(_):
        barrier.wait()
        try:
            with output_lock(out):
                done.wait(20)
                return True
        except StorageError as error:
            return error.reason
        finally:
            losers.release()

    losers = threading.Semaphore(0)
    with ThreadPoolExecutor(8) as pool:
        tried = [pool.submit(come, i) for i in range(8)]
        for _ in range(7):
            losers.acquire()
        done.set()
        results = [each.result() for each in tried]
    assert sorted(results, key=str) == [True] + ["output_busy"] * 7


def test_a_job_that_was_killed_on_this_machine_holds_nothing(s3_server, s3_out):
    code = (
        "import time; from preprocess.job.lease import output_lock\n"
        f"with output_lock({s3_out!r}):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **s3_server.env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            assert refused(s3_out).facts["pid"] == process.pid
        finally:
            process.send_signal(signal.SIGKILL)
    assert read(s3_out)["pid"] == process.pid
    with output_lock(s3_out):  # at once, without waiting
        assert read(s3_out)["pid"] == os.getpid()


@pytest.mark.usefixtures("quick")
def test_a_lease_of_another_machine_that_stands_still_is_taken_over(s3_out, caplog):
    holder_of_another_machine(s3_out)
    with output_lock(s3_out):
        assert read(s3_out)["pid"] == os.getpid()
    assert "held by a job on elsewhere" in caplog.text


def test_a_lease_of_another_machine_that_beats_is_respected(s3_out, monkeypatch):
    beat = json.dumps({**holder_of_another_machine(s3_out), "beats": 1}).encode()
    url = storage.join(s3_out, LEASE_NAME)
    monkeypatch.setattr(lease, "_pause", lambda _: storage.publish_bytes(url, beat))
    assert refused(s3_out).facts["host"] == "elsewhere"
    assert storage.read_bytes(url) == beat


@pytest.mark.usefixtures("beating")
def test_a_lease_beats_while_it_is_held(s3_out):
    with output_lock(s3_out) as check:
        first = read(s3_out)["beats"]
        waited = threading.Event()
        for _ in range(100):
            if read(s3_out)["beats"] > first + 1:
                break
            waited.wait(0.1)
        assert read(s3_out)["beats"] > first + 1
        check()


@pytest.mark.usefixtures("beating")
def test_a_job_whose_lease_was_taken_over_stops_and_leaves_it(s3_out):
    waited = threading.Event()

    def until_lost(check):
        for _ in range(100):
            check()
            waited.wait(0.1)

    with output_lock(s3_out) as check:
        holder_of_another_machine(s3_out)
        with pytest.raises(StorageError) as caught:
            until_lost(check)
        assert caught.value.reason == "lease_lost"
    assert read(s3_out)["job"] == "other"


def test_a_store_that_ignores_conditions_is_named(out, monkeypatch, caplog):
    def ignoring(url, payload, *, replacing):
        storage.publish_bytes(url, payload)
        return True

    monkeypatch.setattr(storage, "compare_and_swap", ignoring)
    with output_lock(out):
        pass
    assert "ignores conditional writes" in caplog.text


def test_a_local_output_is_held_by_the_kernel_and_by_a_lease(tmp_path):
    out = tmp_path / "out"
    with output_lock(str(out)) as check:
        check()
        refused(str(out))
        assert [path.name for path in out.iterdir()] == [LEASE_NAME]
    assert [*out.iterdir()] == []


@pytest.mark.usefixtures("quick")
def test_a_job_whose_store_was_away_still_holds_its_lease(out, monkeypatch):
    back, real = threading.Event(), storage.version

    def version(url):
        back.wait(20)  # as a store does whose answers are tried for again and again
        return real(url)

    try:
        with output_lock(out) as check:
            before = read(out)["beats"]
            monkeypatch.setattr(storage, "version", version)
            threading.Event().wait(1.5)
            threading.Timer(0.2, back.set).start()
            check()
            assert read(out)["beats"] > before
    finally:
        back.set()


@pytest.mark.usefixtures("quick")
def test_a_job_whose_lease_was_taken_over_while_its_store_was_away_has_lost_it(out, monkeypatch):
    back, real = threading.Event(), storage.version

    def version(url):
        back.wait(20)
        return real(url)

    try:
        with output_lock(out) as check:
            monkeypatch.setattr(storage, "version", version)
            threading.Event().wait(1.5)
            holder_of_another_machine(out)
            back.set()
            with pytest.raises(StorageError) as caught:
                check()
            assert caught.value.reason == "lease_lost"
    finally:
        back.set()


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lease_that_cannot_be_renewed_for_whatever_reason_is_lost(out, monkeypatch):
    def broken(url):
        raise RuntimeError("no more threads")

    with output_lock(out) as check:
        monkeypatch.setattr(storage, "version", broken)
        threading.Event().wait(1.5)
        with pytest.raises(StorageError) as caught:
            check()
        assert caught.value.reason == "lease_lost"
        monkeypatch.undo()


class _SlowStore:
    """A store whose renewals each last as long as a lease does, by the clock that leases go by."""

    def __init__(self, patch, *, slow=1, after=lambda: None):
        self.late_s, self.left, self.renewals, self.after = lease.TTL_S, slow, 0, after
        start_s, self.swap = lease._now_s(), storage.compare_and_swap
        patch.setattr(lease, "_now_s", lambda: start_s + self.late_s)
        patch.setattr(storage, "compare_and_swap", self.compare_and_swap)

    def compare_and_swap(self, url, payload, *, replacing):
        swapped = self.swap(url, payload, replacing=replacing)
        self.renewals += 1
        if self.left:
            self.left -= 1
            self.late_s += lease.TTL_S
            self.after()
        return swapped


@pytest.mark.parametrize("out", ["memory"], indirect=True)
def test_a_renewal_that_arrives_late_is_repeated_before_the_lease_is_called_lost(out, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 3600.0)  # `check` alone renews
    with output_lock(out) as check, monkeypatch.context() as patch:
        store = _SlowStore(patch)
        check()
        check()
        assert store.renewals == 2


@pytest.mark.parametrize("out", ["memory"], indirect=True)
def test_a_lease_that_another_takes_over_during_a_late_renewal_is_lost(out, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 3600.0)  # `check` alone renews
    with output_lock(out) as check, monkeypatch.context() as patch:
        store = _SlowStore(patch, after=lambda: holder_of_another_machine(out))
        with pytest.raises(StorageError) as caught:
            check()
        assert (caught.value.reason, store.renewals) == ("lease_lost", 1)
    assert read(out)["job"] == "other"


@pytest.mark.parametrize("out", ["memory"], indirect=True)
def test_a_lease_of_which_no_renewal_arrives_in_time_is_lost(out, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 3600.0)  # `check` alone renews
    with output_lock(out) as check, monkeypatch.context() as patch:
        store = _SlowStore(patch, slow=100)
        with pytest.raises(StorageError) as caught:
            check()
        assert (caught.value.reason, store.renewals) == ("lease_lost", lease._LATE_RENEWALS)


def test_a_lease_that_another_has_taken_over_is_not_given_back(out):
    with output_lock(out):  # between two beats
        holder_of_another_machine(out)
    assert read(out)["job"] == "other"


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="has no clock that counts suspends")
def test_a_lease_that_a_machine_has_slept_through_is_renewed_or_lost(out, monkeypatch):
    real = time.clock_gettime

    def woken(clock):  # the monotonic clock stands still while the machine is suspended
        return real(clock) + (lease.TTL_S if clock == time.CLOCK_BOOTTIME else 0)

    with output_lock(out) as check:
        check()
        before = read(out)["beats"]
        monkeypatch.setattr(time, "clock_gettime", woken)
        check()
        assert read(out)["beats"] > before
        monkeypatch.undo()
        holder_of_another_machine(out)
        monkeypatch.setattr(time, "clock_gettime", lambda clock: woken(clock) + lease.TTL_S)
        with pytest.raises(StorageError) as caught:
            check()
        assert caught.value.reason == "lease_lost"


def test_where_no_clock_counts_suspends_a_lease_goes_by_the_monotonic_one(out, monkeypatch):
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    with output_lock(out) as check:
        check()
        now_s = time.monotonic()
        holder_of_another_machine(out)
        monkeypatch.setattr(time, "monotonic", lambda: now_s + lease.TTL_S)
        with pytest.raises(StorageError) as caught:
            check()
        assert caught.value.reason == "lease_lost"
        monkeypatch.undo()
