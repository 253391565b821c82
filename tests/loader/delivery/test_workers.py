import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loader import StreamingDataset, make_dataloader
from loader.assembly.collate import MMCollator
from loader.assembly.view import View
from shardspec.errors import ConfigError, StateError, WorkerError
from shardspec.tiling import ImageView

ROOT = Path(__file__).parents[3]
NUM = 40
BATCH = 4
VIEW = ImageView(size_px=112, patch_px=14)


@pytest.fixture(scope="module")
def url(tiny_sample, write_dataset, tmp_path_factory):
    """Batches of 150 KB: enough to be shared."""
    samples = [tiny_sample(i, num_images=1 + i % 2, size=(112, 112)) for i in range(NUM)]
    folder = tmp_path_factory.mktemp("workers") / "set"
    return write_dataset(folder, samples, several=True, view=VIEW)


def make(url, *, workers=1, **options):
    dataset = StreamingDataset(url, seed=7, view=View(image=VIEW), rank=0, world_size=1)
    settings = {"global_batch_size": BATCH, "sequence_length": 256, "pad_mode": "max_len"}
    return make_dataloader(dataset, workers=workers, **{**settings, **options})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(url):
    return list(make(url, workers=0, decode_threads=0))


@pytest.fixture(scope="module")
def two_workers(url):
    """A loader whose two processes several tests use; it starts others where they were ended."""
    loader = make(url, workers=2)
    yield loader
    loader.close()


@pytest.fixture
def shared(two_workers):
    """The same, at its first step."""
    two_workers.load_state_dict({**two_workers.state_dict(), "step": 0})
    return two_workers


def files_of_batches():
    """Lists the files with batches that this process maps."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    names = {line.split(maxsplit=5)[5] for line in maps if "/" in line}
    # Not those in folders of tests whose names speak of batches.
    return {name for name in names if "batch" in Path(name).name}


def test_batches_are_the_same_and_stay_what_they_were_for_as_long_as_they_are_kept(
    shared, undisturbed
):
    loader = shared
    kept = list(loader)  # memory that is looked at carries no other batch
    # Without a name there is nothing that could be left behind.
    assert files_of_batches() == {"/memfd:batch (deleted)"}
    assert all(map(same, kept, undisturbed))
    again = []
    for batch in loader:  # here it does
        again.append(batch["images"].sum().item())
    assert len(again) == len(undisturbed)
    assert all(map(same, kept, undisturbed))


@pytest.mark.slow
def test_memory_is_used_again_and_what_is_left_of_a_batch_keeps_it(url, undisturbed):
    loader = make(url, workers=1)
    places, labels = [], []
    for batch in loader:
        places.append(batch["images"].data_ptr())
        labels.append(batch["images"][0, 0, 0, 0])  # a row of the pictures keeps all of them
        del batch
    assert len(set(places)) == len(places)
    for got, want in zip(labels, undisturbed, strict=True):
        assert torch.equal(got, want["images"][0, 0, 0, 0])
    del labels, got, want
    places = [batch["images"].data_ptr() for batch in make(url, workers=1)]
    assert len(set(places)) <= 5


@pytest.mark.slow
def test_consumer_that_keeps_more_than_can_be_mapped_gets_copies(url, undisturbed, monkeypatch):
    monkeypatch.setattr("loader.delivery.workers._MOST_MAPPED", 4)
    before = len(os.listdir("/proc/self/fd"))
    batches = iter(make(url))
    kept = [next(batches) for _ in range(9)]
    # The pipe, the process's sentinel, and a file for each buffer in use or on its way.
    assert len(os.listdir("/proc/self/fd")) - before <= 4 + 10
    assert all(map(same, [*kept, *batches], undisturbed))


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 1])
def test_descriptors_that_run_out_are_an_error_that_names_their_limit(left, url):
    before = pids()
    batches = iter(make(url))
    kept = [next(batches)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest one
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, hard))
    try:
        with pytest.raises(ConfigError) as caught:
            kept.extend(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.reason == "descriptor_limit"
    assert caught.value.facts == {"most_mapped": 48, "limit": free + left, "hard_limit": hard}
    assert "`ulimit -n`" in caught.value.fix
    assert not pids() - before


class Failing(MMCollator):
    def collate(self, examples, **options):
        raise ZeroDivisionError("in the user's code")


@pytest.mark.slow
def test_other_exceptions_of_a_worker_come_with_their_traceback(url):
    before = pids()
    loader = make(url)
    loader._batches.collator = Failing(sequence_length=8)
    with pytest.raises(WorkerError, match="ZeroDivisionError: in the user's code") as caught:
        list(loader)
    assert caught.value.reason == "worker_crash"
    assert not pids() - before


class Busy:
    """A maker whose batches behind the first take long."""

    def __init__(self, maker):
        self.maker, self.readers = maker, maker.readers

    def make(self, task, *, allocate):
        if task.step:
            time.sleep(60)
        return self.maker.make(task, allocate=allocate)


@pytest.mark.slow
def test_busy_workers_are_waited_for_together(url, monkeypatch):
    before = pids()
    monkeypatch.setattr("loader.delivery.workers._JOIN_S", 4.0)
    loader = make(url, workers=4)
    loader._maker = Busy(loader._maker)
    batches = iter(loader)
    next(batches)
    start_s = time.monotonic()
    loader.close()
    assert time.monotonic() - start_s < 12  # one after the other they would take 16
    assert not pids() - before


@pytest.mark.slow
def test_workers_end_at_once_although_a_forked_child_has_their_pipes_too(url, monkeypatch):
    monkeypatch.setattr("loader.delivery.workers._JOIN_S", 200.0)
    loader = make(url, workers=2)
    batches = iter(loader)
    next(batches)
    child = os.fork()
    if not child:  # such as a worker of a torch DataLoader that evaluates in between
        time.sleep(600)
        os._exit(0)
    try:
        start_s = time.monotonic()
        loader.close()
        # Half a second, and more on a busy machine; not the 200 of who must be killed.
        assert time.monotonic() - start_s < 100
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class Talking:
    def __init__(self, maker):
        self.maker, self.readers = maker, maker.readers

    def make(self, task, *, allocate):
        print(f"step {task.step}")
        return self.maker.make(task, allocate=allocate)


@pytest.mark.slow
def test_what_the_users_code_prints_is_not_lost(url, capfd, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    loader = make(url)
    loader._maker = Talking(loader._maker)
    steps = [step for step, _ in enumerate(loader)]
    loader.close()
    # Its output is a file here, and not written line by line.
    assert capfd.readouterr().out.split("\n")[: len(steps)] == [f"step {s}" for s in steps]


class NoMemory:
    """A maker in whose process no shared memory can be had."""

    def __init__(self, maker):
        self.maker, self.readers = maker, maker.readers

    def make(self, task, *, allocate):
        import loader.delivery.workers

        def refuse():
            raise OSError("no space left")

        loader.delivery.workers._anonymous_file = refuse
        return self.maker.make(task, allocate=allocate)


@pytest.mark.slow
def test_without_shared_memory_batches_are_copied_with_one_warning(url, undisturbed, caplog):
    loader = make(url)
    loader._maker = NoMemory(loader._maker)
    with caplog.at_level(logging.WARNING, "loader.delivery.workers"):
        assert all(map(same, loader, undisturbed))
    assert [record.getMessage() for record in caplog.records] == [
        "a worker process has no shared memory, so batches are copied: no space left"
    ]


@pytest.mark.slow
def test_killed_consumer_leaves_no_workers(url, tmp_path):
    script = tmp_path / "consume.py"
    script.write_text(
        "import multiprocessing, sys, time\n"
        "from loader import StreamingDataset, make_dataloader\n"
        "if __name__ == '__main__':\n"
        "    loader = make_dataloader(StreamingDataset(sys.argv[1], rank=0, world_size=1),\n"
        "        global_batch_size=4, sequence_length=256, workers=2)\n"
        "    for batch in loader:\n"
        "        print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "        time.sleep(60)\n"
    )
    consumer = subprocess.Popen(
        [sys.executable, script, url],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    workers = [int(pid) for pid in consumer.stdout.readline().split()]
    assert len(workers) == 2
    consumer.kill()
    consumer.wait()
    consumer.stdout.close()
    stop_s = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        assert time.monotonic() < stop_s, "workers outlive their consumer"
        time.sleep(0.05)


def alive(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists()]


def pids():
    return {process.pid for process in multiprocessing.active_children()}


def test_workers_stay_over_epochs_and_follow_states_and_changes(url):
    """One start for: three epochs, a pass that is left, another step, a change of the batch."""
    want, loader = make(url, workers=0, decode_threads=0), make(url, workers=2)
    others = pids()  # of loaders that an exception of another test refers to
    list(want), list(loader)
    workers = pids() - others
    assert len(workers) == 2
    early = loader.state_dict()
    for _ in range(2):
        assert all(map(same, loader, list(want)))
    for batches in (loader, want):
        next(iter(batches))
    assert all(map(same, loader, list(want)))
    for _ in range(2):  # batches of the steps after are made, or on their way
        for batches in (loader, want):
            batches.load_state_dict(early)
        assert same(next(iter(loader)), next(iter(want)))
    for batches in (loader, want):
        batches.change(global_batch_size=8)
    assert all(map(same, loader, list(want)))
    assert loader.state_dict() == want.state_dict()
    assert pids() - others == workers
    begun = iter(loader)
    next(begun)
    del loader, batches
    assert pids() - others == workers  # the iterator has the loader
    del begun
    assert not pids() & workers
    assert alive(workers) == []


def test_the_next_epoch_is_made_ahead_across_the_border(shared):
    loader = shared
    for _ in loader:
        pass
    stats = loader.stats()
    crew = loader._crew
    assert crew.num_pending > 1
    while not crew._pending[0].is_ready():
        time.sleep(0.01)
    next(iter(loader))
    assert loader.stats().since(stats).ready >= 0
    assert loader.state_dict()["step"] == NUM // BATCH + 1


@pytest.mark.slow
def test_a_worker_that_is_killed_between_passes_is_named_and_replaced(url, undisturbed):
    others = pids()
    loader = make(url)
    assert all(map(same, loader, undisturbed))
    state = loader.state_dict()
    (victim,) = pids() - others
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(WorkerError) as caught:
        list(loader)  # one pass is more than what was ready
    assert caught.value.reason == "worker_died"
    assert not pids() - others
    loader.load_state_dict({**state, "step": 0})
    assert same(next(iter(loader)), undisturbed[0])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [{"workers": 1}, pytest.param({"workers": 0, "decode_threads": 2}, marks=pytest.mark.slow)],
)
def test_a_forked_child_takes_nothing_from_the_pass_of_its_parent(url, undisturbed, options):
    loader = make(url, **options)
    iterator = iter(loader)
    kept = [next(iterator)]
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # ends it where it hangs
        try:
            with pytest.raises(StateError) as caught:
                next(iterator)
            assert caught.value.reason == "stale_iterator"
            own = iter(loader)  # of workers of its own
            assert same(next(own), undisturbed[1])
            own.close()
            loader.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    kept += iterator
    assert all(map(same, kept, undisturbed))
    assert len(kept) == len(undisturbed)


def test_killed_worker_is_an_error_that_names_the_signal(shared):
    batches = iter(shared)
    next(batches)
    # Other tests of this process may have workers of their own.
    crew = {worker._process.pid for worker in shared._crew._workers}
    assert crew <= pids()
    os.kill(min(crew), signal.SIGKILL)
    with pytest.raises(WorkerError) as caught:
        for _ in batches:
            pass
    assert caught.value.reason == "worker_died"
    assert caught.value.facts == {"exit_code": -9, "signal": "SIGKILL"}
    assert not pids() & crew
