"""Waits that are too long show where everything is, and end as they would have."""

import threading
import time

import pytest

from loader import StreamingDataset, make_dataloader
from loader.delivery.watchdog import stacks, wait_watched, watched
from shardspec.errors import ConfigError


@pytest.mark.parametrize(("ready", "said"), [([True], 0), ([False, None], 1)])
def test_a_wait_is_told_of_once(ready, said, caplog):
    asked, left = [], list(ready)
    wait_watched(lambda timeout: asked.append(timeout) or left.pop(0), 5.0, ask=lambda: " (so)")
    assert asked == [5.0, None][: len(ready)]
    assert sum("a batch has been awaited for 5 s (so)" in text for text in caplog.messages) == said


def test_without_a_limit_nobody_waits_twice(caplog):
    wait_watched(lambda timeout: pytest.fail(str(timeout)), None)
    assert not caplog.messages


def test_stacks_name_each_thread_and_where_it_is():
    entered, ended = threading.Event(), threading.Event()

    def lost_in_thought():
        entered.set()
        ended.wait()

    thread = threading.Thread(target=lost_in_thought, name="thinker")
    thread.start()
    entered.wait()
    text = stacks()
    ended.set()
    thread.join()
    assert "Thread thinker:" in text
    assert "lost_in_thought" in text
    assert "test_stacks_name_each_thread" in text


def load(url, **options):
    dataset = StreamingDataset(url, rank=0, world_size=1)
    return make_dataloader(dataset, global_batch_size=2, sequence_length=512, **options)


@pytest.mark.parametrize("value", [0, -1, float("nan"), True, "600", 1e300])
def test_other_limits_are_refused(value, tiny_dataset):
    with pytest.raises(ConfigError, match="watchdog_s"):
        load(tiny_dataset, watchdog_s=value)


TOLD = []


def wait_until_told(example, rng):  # noqa: ARG001
    stop_s = time.monotonic() + 60
    while not any("awaited" in text for text in TOLD[-1].messages):
        assert time.monotonic() < stop_s
        time.sleep(0.01)
    return example


def sleep_in_worker(example, rng):  # noqa: ARG001
    time.sleep(1)
    return example


@pytest.mark.parametrize("decode_threads", [0, 1])
def test_a_function_that_hangs_is_shown(tiny_dataset, caplog, decode_threads):
    TOLD.append(caplog)
    options = {"map": wait_until_told, "decode_threads": decode_threads, "watchdog_s": 0.05}
    batches = iter(load(tiny_dataset, **options))
    batch = next(batches)
    batches.close()
    assert len(batch["input_ids"]) == 2
    assert any("wait_until_told" in text for text in caplog.messages)


def test_what_is_made_in_time_is_not_told_of(caplog):
    with watched(3600):
        timer = next(t for t in threading.enumerate() if isinstance(t, threading.Timer))
    timer.join()
    with watched(None):
        pass
    assert not caplog.messages


@pytest.mark.slow
def test_a_function_that_hangs_in_a_worker_process_is_shown(tiny_dataset, caplog, capfd):
    loader = load(tiny_dataset, map=sleep_in_worker, workers=1, watchdog_s=0.1)
    batches = iter(loader)
    next(batches)
    next(batches)
    batches.close()
    loader.close()
    assert any("(worker processes [" in text for text in caplog.messages)
    assert "in sleep_in_worker" in capfd.readouterr().err
