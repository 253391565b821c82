"""Global batches are equal for any ranks, threads, workers and resumes: of real loaders."""

import itertools
import json
import time
from collections import Counter

import pytest
import torch

from loader.assembly.view import View
from loader.dataloader import make_dataloader
from loader.delivery.workers import _Worker
from loader.mixture_stream import IterableDatasetMixture
from loader.stream import StreamingDataset, stored_view
from shardspec.manifest import require_manifest

BATCH = 48
SIZES = {"large": 290, "middle": 61, "small": 5}
"""Samples; with 48 per step two epochs of the large one take 13 steps."""
STEPS = 13
WORLDS = (1, 2, 3, 4, 6, 8, 12, 24, 48)
THREADS = (0, 1, 2, 3, 5, 8)
KINDS = ("one", "mixture", "packed", "packed mixture", "buckets")


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Tiny pictures are not worth torch's threads, which wait for each other on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True, scope="module")
def short_word():
    """A mixture's word of 3,072 slots: built in 2 ms instead of 100, for hundreds of loaders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
        yield


@pytest.fixture(scope="module")
def urls(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    found = {}
    for number, (name, size) in enumerate(SIZES.items()):
        samples = [tiny_sample(1000 * number + i, num_images=0) for i in range(size)]
        # Uneven: shards of 41 and 42 samples, of 20 and 21, and of 2 and 3.
        shards = {"large": 7, "middle": 3, "small": 2}[name]
        found[name] = write_dataset(folder / name, samples, num_shards=shards, name=name)
    return found


def make(urls, kind, *, rank=0, world_size=1, balance=False, **options):
    def dataset(name):
        view = View(image=stored_view(require_manifest(urls[name])))
        return StreamingDataset(
            urls[name],
            seed=3,
            view=view,
            rank=rank,
            world_size=world_size,
            canonical_ranks=canonical_ranks,
        )

    # Fewer streams than ranks are allowed, and quicker to plan.
    canonical_ranks = 12 if "packed" in kind else None
    if "mixture" in kind:
        # A pass of all three: the order is the same for ever, its name for the state as well.
        whole = IterableDatasetMixture(
            [dataset(name) for name in SIZES],
            seed=3,
            by="root_size",
            stop=STEPS // 2,
            canonical_ranks=canonical_ranks,
        )
    else:
        whole = dataset("large")
    if "packed" in kind:
        options = {"pack": True, "balance": balance, **options}
    elif kind == "buckets":
        options = {"bucket_steps": 4, **options}
    return make_dataloader(
        whole,
        global_batch_size=BATCH,
        sequence_length=64,
        pad_mode="max_len",
        extra_keys=("position_ids", "subsegment_ids", "loss_weights"),
        with_metadata=True,
        **options,
    )


def rows(batch):
    """Gives every row of a batch in a form that can be compared."""
    tensors = {k: v for k, v in sorted(batch.items()) if isinstance(v, torch.Tensor)}
    return [
        (entry["key"], *(v[row].contiguous().numpy().tobytes() for v in tensors.values()))
        for row, entry in enumerate(batch["metadata"])
    ]


def take(loader, count):
    batches = []
    while len(batches) < count:
        batches += itertools.islice(loader, count - len(batches))
    return [rows(batch) for batch in batches]


def run(urls, kind, *, world_size, count, state=None, **options):
    """Gives global batches, joined from all ranks, and the state of rank 0 behind them."""
    parts, states = [], []
    for rank in range(world_size):
        loader = make(urls, kind, rank=rank, world_size=world_size, **options)
        if state is not None:
            loader.load_state_dict(state)
        parts.append(take(loader, count))
        states.append(json.loads(json.dumps(loader.state_dict())))
    joined = [[row for part in step for row in part] for step in zip(*parts, strict=True)]
    return joined, states


@pytest.fixture(scope="module")
def undisturbed(urls):
    """The global batches of one rank and one thread, without a stop, by kinds."""

    class Runs(dict):
        def __missing__(self, kind):
            found = run(urls, kind, world_size=1, count=STEPS + 6, decode_threads=1)
            return self.setdefault(kind, found[0])

    return Runs()


EVERYDAY = [
    pytest.param(kind, marks=() if kind in ("one", "buckets") else pytest.mark.slow)
    for kind in KINDS
]
"""Packs take most of the time; the everyday suite tests their states elsewhere."""


@pytest.mark.parametrize(
    "kind, worlds",
    [
        *(pytest.param(k, WORLDS, marks=pytest.mark.slow) for k in KINDS if k != "one"),
        ("one", WORLDS),
        ("packed mixture", (1, 3, 8)),
    ],
)
def test_every_number_of_ranks_gives_the_same_global_batches(kind, worlds, urls, undisturbed):
    for i, world_size in enumerate(worlds):
        got, states = run(
            urls, kind, world_size=world_size, count=3, decode_threads=THREADS[i % len(THREADS)]
        )
        assert got == undisturbed[kind][:3], world_size
        if kind != "packed mixture":
            assert all(state == states[0] for state in states)


@pytest.mark.parametrize("kind", EVERYDAY)
def test_every_step_of_two_epochs_is_a_place_to_resume_from_on_other_ranks(kind, urls, undisturbed):
    pairs = itertools.cycle(itertools.product(THREADS, (1, 2, 3, 4)))
    for stop in range(STEPS + 1):
        (threads, before), (_, between), (_, after) = (next(pairs) for _ in range(3))
        state = None
        if stop:
            options = {"world_size": before, "decode_threads": threads}
            _, states = run(urls, kind, count=stop, **options)
            state = states[0]  # rank 0's is enough
        got, states = run(urls, kind, world_size=between, count=2, state=state)
        assert got == undisturbed[kind][stop : stop + 2], (stop, between)
        got, _ = run(urls, kind, world_size=after, count=2, state=states[0])
        assert got == undisturbed[kind][stop + 2 : stop + 4], (stop, after)


@pytest.mark.parametrize("kind", ["packed", "packed mixture"])
def test_balancing_moves_packs_between_ranks_but_never_between_batches(kind, urls, undisturbed):
    state = None
    for start, world_size in ((0, 2), (3, 6), (6, 1), (9, 4)):
        got, states = run(
            urls, kind, world_size=world_size, count=3, state=state, balance=world_size > 1
        )
        want = undisturbed[kind][start : start + 3]
        assert [sorted(batch) for batch in got] == [sorted(batch) for batch in want]
        # Of endless streams, too, every rank has planned all: every state is the whole state.
        assert all(state == states[0] for state in states)
        state = states[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_every_rank_count_resumes_at_every_step_of_all_others(kind, world_size, urls, undisturbed):
    """Every step is a resume, from the state of a run that was resumed itself at the step before.

    It goes back and forth between this number of ranks and each other one, with other threads.
    """
    others, threads = itertools.cycle(WORLDS), itertools.cycle(THREADS)
    state = None
    for step in range(STEPS + 5):
        ranks = next(others) if step % 2 else world_size
        got, states = run(
            urls, kind, world_size=ranks, count=1, state=state, decode_threads=next(threads)
        )
        assert got == undisturbed[kind][step : step + 1], (step, ranks)
        state = states[0]


class StandingWorker(_Worker):
    """A worker process that goes to the next loader instead of ending with the pass."""

    def __init__(self, maker, *, keep_bytes, idle):
        super().__init__(maker, keep_bytes=keep_bytes)
        self.pending, self.idle = 0, idle

    def request(self, task, *, turn):
        self.pending += 1
        super().request(task, turn=turn)

    def answer(self):
        self.pending -= 1
        return super().answer()

    def hang_up(self):
        while self.pending:  # batches that were made ahead, and that nobody takes
            self.answer()

    def close(self, *, stop_s):
        self.idle.append(self)

    def end(self):
        super().hang_up()
        super().close(stop_s=time.monotonic() + 10)


@pytest.fixture
def standing_workers(monkeypatch):
    """Lets loaders of one kind, of any rank, take over each other's worker processes."""
    idle = []

    def hire(maker, *, keep_bytes):
        if idle:
            return idle.pop()
        return StandingWorker(maker, keep_bytes=keep_bytes, idle=idle)

    monkeypatch.setattr("loader.delivery.workers._Worker", hire)
    yield idle
    for worker in idle:
        worker.end()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("crew", ["decode_threads", "workers"])
@pytest.mark.parametrize("kind", ["one", "mixture", "packed"])
def test_all_numbers_of_ranks_and_threads_or_workers_resume_at_every_step(
    kind, crew, urls, undisturbed, standing_workers
):
    """The product of WORLDS and THREADS, threads or processes, at every step of two epochs.

    A state was saved one step behind a resume, while other batches were made ahead, and is the same
    for all numbers of threads or workers. Up to 4 ranks all have the same number of these, and all
    numbers in turn; from 6 ranks on all numbers stand side by side, dealt anew at each step. Packs
    take longest: 2 to 4 ranks have other numbers at each step, and each number every few steps.

    What is real: the loaders of all ranks, their states, and eight processes that make what these
    plan, with their pipes and shared memory. What is not: ranks take turns in this process. A
    rank's loader is made once for all states, and its number of threads or workers is set on it;
    the tests above make loaders anew. And worker processes do not end with a loader, as starting
    them would take an hour: the next one continues with them, also another rank's.
    `test_worker_processes_of_any_number_give_the_same_batches` starts and ends them.
    """
    numbers = THREADS if crew == "decode_threads" else THREADS[1:]
    for world_size in WORLDS:
        loaders = [make(urls, kind, rank=r, world_size=world_size) for r in range(world_size)]
        state = loaders[0].state_dict()
        # Worker k makes batch k of those that are taken here.
        count = max(numbers) if world_size == 1 else 2
        for step in range(STEPS + 1):
            turns = [(number,) for number in numbers]
            if world_size >= len(numbers) or (kind == "packed" and world_size > 1):
                turns = [numbers[step % len(numbers) :] + numbers[: step % len(numbers)]]
            want = undisturbed[kind][step : step + min(count, STEPS + 6 - step)]
            saved = []
            for turn in turns:
                parts = []
                for loader, number in zip(loaders, itertools.cycle(turn), strict=False):
                    loader._decode_threads = loader._workers = 0
                    setattr(loader, f"_{crew}", number)
                    loader.load_state_dict(state)
                    parts.append([])
                    while len(parts[-1]) < len(want):
                        for batch in itertools.islice(loader, len(want) - len(parts[-1])):
                            parts[-1].append(rows(batch))
                            if loader is loaders[0] and len(parts[-1]) == 1:
                                saved.append(json.loads(json.dumps(loader.state_dict())))
                    loader.close()
                steps = zip(*parts, strict=True)
                got = [[row for part in batches for row in part] for batches in steps]
                assert got == want, (world_size, step, turn)
            assert all(one == saved[0] for one in saved)
            state = saved[0]
    assert len(standing_workers) == (max(numbers) if crew == "workers" else 0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_worker_processes_of_any_number_give_the_same_batches(kind, urls, undisturbed):
    state = None
    for i, workers in enumerate((1, 2, 3, 5, 8)):
        got, states = run(urls, kind, world_size=1, count=3, state=state, workers=workers)
        assert got == undisturbed[kind][3 * i : 3 * i + 3], workers
        state = states[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("kind", ["mixture", "packed"])
def test_ranks_with_worker_processes_continue_from_a_run_with_threads(kind, urls, undisturbed):
    _, states = run(urls, kind, world_size=1, count=4, decode_threads=3)
    got, states = run(urls, kind, world_size=3, count=3, state=states[0], workers=2)
    assert got == undisturbed[kind][4:7]
    got, _ = run(urls, kind, world_size=2, count=3, state=states[0], decode_threads=5)
    assert got == undisturbed[kind][7:10]


@pytest.mark.parametrize("kind", ["one", "buckets", "packed"])
def test_every_sample_comes_once_per_epoch(kind, undisturbed):
    keys = [key for batch in undisturbed[kind] for row in batch for key in row[0].split("+")]
    counts = Counter(keys)
    assert len(counts) == SIZES["large"]
    assert set(counts.values()) <= {len(keys) // SIZES["large"], -(-len(keys) // SIZES["large"])}
