"""Jobs that crash: forks of one warm process, in each of which something fails at a chosen moment.

`Crashing` starts this file as a program, which has imported the job once; a start costs a fork
instead of a second. Moments are counted in changes of the file system (`_CHANGES`), not in time, so
that a seed is the same crash on every machine. Workers are forks too, with the descriptors that a
spawned one has, so that they see the end of their supervisor.
"""

import contextlib
import errno
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

_CHANGES = ("replace", "rename", "link", "fsync", "unlink", "mkdir", "rmdir", "ftruncate")
_GROWING = ("replace", "rename", "link", "fsync", "mkdir")
"""Those that a full disk refuses."""

_LIMIT_S = 240
_REFUSED, _BUG = 3, 70


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a driver, or to its first worker: the process of its first task on Ray.

    `what` is one of
      kill         the process is killed at its `at`-th change of the file system
      kill group   so is the driver with all its workers
      full         from then on the disk of the output and of the cache has no space
      limit        no file of the driver or its workers gets longer than `at` bytes
      kill node    in a worker on a Ray cluster: it is killed with the raylet of its node
      clock        the time of day jumps by weeks, to and fro, and the machine is suspended; `at` is
                   the seed
    """

    what: str
    at: int
    in_worker: bool = False


@dataclass(frozen=True, kw_only=True)
class Driver:
    """A job, or a part of one, in a process of its own."""

    settings: object
    """Its JobSettings."""
    faults: tuple = ()


@dataclass(frozen=True, kw_only=True)
class End:
    """How a driver ended."""

    code: int
    """0, `-SIGKILL`, or 3 where it refused to continue."""
    log: str

    @property
    def kills(self):
        """Processes of it that were killed."""
        return (self.code == -signal.SIGKILL) + self.log.count("a worker died")

    @property
    def changes(self):
        """Changes of the file system that it has made, where it ended well."""
        return int(self.log.rpartition("changes ")[2])


class Crashing:
    """The program, from another process; a context manager."""

    def __init__(self, folder):
        self._folder, self._numbers = Path(folder), itertools.count()

    def __enter__(self):
        self._program = subprocess.Popen(
            [sys.executable, "-m", "tests.crashes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(["", *sys.path]),
                "TOKENIZERS_PARALLELISM": "false",
                "RAY_AUTH_MODE": "disabled",  # as of ray_nodes, whichever fixture is first
            },
        )
        return self

    def __exit__(self, *_):
        self._program.stdin.close()
        self._program.wait(30)
        self._program.stdout.close()

    def run(self, drivers, *, as_node=False):
        """Runs drivers at the same time, to their ends.

        Args:
          drivers: The drivers.
          as_node: They share a machine: once one is killed, all are.
        """
        logs = [self._folder / f"{next(self._numbers)}.log" for _ in drivers]
        pickle.dump((drivers, logs, as_node), self._program.stdin)
        self._program.stdin.flush()
        codes = pickle.load(self._program.stdout)
        return [End(code=code, log=log.read_text()) for code, log in zip(codes, logs, strict=True)]


def _main():
    import pyarrow.parquet  # noqa: F401 - loaded once for all
    from PIL import Image

    from preprocess.job import part_run
    from preprocess.job.engines import local
    from preprocess.job.job import Job, JobSettings

    Job(JobSettings(dataset="pixmo_cap", source="sample", limit=1, out="nowhere", cache="nowhere"))
    Image.init()
    gc.freeze()
    part_run.POLL_S = 0.02
    local.multiprocessing = SimpleNamespace(get_context=lambda _: _Forks)
    answers = os.fdopen(os.dup(1), "wb")
    with contextlib.suppress(EOFError):
        while True:
            drivers, logs, as_node = pickle.load(sys.stdin.buffer)
            pickle.dump(_run_all(drivers, logs, as_node), answers)
            answers.flush()


def _run_all(drivers, logs, as_node):
    running = {}
    for i, (driver, log) in enumerate(zip(drivers, logs, strict=True)):
        pid = os.fork()
        if not pid:
            _drive(driver, log)
        running[pid] = i
    codes = {}
    while running:
        pid, status = os.wait()
        codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if as_node and os.WIFSIGNALED(status):
            for other in [pid, *running]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(other, signal.SIGKILL)
    return [codes[i] for i in range(len(drivers))]


def _drive(driver, log):
    """In a child of the program: never returns."""
    os.setpgid(0, 0)
    signal.alarm(_LIMIT_S)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    code = _BUG
    try:
        code = _run_job(driver, log)
    except BaseException:  # noqa: BLE001 - whatever it is, the end of this process
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def _run_job(driver, log):
    from preprocess.job import run_job
    from preprocess.job.engines import ray_cluster
    from preprocess.job.part_run import run_part
    from shardspec.errors import ShardsError
    from tests.inline import Quiet

    reporter = Quiet()
    folder = Path(driver.settings.out).parent
    _faults.install(driver.faults, folder=folder)
    ray_cluster._run_task = _ray_task(driver.faults, folder=folder, log=log)
    run = run_job if driver.settings.part is None else run_part
    try:
        run(driver.settings, reporter)
    except ShardsError as error:
        refused = f"refused: {error.reason}\n{error}"
    else:
        refused = ""
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(*reporter.notes, sep="\n")
    print(refused or f"changes {_faults.changes}")
    return _REFUSED if refused else 0


class _Faults:
    """The faults of this process."""

    def __init__(self):
        self.changes, self.workers, self._faults, self._is_worker = 0, 0, (), False
        self.log = None

    def install(self, faults, *, folder):
        self._faults, self._folder = faults, str(folder)
        for name in _CHANGES:
            setattr(os, name, self._counted(name, getattr(os, name)))
        for fault in faults:
            if fault.what == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault.at, resource.RLIM_INFINITY))
            if fault.what == "clock":
                _let_clocks_jump(random.Random(fault.at))

    def enter_worker(self):
        """Goes on as a worker: the first of a driver has faults."""
        self.changes, self._is_worker = 0, True
        if self.workers > 1:
            self._faults = [fault for fault in self._faults if not fault.in_worker]

    @property
    def of_worker(self):
        """Those that are meant for the worker that this process is."""
        return [fault for fault in self._faults if self._is_worker and fault.in_worker]

    def kill(self, fault):
        """Kills this process, and those around it that the fault names."""
        if not fault.what.startswith("kill"):
            return
        if self.log:  # on Ray: its driver is not told
            with self.log.open("a") as log:
                log.write("a worker died\n")
        if fault.what == "kill node":
            os.kill(os.getppid(), signal.SIGKILL)
        if fault.what == "kill group":
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, name, change):
        def call(*args, **more):
            self.changes += 1
            for fault in self._faults:
                if fault.in_worker == self._is_worker and fault.at == self.changes:
                    self.kill(fault)
                if fault.what == "full" and fault.at <= self.changes and name in _GROWING:
                    self._refuse(args[0])
            return change(*args, **more)

        return call

    def _refuse(self, target):
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        if str(target).startswith(self._folder):  # the disk of the job, not that of its libraries
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)


_faults = _Faults()


def _ray_task(faults, *, folder, log):
    """Makes what runs a task on Ray; it is pickled, so that it imports what it needs."""

    def run_task(*args):
        from preprocess.job.engines.ray_cluster import _run_task
        from tests.crashes import ray_worker

        with ray_worker(faults, folder=folder, log=log):
            return _run_task(*args)

    return run_task


@contextlib.contextmanager
def ray_worker(faults, *, folder, log):
    """A task in a process of a Ray cluster, which works for one driver: the first has faults."""
    if not _faults.log:
        _faults.log = log
        with contextlib.suppress(FileExistsError):
            log.with_suffix(".first").touch(exist_ok=False)
            _faults.enter_worker()
            _faults.install(faults, folder=folder)
    yield
    for fault in _faults.of_worker:
        _faults.kill(fault)  # fewer changes than were expected


def _let_clocks_jump(rng):
    from preprocess.job import lease

    real_time, real_now = time.time, lease._now_s
    week_s = 7 * 24 * 3600
    suspended_s, looks, jump_at = 0.0, 0, rng.randint(1, 30)

    def now():
        nonlocal suspended_s, looks, jump_at
        looks += 1
        if looks == jump_at:
            suspended_s += 2 * lease.TTL_S
            jump_at += rng.randint(10, 30)
        return real_now() + suspended_s

    def jumping():
        # Ray's own waits end by this clock: its connection would be refused.
        of_ray = sys._getframe(1).f_globals["__name__"].startswith("ray.")
        return real_time() + (0 if of_ray else rng.choice([-6, -1, 0, 1, 6]) * week_s)

    time.time = jumping
    time.time_ns = lambda: int(time.time() * 10**9)
    lease._now_s = now


class _Forks:
    """Starts workers as the context "spawn" does, but as forks."""

    Pipe = staticmethod(multiprocessing.Pipe)

    @staticmethod
    def Process(*, target, args, daemon):
        _faults.workers += 1
        fork = multiprocessing.get_context("fork")
        return fork.Process(target=_work, args=(target, *args), daemon=daemon)


def _work(serve, pipe, *more):
    # What a spawned process does not have: a lock that is held here would outlive the driver.
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number != pipe.fileno():
            with contextlib.suppress(OSError):
                os.close(number)
    _faults.enter_worker()
    serve(pipe, *more)


if __name__ == "__main__":
    _main()
