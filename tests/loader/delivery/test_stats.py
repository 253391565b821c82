import json
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from loader import StreamingDataset, make_dataloader
from loader.delivery.stats import STAGES, StageTimings, Stats
from shardspec.manifest import require_manifest

NUM, BATCH = 24, 4


@pytest.fixture(scope="module")
def url(tiny_sample, write_dataset, tmp_path_factory):
    samples = [tiny_sample(i) for i in range(NUM)]
    return write_dataset(tmp_path_factory.mktemp("stats") / "set", samples)


def make(url, **options):
    dataset = StreamingDataset(url, rank=0, world_size=1)
    return make_dataloader(dataset, global_batch_size=BATCH, sequence_length=64, **options)


def timings(**seconds):
    return StageTimings(
        batches=10, samples=320, **{f"{stage}_s": s for stage, s in seconds.items()}
    )


@pytest.mark.parametrize("options", [{"decode_threads": 0}, {"decode_threads": 2}, {"workers": 1}])
def test_account_holds_what_was_delivered(options, url):
    loader = make(url, **options)
    tensor_bytes = 0
    for batch in loader:
        tensor_bytes += sum(tensor.nbytes for tensor in batch.values())
        time.sleep(0.002)
    stats = loader.stats()
    assert (stats.timings.batches, stats.timings.samples) == (NUM // BATCH, NUM)
    assert stats.timings.batch_bytes == tensor_bytes
    assert stats.timings.read_bytes == loader.dataset.manifest.shards[0].num_bytes - 1024
    for stage in ("read", "layout", "decode", "collate"):
        assert getattr(stats.timings, f"{stage}_s") > 0, stage
    assert stats.use_s > NUM // BATCH * 0.002
    assert stats.wait_s > 0
    assert 0 < stats.wait_share < 1


def test_account_continues_and_earlier_ones_can_be_taken_off(url):
    loader = make(url)
    assert loader.stats().verdict == "nothing delivered yet"
    list(loader)
    first = loader.stats()
    list(loader)
    second = loader.stats().since(first)
    assert first.timings.samples == second.timings.samples == NUM
    assert loader.stats().timings.samples == 2 * NUM
    assert second.wait_s == pytest.approx(loader.stats().wait_s - first.wait_s)


@pytest.mark.parametrize("stage", STAGES)
def test_busiest_stage_is_named_where_the_consumer_waits(stage):
    seconds = {name: 0.1 for name in STAGES} | {stage: 1.5}
    stats = Stats(timings=timings(**seconds), workers=2, wait_s=0.9, use_s=0.1)
    assert stats.bottleneck == stage
    assert stats.verdict.startswith(f"{stage}-bound: 2 threads busy 95%, the consumer waits 90%")


def test_consumer_that_hardly_waits_is_served_well():
    stats = Stats(timings=timings(decode=1.0), workers=2, wait_s=0.01, use_s=0.99)
    assert stats.bottleneck == "none"
    assert stats.verdict == "keeps up: the consumer waits 1% of its time"


def test_planning_runs_in_one_thread_alone():
    stats = Stats(timings=timings(decode=1.0), workers=4, plan_s=0.5, wait_s=0.9, use_s=0.1)
    assert stats.bottleneck == "plan"


def test_workers_that_are_kept_from_working_are_not_called_slow():
    stats = Stats(timings=timings(decode=0.3), workers=2, wait_s=0.9, use_s=0.1)
    assert stats.verdict.startswith("starved: 2 threads busy 15% while the consumer waits 90%")


def test_line_and_numbers_are_ready_for_bars_and_loggers(url):
    stats = Stats(timings=timings(decode=1.6), workers=2, wait_s=0.8, use_s=0.2, ready=5)
    assert stats.line() == "320 samples/s, wait 80%, busy 80%, ready 0.5, decode"
    flat = stats.to_dict()
    assert json.loads(json.dumps(flat)) == flat
    assert (flat["decode_s"], flat["wait_share"], flat["mean_ready"]) == (1.6, 0.8, 0.5)


def test_verdict_says_what_the_workers_are():
    stats = Stats(timings=timings(decode=1.0), worker_kind="worker process", wait_s=0.9, use_s=0.1)
    assert "decode-bound: 1 worker process busy 100%" in stats.verdict
    stats.workers = 2
    assert "decode-bound: 2 worker processes busy 50%" in stats.verdict


@pytest.mark.parametrize("options", [{"decode_threads": 2}, {"workers": 1}])
def test_logger_hears_of_every_so_many_steps(options, url):
    loader = make(url, **options)
    heard = []
    loader.watch(lambda step, stats: heard.append((step, stats.timings.samples)), every_steps=2)
    steps = [len(heard) for _ in loader]
    assert heard == [(2, 2 * BATCH), (4, 2 * BATCH), (6, 2 * BATCH)]
    assert steps == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    "options", [{"decode_threads": 0}, {"decode_threads": 2}, {"pack": True, "max_crops": 2}]
)
def test_logger_that_fails_loses_no_batch(options, url):
    want = [batch["input_ids"].tolist() for batch in make(url, **options)]
    assert len(want) > 2
    loader = make(url, **options)

    def fail(step, stats):
        raise OSError(f"no space left for step {step}")

    loader.watch(fail, every_steps=2)
    got, states = [], []

    def take(batch):
        got.append(batch["input_ids"].tolist())
        states.append(loader.state_dict())

    with pytest.raises(OSError, match="step 2"):
        list(map(take, loader))
    assert [loader.state_dict()] == states
    got.append(next(iter(loader))["input_ids"].tolist())
    assert got == want[:2]


def counts(stats):
    """What does not depend on time."""
    names = ("batches", "samples", "read_bytes", "batch_bytes")
    return [getattr(stats.timings, name) for name in names], dict(stats.counters)


@pytest.mark.parametrize("options", [{"decode_threads": 0}, {"decode_threads": 2}, {"workers": 1}])
def test_batch_that_a_failing_logger_held_back_counts_once(options, url):
    def make_counting():
        loader = make(url, **options)
        made = loader._batches_of

        def with_counters(*planned):
            for each, ready in made(*planned):
                yield replace(each, counters={"requests": 1}), ready

        loader._batches_of = with_counters
        return loader

    plain = make_counting()
    want = []
    for _ in plain:
        want.append(plain.stats())
    loader, heard = make_counting(), []

    def fail_first(step, stats):
        heard.append((step, stats.timings.batches))
        if len(heard) == 1:
            raise OSError("no space left")

    loader.watch(fail_first, every_steps=2)
    batches = iter(loader)
    next(batches)
    first = loader.stats()
    with pytest.raises(OSError, match="no space left"):
        next(batches)
    assert counts(loader.stats()) == counts(want[0])
    assert loader.stats().wait_s == first.wait_s
    list(loader)
    assert counts(loader.stats()) == counts(want[-1])
    # It was told of that batch already, and hears of the ones behind it.
    assert heard == [(2, 2), (4, 2), (6, 2)]


@pytest.mark.slow
def test_samples_of_a_batch_that_a_failing_logger_held_back_are_listed_once(
    tiny_sample, write_dataset, tmp_path
):
    url = write_dataset(tmp_path / "set", [tiny_sample(i) for i in range(NUM)])
    path = Path(url, require_manifest(url).shards[0].url)
    payload = bytearray(path.read_bytes())
    payload[5000] ^= 1
    path.write_bytes(payload)

    def make_broken():
        dataset = StreamingDataset(url, check="crc", on_bad="substitute", rank=0, world_size=1)
        return make_dataloader(dataset, global_batch_size=BATCH, sequence_length=64)

    plain = make_broken()
    list(plain)
    assert plain.bad_samples
    assert plain.stats().to_dict()["substituted"] == len(plain.bad_samples)
    loader = make_broken()
    failures = []

    def fail(step, stats):
        if step not in failures:
            failures.append(step)
            raise OSError("no space left")

    loader.watch(fail, every_steps=1)
    while loader.epoch == 0:
        with suppress(OSError):
            list(loader)
    assert failures == list(range(1, NUM // BATCH + 1))
    assert loader.bad_samples == plain.bad_samples
