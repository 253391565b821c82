"""Subsets: the samples that a filter keeps, in exact epochs, for any ranks and resumes."""

import itertools
import json
import logging
import pickle
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from loader import IterableDatasetMixture, RawDataset, StreamingDataset, View, make_dataloader
from loader.assembly.augment import Augment
from loader.reading import Network, ShardReader
from loader.stream import stored_view
from preprocess.exchange.foreign import ImportSettings, import_tars
from preprocess.reshard import ReshardSettings, plan_reshard, reshard
from shardspec.errors import ConfigError, StateError
from shardspec.manifest import require_manifest
from tests.inline import Quiet

NUM = 47
WHERE = "num_tokens > 5 and num_images < 2"
"""Keeps 27 of the 47 samples."""
BATCH = 6

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def samples(tiny_sample):
    return [tiny_sample(i, num_images=i % 3) for i in range(NUM)]


@pytest.fixture(scope="module")
def url(samples, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("subset") / "set"
    return write_dataset(folder, samples, num_shards=3, several=True)


@pytest.fixture(scope="module")
def kept(url):
    """Keys of the samples that `WHERE` keeps, from the indexes alone."""
    reader = ShardReader(url, require_manifest(url), split="train")
    columns = reader.columns(["num_tokens", "num_images", "key"], np.arange(NUM))
    chosen = (columns["num_tokens"] > 5) & (columns["num_images"] < 2)
    keys = [key.decode() for key in columns["key"][chosen].tolist()]
    assert 2 * BATCH < len(keys) < NUM - BATCH
    return keys


def make(url, *, loader=None, **options):
    view = View(image=stored_view(require_manifest(url)), augment=Augment.standard())
    dataset = StreamingDataset(url, **{"seed": 3, "view": view, "where": WHERE, **options})
    return load(dataset, **(loader or {}))


def load(dataset, **options):
    return make_dataloader(
        dataset,
        **{"global_batch_size": BATCH, "sequence_length": 64, "pad_mode": "max_len", **options},
        with_metadata=True,
    )


def rows(batch):
    """Gives every row of a batch in a form that can be compared, without the padding of crops."""
    found = []
    for row, entry in enumerate(batch["metadata"]):
        crops = batch["image_input_idx"][row] >= 0
        texts = (batch["input_ids"][row], batch["labels"][row])
        arrays = (*texts, *(batch[name][row][crops] for name in ("images", "image_masks")))
        found.append((entry["key"], *(v.contiguous().numpy().tobytes() for v in arrays)))
    return found


def take(loader, count):
    batches = []
    while len(batches) < count:
        batches += itertools.islice(loader, count - len(batches))
    return [rows(batch) for batch in batches]


def take_all(loaders, count):
    """Takes global batches of the loaders of all ranks."""
    parts = [take(loader, count) for loader in loaders]
    return [[row for part in step for row in part] for step in zip(*parts, strict=True)]


def keys_of(batches):
    return [row[0] for batch in batches for row in batch]


def saved(loader):
    return json.loads(json.dumps(loader.state_dict()))


@pytest.mark.parametrize("tail", ["wrap", "drop_last", "pad"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_pass_shows_the_chosen_samples_once(world_size, tail, url, kept):
    loaders = [make(url, rank=r, world_size=world_size, tail=tail) for r in range(world_size)]
    assert {len(loader) for loader in loaders} == {len(loaders[0])}
    assert loaders[0].dataset.num_samples == len(kept)
    if tail == "wrap":
        shown = keys_of(take_all(loaders, 23))  # five epochs
        for epoch in range(5):
            assert sorted(shown[epoch * len(kept) : (epoch + 1) * len(kept)]) == kept
        return
    for _ in range(3):
        shown = keys_of(take_all(loaders, len(loaders[0])))
        if tail == "drop_last":
            assert len({*shown}) == len(shown) == len(kept) // BATCH * BATCH
            assert {*shown} <= {*kept}
        else:
            # Rows that fill the last batch have no key.
            assert sorted(key for key in shown if key is not None) == kept


@pytest.mark.parametrize("options", [{}, {"bucket_steps": 3}], ids=["rows", "buckets"])
def test_resume_at_every_step_with_another_number_of_ranks(options, url):
    want = take(make(url, loader=options), 9)
    for step in range(8):
        first = [make(url, rank=r, world_size=2, loader=options) for r in range(2)]
        assert take_all(first, step) == want[:step]
        state = saved(first[1])
        for world_size in (1, 3):
            loaders = [
                make(url, rank=r, world_size=world_size, loader=options) for r in range(world_size)
            ]
            for loader in loaders:
                loader.load_state_dict(state)
            assert take_all(loaders, 9 - step) == want[step:]


def test_packs_show_the_chosen_samples_once_per_epoch_and_resume(url):
    def loaders(world_size):
        options = {"pack": True, "balance": False, "global_batch_size": 6}
        ranks = [{"rank": r, "world_size": world_size} for r in range(world_size)]
        return [make(url, loader=options, **rank) for rank in ranks]

    (loader,) = loaders(1)
    ids = loader.dataset._stream.parts[0].data.subset.ids.tolist()
    shown = [ref for step in range(6) for row in loader.places(step) for ref in row]
    for epoch in range(3):
        assert sorted(ref.sample for ref in shown if ref.epoch == epoch) == ids
    tokens = loader.dataset.reader.column("view_length", np.array(ids))[:, 0]
    zero = np.zeros(len(ids), np.int64)
    assert loader._lengths(zero, np.arange(len(ids)))[0].tolist() == tokens.tolist()
    want = keys_of(take(loader, 6))
    for step in range(6):
        first = loaders(2)
        begun = keys_of(take_all(first, step))
        resumed = loaders(3)
        for one in resumed:
            one.load_state_dict(saved(first[0]))
        assert begun + keys_of(take_all(resumed, 6 - step)) == want


def test_a_subset_is_what_the_filter_keeps_in_the_same_order(url, kept, tmp_path):
    out = str(tmp_path / "out")
    settings = ReshardSettings(sources=(url,), out=out, where=WHERE, form="view")
    reshard(plan_reshard(settings, Quiet()), Quiet())
    filtered = StreamingDataset(
        str(tmp_path / "out"), shuffle=False, tail="drop_last", batch_size=1
    )
    subset = StreamingDataset(url, where=WHERE, shuffle=False, tail="drop_last", batch_size=1)
    stored = [[e["metadata"]["key"] for e in dataset] for dataset in (filtered, subset)]
    assert stored == [kept, kept]
    shuffled = [keys_of(take(make(u, where=w), 12)) for u, w in ((out, None), (url, WHERE))]
    assert shuffled[0] == shuffled[1]


def test_a_sample_is_drawn_in_a_subset_as_in_the_whole(url, kept):
    whole, subset = make(url, where=None), make(url)
    for batch in take(subset, 7):
        assert {row[0] for row in batch} <= {*kept}
    drawn = {row for batch in take(whole, 8) for row in batch}
    assert {row for batch in take(make(url), 3) for row in batch[:]} <= drawn
    for number in range(NUM):
        one, other = (loader.dataset.example(number, epoch=2) for loader in (whole, subset))
        assert one["input_ids"].tobytes() == other["input_ids"].tobytes()
        assert one["images"].tobytes() == other["images"].tobytes()


def test_keys_come_from_an_iterable_or_a_file_and_combine_with_a_condition(
    url, kept, tmp_path, caplog
):
    path = tmp_path / "keys.txt"
    wanted = [*kept[::2], "sample-0002", "sample-9999"]
    path.write_text("\r\n".join(wanted) + "\n")
    with caplog.at_level(logging.WARNING):
        prints = [
            make(url, keys=keys).dataset.fingerprint() for keys in (iter(wanted), str(path), path)
        ]
    assert prints[0] == prints[1] == prints[2]
    assert prints[0]["num_samples"] == len(kept[::2])  # 0002 does not fulfil the condition
    assert f"1 of {len(wanted)} keys belong to no sample" in caplog.text
    alone = make(url, where=None, keys=wanted[:-1], loader={"global_batch_size": 1})
    assert {*keys_of(take(alone, alone.dataset.num_samples))} == {*wanted[:-1]}


def refused(url, **options):
    with pytest.raises(ConfigError) as caught:
        StreamingDataset(url, **options)
    return caught.value


def test_what_selects_nothing_or_cannot_be_read_is_refused_by_name(url, tmp_path):
    error = refused(url, where="num_tokens > 5 and num_tokns > 9")
    assert error.reason == "filter_expression"
    assert "did you mean 'num_tokens'?" in str(error)
    assert refused(url, where="num_tokens").reason == "filter_expression"
    assert refused(url, where=" ").reason == "filter_expression"
    error = refused(url, where="num_tokens > 999999", keys=["a"])
    assert error.reason == "empty_result"
    assert "where='num_tokens > 999999', keys= with 1 key" in str(error)
    assert refused(url, keys=[]).reason == "empty_result"
    assert refused(url, keys=str(tmp_path / "none")).reason == "keys_file"
    assert refused(url, keys=[b"sample-0001"]).reason == "keys_type"


def test_a_condition_without_columns_or_without_text_keeps_every_sample(url):
    assert StreamingDataset(url, where="1 < 2").num_samples == NUM
    assert "subset" not in StreamingDataset(url, where="").fingerprint()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"where": None}, "state.data.subset"),
        ({"where": "num_tokens > 7 and num_images < 2"}, "state.data.subset.ids"),
        ({"keys": ["sample-0001", "sample-0003", "sample-0004"]}, "state.data.subset.ids"),
    ],
)
def test_a_state_of_another_subset_is_refused_field_by_field(options, field, url):
    states = saved(make(url)), saved(make(url, **options))
    for state, other in zip(states, (options, {}), strict=True):
        for allow in ((), ("appended",), ("order",), ("appended", "order")):
            with pytest.raises(StateError) as caught:
                make(url, **other).load_state_dict(state, allow=allow)
            assert caught.value.reason == "state_mismatch"
            assert field in caught.value.facts["differences"]


def test_a_subset_of_fewer_samples_is_another_one_as_its_draws_differ(url):
    """The last sample is not chosen, so both hold the same ids."""
    whole = saved(make(url, where="num_images < 1", max_samples=NUM))
    fewer = make(url, where="num_images < 1", max_samples=NUM - 1)
    assert fewer.state_dict()["data"]["subset"]["ids"] == whole["data"]["subset"]["ids"]
    for allow in ((), ("appended",), ("order",)):
        with pytest.raises(StateError) as caught:
            fewer.load_state_dict(whole, allow=allow)
        assert caught.value.reason == "state_mismatch"
        assert "state.data.subset.of: 47 here, 46 asked" in caught.value.facts["differences"]


def test_subsets_of_equal_size_are_told_apart_by_every_id(url, kept, monkeypatch):
    monkeypatch.setattr("loader.state.fingerprint._MOST_KEYS", 1)
    others = [key for key in (f"sample-{i:04d}" for i in range(NUM)) if key not in kept]
    one, other = (
        make(url, where=None, keys=[*kept[:-1], key]).dataset.fingerprint()
        for key in (kept[-1], others[-1])
    )
    assert one["keys"] == other["keys"]
    assert one != other


def test_appended_samples_join_a_subset_on_request_and_max_samples_leaves_them_out(
    url, kept, samples, tiny_sample, write_dataset, tmp_path
):
    more = [tiny_sample(NUM + i, num_images=0) for i in range(20)]
    grown = write_dataset(tmp_path / "set", [*samples, *more], num_shards=4, several=True)
    want, first = take(make(url), 9), make(url)
    shown = take(first, 2)
    state = saved(first)
    with pytest.raises(StateError) as caught:
        make(grown).load_state_dict(state)
    assert caught.value.reason == "state_appended"
    assert caught.value.facts == {"then": NUM, "now": NUM + 20}
    resumed = make(grown, max_samples=NUM)
    resumed.load_state_dict(state)
    assert take(resumed, 7) == want[2:]

    resumed = make(grown)
    now = resumed.dataset.num_samples
    assert now > len(kept)
    resumed.load_state_dict(state, allow=("appended",))
    shown += take(resumed, 14)
    flat = keys_of(shown)
    assert sorted(flat[: len(kept)]) == kept
    assert len({*flat[len(kept) : len(kept) + now]}) == now

    for other in ("num_tokens > 7 and num_images < 2", None):
        with pytest.raises(StateError) as caught:
            make(grown, where=other).load_state_dict(state, allow=("appended",))
        assert caught.value.reason == "state_mismatch"


def test_appended_samples_outside_the_subset_change_nothing_but_the_draws(
    url, samples, tiny_sample, write_dataset, tmp_path
):
    more = [tiny_sample(NUM + i, num_images=2) for i in range(4)]
    grown = write_dataset(tmp_path / "set", [*samples, *more], num_shards=2, several=True)
    want, first = keys_of(take(make(url), 9)), make(url)
    take(first, 2)
    resumed = make(grown)
    with pytest.raises(StateError) as caught:
        resumed.load_state_dict(saved(first))
    assert caught.value.reason == "state_appended"
    resumed.load_state_dict(saved(first), allow=("appended",))
    assert keys_of(take(resumed, 7)) == want[2 * BATCH :]


def test_substitutes_come_from_the_subset(samples, kept, write_dataset, tmp_path):
    url = write_dataset(tmp_path / "set", samples, num_shards=1, several=True)
    (tar,) = Path(url).glob("train/*.tar")
    subset = StreamingDataset(url, where=WHERE)._stream.parts[0].data.subset.ids.tolist()
    reader = StreamingDataset(url).reader
    payload = bytearray(tar.read_bytes())
    for number in subset[::2]:
        shard, row = reader._locate(number)
        payload[shard.rows.place(row)[0] + 700] ^= 1
    tar.write_bytes(payload)
    loader = make(url, check="crc", on_bad="substitute")
    shown = keys_of(take(loader, 12))
    assert len(loader.bad_samples) > 10
    assert {*shown} <= {*kept}
    assert {record["sample"] for record in loader.bad_samples} <= set(subset[::2])
    resumed = make(url, check="crc", on_bad="substitute")
    resumed.load_state_dict(saved(make(url, check="crc", on_bad="substitute")))
    assert keys_of(take(resumed, 12)) == shown


def test_a_mixture_takes_subsets_with_their_own_sizes(
    url, kept, tiny_sample, write_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
    more = [tiny_sample(1000 + i, num_images=i % 2) for i in range(30)]
    other = write_dataset(tmp_path / "set", more, several=True, name="other")

    def mixture(where=WHERE, rank=0, world_size=1, **options):
        ranks = {"rank": rank, "world_size": world_size}
        parts = [
            StreamingDataset(url, where=where, **ranks),
            StreamingDataset(other, keys=[s.key for s in more[:17]], **ranks),
        ]
        return IterableDatasetMixture(parts, seed=1, **{"by": "size", "stop": 5, **options})

    loader = load(mixture())
    members = loader._order.config.to_dict()["members"]
    assert [member["num_samples"] for member in members] == [len(kept), 17]
    assert members[0]["weight"] / members[1]["weight"] == pytest.approx(len(kept) / 17, rel=1e-3)
    want = take(load(mixture()), 20)
    shown = keys_of(want)
    own, others = ([k for k in shown if (k in kept) == mine] for mine in (True, False))
    for found, expected in ((own, kept), (others, [s.key for s in more[:17]])):
        for epoch in range(len(found) // len(expected)):
            part = found[epoch * len(expected) : (epoch + 1) * len(expected)]
            assert sorted(part) == expected
    for step in (1, 7, 12):
        first = load(mixture())
        take(first, step)
        loaders = [load(mixture(rank=r, world_size=3)) for r in range(3)]
        for loader in loaders:
            loader.load_state_dict(saved(first))
        assert take_all(loaders, 20 - step) == want[step:]
    with pytest.raises(StateError) as caught:
        load(mixture("num_tokens > 7")).load_state_dict(saved(first))
    assert "state.data.tiny.subset.where" in caught.value.facts["differences"]

    tokens = load(mixture(unit="tokens"))._stream.parts[0].data
    columns = tokens.reader.column("num_tokens", tokens.subset.ids)
    assert tokens.mean_tokens == columns.mean()


def test_a_plain_dataloader_and_a_copy_in_another_process_see_the_subset(url, kept):
    dataset = StreamingDataset(url, where=WHERE, batch_size=4, tail="drop_last")
    shown = [e["metadata"]["key"] for e in pickle.loads(pickle.dumps(dataset))]
    batches = DataLoader(dataset, batch_size=4, collate_fn=list)
    assert [e["metadata"]["key"] for batch in batches for e in batch] == shown
    assert {*shown} <= {*kept}
    assert len({*shown}) == len(shown) == len(kept) // 4 * 4


def test_many_samples_are_chosen_in_parts(url, kept, monkeypatch):
    want = make(url).dataset.fingerprint()
    monkeypatch.setattr("loader.stream.subset._SAMPLES_AT_ONCE", 7)
    assert make(url).dataset.fingerprint() == want


def test_raw_samples_are_chosen_too(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for i in range(12):
            for suffix in ("txt", "bin")[: 1 + i % 2]:
                entry = tarfile.TarInfo(f"{i:03d}.{suffix}")
                entry.size = 4
                archive.addfile(entry, BytesIO(b"text"))
    out = str(tmp_path / "out")
    import_tars(ImportSettings(name="raw", tars=(str(tmp_path / "0.tar"),), out=out), Quiet())
    dataset = RawDataset(
        out,
        decode=lambda sample, _: sample.key,
        where="num_members == 2",
        keys=["001", "002", "003"],
        tail="drop_last",
    )
    assert sorted(dataset) == ["001", "003"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_subset_of_a_remote_dataset_is_that_of_a_local_one(
    cached, url, s3_server, tmp_path, monkeypatch
):
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    remote = s3_server.make_bucket() + "/set"
    s3_server.client().put(url, remote, recursive=True)
    options = {
        "network": Network(block_bytes=64 * 1024),
        "cache": str(tmp_path / "cache") if cached else None,
    }
    want = take(make(url), 9)
    first = make(remote, **options)
    assert take(first, 4) == want[:4]
    assert first.dataset.fingerprint() == make(url).dataset.fingerprint()
    loaders = [make(remote, rank=r, world_size=2, **options) for r in range(2)]
    for loader in loaders:
        loader.load_state_dict(saved(first))
    assert take_all(loaders, 5) == want[4:]
    if cached:
        again = make(remote, **options)
        assert again.stats().counters["cache_hits"] >= 3
        assert not again.stats().counters.get("cache_misses")
