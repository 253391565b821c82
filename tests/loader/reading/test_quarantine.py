import copy
import gc
import pickle
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from loader import StreamingDataset, make_dataloader
from loader.reading.quarantine import MOST_RECORDS, Quarantine
from shardspec.errors import BudgetError, SampleError, ShardError
from shardspec.index import open_index, open_index_file
from shardspec.manifest import require_manifest
from tests.forks import goes_on_in_a_child


def record(sample, reason="sample_crc", stage="read"):
    place = {"sample": sample, "shard": "train/a.tar", "key": f"k{sample}"}
    return {**place, "stage": stage, "reason": reason}


def test_bad_samples_are_counted_by_reason_and_known_from_then_on():
    quarantine = Quarantine(max_rate=None)
    quarantine.add(record(3))
    quarantine.add(record(3))
    quarantine.add(record(5, "image_decode"))
    assert quarantine.counts == {"sample_crc": 2, "image_decode": 1}
    assert quarantine.record(3) == record(3)
    assert quarantine.record(4) is None


def test_a_layout_that_does_not_fit_is_tried_again_with_other_draws():
    quarantine = Quarantine(max_rate=None)
    quarantine.add(record(3, "too_long", stage="layout"))
    quarantine.restore([record(4, "too_long", stage="layout"), record(5)])
    assert quarantine.counts == {"too_long": 1}
    assert quarantine.record(3) is None
    assert quarantine.record(4) is None
    assert quarantine.record(5) == record(5)


def test_too_many_of_them_stop_the_run():
    quarantine = Quarantine(max_rate=0.01)
    for _ in range(2000):
        quarantine.asked()
    for i in range(20):
        quarantine.add(record(i))
    with pytest.raises(BudgetError) as caught:
        quarantine.add(record(20))
    assert caught.value.reason == "bad_rate"
    assert caught.value.facts["bad"] == 21
    assert caught.value.facts["samples"] == 2000


def test_no_rate_of_a_handful_of_samples_stops_a_run():
    quarantine = Quarantine(max_rate=0.01)
    for i in range(10):
        quarantine.asked()
        quarantine.add(record(i))


def test_records_are_bounded_and_counts_are_not():
    quarantine = Quarantine(max_rate=None)
    for i in range(MOST_RECORDS + 50):
        quarantine.add(record(i))
    assert quarantine.record(MOST_RECORDS) is None
    assert quarantine.counts["sample_crc"] == MOST_RECORDS + 50


def test_a_copy_in_another_process_knows_what_was_known():
    quarantine = Quarantine(max_rate=0.5)
    quarantine.add(record(3))
    other = pickle.loads(pickle.dumps(quarantine))
    other.add(record(4))
    assert other.record(3) == record(3)
    assert quarantine.record(4) is None


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_forked_while_a_thread_counts_continues_counting():
    quarantine = Quarantine(max_rate=None)
    assert goes_on_in_a_child(quarantine.asked, forked_under=quarantine._lock)


def test_none_is_kept_alive_for_the_sake_of_forks():
    quarantine = Quarantine(max_rate=None)
    kept = weakref.ref(quarantine)
    del quarantine
    gc.collect()
    assert kept() is None


@pytest.fixture
def broken(tiny_sample, write_dataset, tmp_path):
    """(URL, a function that repairs it): every fifth sample of 60 has a flipped byte."""
    url = write_dataset(tmp_path / "set", [tiny_sample(i) for i in range(60)], num_shards=2)
    good = {}
    for entry in require_manifest(url).shards:
        path = Path(url, entry.url)
        good[path] = path.read_bytes()
        rows = open_index(
            str(Path(url, entry.index_url)),
            num_samples=entry.nsamples,
            shard_bytes=entry.num_bytes,
        )
        payload = bytearray(good[path])
        for row in rows[::5]:
            payload[int(row["offset"]) + int(row["num_bytes"]) // 2] ^= 1
        path.write_bytes(payload)
    return url, lambda: [path.write_bytes(payload) for path, payload in good.items()]


def loader_of(url, *, workers=0, rank=0, world_size=1, **options):
    dataset = StreamingDataset(
        url,
        seed=4,
        check="crc",
        on_bad="substitute",
        rank=rank,
        world_size=world_size,
        **options,
    )
    return make_dataloader(
        dataset, global_batch_size=4, sequence_length=128, workers=workers, with_metadata=True
    )


def keys(batches):
    return [[m["key"] for m in batch["metadata"]] for batch in batches]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_loader_lists_what_was_substituted_and_where(broken, workers):
    url, _ = broken
    loader = loader_of(url, workers=workers)
    substituted = {}
    for step, batch in enumerate(loader):
        for metadata in batch["metadata"]:
            if "substitutes" in metadata:
                substituted.setdefault(metadata["substitutes"]["key"], step)
    assert len(substituted) == 12
    found = {r["key"]: r["step"] for r in loader.bad_samples if r["sample"] % 5 == 0}
    assert found == substituted
    first = loader.bad_samples[0]
    assert first["reason"] == "sample_crc"
    assert first["shard"] in {entry.url for entry in require_manifest(url).shards}


def test_ranks_stay_equal_where_samples_are_bad(broken):
    url, _ = broken
    whole = keys(loader_of(url))
    halves = [keys(loader_of(url, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_a_replay_substitutes_the_same_even_after_a_repair(broken):
    url, repair = broken
    loader = loader_of(url)
    for _ in loader:
        pass
    state = copy.deepcopy(loader.state_dict())
    assert len(state["bad"]) >= 12
    second_epoch = [batch["metadata"] for batch in loader]
    repair()
    replayed = loader_of(url)
    replayed.load_state_dict(state)
    # With the same records, which have the steps of this epoch.
    assert [batch["metadata"] for batch in replayed] == second_epoch
    assert replayed.bad_samples == loader.bad_samples
    second_epoch = [[m["key"] for m in metadata] for metadata in second_epoch]
    # Without the state's knowledge the repaired samples are back.
    del state["bad"]
    fresh = loader_of(url)
    fresh.load_state_dict(state)
    assert keys(fresh) != second_epoch


def test_a_run_stops_above_the_rate_that_is_allowed(broken):
    url, _ = broken
    assert len(keys(loader_of(url, max_bad_rate=0.03))) == 15
    with pytest.raises(BudgetError) as caught:
        keys(loader_of(url, max_bad_rate=0.003))
    assert caught.value.reason == "bad_rate"


def test_a_state_without_bad_samples_says_nothing_of_them(broken):
    url, repair = broken
    repair()
    loader = loader_of(url)
    keys(loader)
    assert "bad" not in loader.state_dict()


def test_a_slot_whose_substitutes_are_all_known_as_bad_raises(broken):
    url, repair = broken
    repair()
    dataset = StreamingDataset(url, on_bad="substitute")
    dataset._stream.restore_bad([record(i) for i in range(60)])
    with pytest.raises(ShardError) as caught:
        dataset.example(7)
    assert caught.value.reason == "all_substitutes_bad"
    assert caught.value.facts["first_reason"] == "sample_crc"
    assert "k7" in caught.value.where


def flipped(payload, *, at=-1):
    return payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 or len(payload) :]


DAMAGED_SHARD = {
    "tar is gone": (".tar", lambda payload: None, "shard_missing"),
    "tar is cut": (".tar", lambda payload: payload[:-1], "shard_size"),
    "index is gone": (".index.npy", lambda payload: None, "shard_missing"),
    "index is cut": (".index.npy", lambda payload: payload[:-1], "shard_size"),
    "index has another bit": (".index.npy", flipped, "index_sha256"),
    "index has another header": (".index.npy", lambda p: flipped(p, at=8), "index_sha256"),
}


@pytest.mark.parametrize("name", DAMAGED_SHARD)
@pytest.mark.parametrize("check", ["size", "crc"])
def test_a_damaged_shard_or_index_raises_and_is_never_substituted(
    name, check, tiny_sample, write_dataset, tmp_path
):
    url = write_dataset(tmp_path / "set", [tiny_sample(i) for i in range(20)], num_shards=4)
    suffix, damage, reason = DAMAGED_SHARD[name]
    path = sorted(Path(url, "train").glob(f"*{suffix}"))[1]
    payload = damage(path.read_bytes())
    path.unlink()
    if payload is not None:
        path.write_bytes(payload)
    dataset = StreamingDataset(url, check=check, on_bad="substitute")
    with pytest.raises(ShardError) as caught:
        list(dataset)
    assert caught.value.reason == reason
    assert not dataset.bad


@pytest.fixture
def twins(tiny_sample, write_dataset, tmp_path):
    """Two builds of the same samples with other tokens: files of equal names and lengths."""
    samples = [tiny_sample(i) for i in range(20)]
    others = [replace(sample, tokens=sample.tokens + 1) for sample in samples]
    urls = [
        write_dataset(tmp_path / name, made, num_shards=2)
        for name, made in (("ours", samples), ("theirs", others))
    ]
    return [sorted(Path(url, "train").iterdir()) for url in urls]


@pytest.mark.parametrize("on_bad", ["raise", "substitute"])
@pytest.mark.parametrize("check", ["size", "crc"])
def test_a_shard_and_its_index_of_another_build_are_noticed(check, on_bad, twins):
    ours, theirs = twins
    assert [p.stat().st_size for p in ours] == [p.stat().st_size for p in theirs]
    for path, other in list(zip(ours, theirs, strict=True))[:2]:
        path.write_bytes(other.read_bytes())
    dataset = StreamingDataset(str(ours[0].parents[1]), check=check, on_bad=on_bad)
    with pytest.raises(ShardError) as caught:
        list(dataset)
    assert caught.value.reason == "index_sha256"


@pytest.mark.parametrize(
    "on_bad, reason", [("raise", "sample_crc"), ("substitute", "shard_damaged")]
)
def test_a_tar_of_another_build_is_noticed_by_its_checksums(on_bad, reason, twins):
    ours, theirs = twins
    [path] = [p for p in ours if p.name.endswith("00000-of-00002.tar")]
    path.write_bytes(theirs[ours.index(path)].read_bytes())
    with pytest.raises(ShardError) as caught:
        list(StreamingDataset(str(path.parents[1]), on_bad=on_bad))
    assert caught.value.reason == reason


def test_an_index_that_is_opened_again_is_hashed_again_only_after_a_change(twins, monkeypatch):
    ours, theirs = twins
    [index] = [p for p in ours if p.name.endswith("00000-of-00002.index.npy")]
    url = str(index.parents[1])
    reader = StreamingDataset(url).reader
    hashed = []
    monkeypatch.setattr(
        "loader.reading.local.open_index_file",
        lambda path, *, sha256, **rest: hashed.append(sha256) or open_index_file(path, **rest),
    )
    for _ in range(3):
        reader.stored(0)
        reader._open.clear()
    assert [bool(sha256) for sha256 in hashed] == [True, False, False]
    index.write_bytes(theirs[ours.index(index)].read_bytes())
    with pytest.raises(ShardError):  # of the sample: the index is not really hashed here
        reader.stored(0)
    assert hashed[-1] == require_manifest(url).shards[0].index_sha256


def test_a_sequence_that_fits_nothing_is_not_answered_with_the_setting_in_use(broken):
    url, repair = broken
    repair()
    dataset = StreamingDataset(url, on_bad="substitute")
    loader = make_dataloader(dataset, global_batch_size=4, sequence_length=2)
    with pytest.raises(SampleError) as caught:
        list(loader)
    assert caught.value.reason == "all_substitutes_bad"
    assert caught.value.facts["first_reason"] in ("no_loss", "image_cut")
    assert caught.value.__cause__.reason == caught.value.facts["first_reason"]
    assert "on_bad" not in str(caught.value)
