"""Added columns in training: conditions, groups of a mixture, batches, and states."""

import errno
import itertools
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from loader import IterableDatasetMixture, RawDataset, StreamingDataset, group_by, make_dataloader
from loader.reading import Network
from preprocess.annotate import AnnotateSettings, annotate, plan_annotation
from preprocess.exchange import ImportSettings, import_tars
from preprocess.reshard import ReshardSettings, plan_reshard, reshard
from shardspec.errors import ConfigError, ShardError, StateError
from tests.inline import Quiet

NUM = 47
BATCH = 6
NAMES = ("score", "licence", "clean", "rank", "clip")

pytestmark = pytest.mark.usefixtures("in_this_process")


def row(i, *, shift=0):
    return {
        "key": f"sample-{i:04d}",
        "score": ((i * 7 + shift) % 47) / 47,
        "licence": ("cc0", "cc-by", "größer")[i % 3],
        "clean": i % 4 != 0,
        "rank": -i,
        "clip": [i + 0.5, 2.0],
    }


ROWS = {each["key"]: each for each in map(row, range(NUM))}


def add(source, out, rows):
    file = Path(out).parent / (Path(out).name + ".jsonl")
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    settings = AnnotateSettings(src=str(source), columns=str(file), dst=str(out))
    annotate(plan_annotation(settings, Quiet()), Quiet())
    return str(out)


@pytest.fixture(scope="module")
def plain(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns") / "set"
    samples = [tiny_sample(i, num_images=i % 3) for i in range(NUM)]
    return write_dataset(folder, samples, num_shards=3, several=True)


@pytest.fixture(scope="module")
def scored(plain):
    return add(plain, Path(plain).parent / "scored", ROWS.values())


def load(dataset, **options):
    fixed = {"global_batch_size": BATCH, "sequence_length": 64, "pad_mode": "max_len"}
    return make_dataloader(dataset, **{**fixed, **options}, with_metadata=True)


def make(url, *, loader=None, **options):
    return load(StreamingDataset(url, **{"seed": 3, **options}), **(loader or {}))


def keys(batch):
    return [one["key"] for one in batch["metadata"]]


def take(loader, steps):
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    return list(itertools.islice(batches, steps))


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, b[name]), name
            else:
                assert value == b[name], name


# Conditions.


@pytest.mark.parametrize(
    "where, keeps",
    [
        ("score > 0.5", lambda r: r["score"] > 0.5),
        ("licence == 'cc0' or licence == 'größer'", lambda r: r["licence"] != "cc-by"),
        ("clean and not licence != 'cc0'", lambda r: r["clean"] and r["licence"] == "cc0"),
        ("rank + 5 < 0 and num_tokens > 1", lambda r: r["rank"] + 5 < 0),
        ("clean == 1 and score * 2 <= 1", lambda r: r["clean"] and r["score"] <= 0.5),
    ],
)
def test_conditions_on_added_columns_keep_what_they_say_as_a_filter_does(
    where, keeps, scored, tmp_path
):
    want = [key for key, each in ROWS.items() if keeps(each)]
    dataset = StreamingDataset(scored, seed=3, where=where, shuffle=False, tail="pad")
    assert 0 < len(want) < NUM
    assert [e["metadata"]["key"] for e in dataset] == want
    settings = ReshardSettings(sources=(scored,), out=str(tmp_path / "out"), where=where)
    reshard(plan_reshard(settings, Quiet()), Quiet())
    written = make(str(tmp_path / "out"))
    assert [keys(b) for b in take(make(scored, where=where), 9)] == [
        keys(b) for b in take(written, 9)
    ]


@pytest.mark.parametrize(
    "where", ["clip > 1", "licence > 'a'", "licence == 1", "score == 'x'", "licence", "scores > 1"]
)
def test_conditions_that_a_column_cannot_have_are_refused(where, scored):
    with pytest.raises(ConfigError) as caught:
        StreamingDataset(scored, where=where)
    assert caught.value.reason == "filter_expression"


# The order and the states.


def mixed(url, **options):
    """A mixture of the dataset and of a part of it, by a name of its own."""
    rest = group_by(StreamingDataset(url), "num_images", values=[2])[2]
    return load(IterableDatasetMixture([StreamingDataset(url), rest], [2, 1], seed=4), **options)


@pytest.mark.parametrize("step", [5, 13])
@pytest.mark.parametrize(
    "make_loader, options",
    [
        (make, {}),
        (make, {"loader": {"pack": True, "global_batch_size": 2}}),
        (make, {"loader": {"bucket_steps": 3}}),
        (make, {"where": "num_tokens > 5"}),
        (mixed, {}),
    ],
)
def test_states_of_the_plain_dataset_resume_on_the_annotated_one_and_back(
    make_loader, options, step, plain, scored
):
    whole = take(make_loader(plain, **options), 24)
    assert_same(take(make_loader(scored, **options), 24), whole)
    for first, second in ((plain, scored), (scored, plain)):
        loader = make_loader(first, **options)
        take(loader, step)
        resumed = make_loader(second, **options)
        resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        assert_same(take(resumed, 24 - step), whole[step:])


def test_a_subset_by_other_values_is_refused(plain, scored, tmp_path):
    other = add(plain, Path(plain).parent / "other", [row(i, shift=9) for i in range(NUM)])
    state = make(scored, where="score > 0.5").state_dict()
    make(scored, where="score > 0.5").load_state_dict(state)
    with pytest.raises(StateError) as caught:
        make(other, where="score > 0.5").load_state_dict(state)
    assert caught.value.reason == "state_mismatch"


# In the batch.


def assert_delivered(batch, names=keys):
    wanted = [ROWS[key] for key in names(batch)]
    assert batch["column_score"].dtype == torch.float64
    assert batch["column_rank"].dtype == torch.int64
    assert batch["column_clean"].dtype == torch.bool
    assert batch["column_clip"].dtype == torch.float32
    for name in NAMES:
        got = batch[f"column_{name}"]
        got = got.tolist() if isinstance(got, torch.Tensor) else got
        assert got == [each[name] for each in wanted], name


@pytest.mark.parametrize("options", [{"decode_threads": 0}, {}, {"bucket_steps": 3}])
def test_columns_are_those_of_the_samples_of_the_batch(options, scored):
    for rank in range(2):
        loader = make(scored, rank=rank, world_size=2, loader={"columns": NAMES, **options})
        for batch in take(loader, 20):
            assert len(batch["column_score"]) == BATCH // 2
            assert_delivered(batch)


def test_columns_change_nothing_else_of_a_batch(scored):
    plain, with_columns = take(make(scored), 9), take(make(scored, loader={"columns": NAMES}), 9)
    for batch in with_columns:
        for name in NAMES:
            del batch[f"column_{name}"]
    assert_same(with_columns, plain)


def packed_keys(batch):
    return [one["key"] for row in batch["metadata"] for one in row["examples"]]


def test_columns_of_packs_are_one_per_sample_with_its_row(scored):
    options = {"pack": True, "global_batch_size": 2, "columns": NAMES}
    for batch in take(make(scored, loader=options), 12):
        assert_delivered(batch, packed_keys)
        counts = [len(row["examples"]) for row in batch["metadata"]]
        assert batch["sample_rows"].tolist() == [r for r, n in enumerate(counts) for _ in range(n)]


@pytest.mark.slow
def test_worker_processes_deliver_the_same_columns(scored):
    loader = make(scored, loader={"columns": NAMES, "workers": 2})
    with_threads = take(make(scored, loader={"columns": NAMES}), 9)
    assert_same(take(loader, 9), with_threads)


def test_a_substitute_brings_its_own_values(scored, plain, tmp_path):
    shutil.copytree(Path(plain).parent, tmp_path / "copy")
    tar = sorted((tmp_path / "copy" / "set").rglob("*.tar"))[0]
    payload = bytearray(tar.read_bytes())
    payload[5 * 512 : 7 * 512] = bytes(1024)
    tar.write_bytes(payload)
    loader = make(
        str(tmp_path / "copy" / "scored"),
        check="crc",
        on_bad="substitute",
        loader={"columns": NAMES},
    )
    for batch in take(loader, 16):
        assert_delivered(batch)
    assert loader.bad_samples


def test_a_mixture_delivers_the_columns_that_all_datasets_have(
    scored, tiny_sample, write_dataset, tmp_path
):
    samples = [tiny_sample(i) for i in range(100, 120)]
    write_dataset(tmp_path / "b", samples, name="other")
    rows = {
        each["key"]: {**each, "licence": "a long licence"} for each in map(row, range(100, 120))
    }
    other = add(tmp_path / "b", tmp_path / "b2", rows.values())
    parts = [StreamingDataset(url, seed=1) for url in (scored, other)]
    mixture = IterableDatasetMixture(parts, [1, 1], seed=5)
    every = {**ROWS, **rows}
    for batch in take(load(mixture, columns=("licence", "score")), 12):
        assert batch["column_licence"] == [every[key]["licence"] for key in keys(batch)]
    narrow = add(tmp_path / "b", tmp_path / "b3", [{"key": k, "score": 1} for k in rows])
    mixture = IterableDatasetMixture([parts[0], StreamingDataset(narrow)], seed=5)
    for columns in (("score",), ("licence",)):
        with pytest.raises(ConfigError) as caught:
            load(mixture, columns=columns)
        assert caught.value.reason == "loader_columns"


@pytest.mark.parametrize("columns", [("scores",), ("num_tokens",)])
def test_columns_that_were_never_added_are_refused(columns, plain, scored):
    for url in (plain, scored):
        with pytest.raises(ConfigError) as caught:
            make(url, loader={"columns": columns})
        assert caught.value.reason == "loader_columns"


def key_of(sample, rng):
    return sample.key


def test_raw_samples_are_chosen_by_added_columns_and_batches_are_the_users_own(plain, tmp_path):
    settings = ImportSettings(tars=(f"{plain}/train",), out=str(tmp_path / "raw"), name="raw")
    import_tars(settings, Quiet())
    url = add(tmp_path / "raw", tmp_path / "scored", ROWS.values())
    dataset = RawDataset(url, decode=key_of, where="score > 0.5", shuffle=False, tail="pad")
    assert list(dataset) == [key for key, each in ROWS.items() if each["score"] > 0.5]
    with pytest.raises(ConfigError) as caught:
        make_dataloader(dataset, global_batch_size=2, collate_fn=list, columns=("score",))
    assert caught.value.reason == "loader_options"


# Groups.


def test_groups_divide_the_samples_by_value(scored):
    dataset = StreamingDataset(scored, seed=3)
    groups = group_by(dataset, "licence")
    assert list(groups) == ["cc-by", "cc0", "größer"]
    counts = Counter(each["licence"] for each in ROWS.values())
    assert {value: group.num_samples for value, group in groups.items()} == dict(counts)
    assert dataset.num_samples == NUM
    assert list(group_by(dataset, "clean")) == [False, True]
    few = group_by(dataset, "rank", values=[-3, np.int64(-1)])
    assert {value: group.num_samples for value, group in few.items()} == {-3: 1, -1: 1}
    inner = group_by(groups["cc0"], "clean", values=[True])[True]
    want = sum(each["licence"] == "cc0" and each["clean"] for each in ROWS.values())
    assert inner.num_samples == want


def mixture_of(url, weights, **options):
    groups = group_by(StreamingDataset(url, **options), "licence", values=list(weights))
    return IterableDatasetMixture(list(groups.values()), list(weights.values()), seed=5)


@pytest.mark.parametrize("pack", [False, True])
def test_weights_by_group_are_exact_and_resume(pack, scored):
    weights = {"cc0": 4.0, "cc-by": 1.0, "größer": 1.0}
    options = {"columns": ("licence",), **({"pack": True} if pack else {})}
    whole = take(load(mixture_of(scored, weights), **options), 30)
    drawn = Counter(value for batch in whole for value in batch["column_licence"])
    total = sum(drawn.values())
    most = total / 20 if pack else 2  # packs take their samples in windows
    for value, weight in weights.items():
        assert abs(drawn[value] - total * weight / 6) <= most
    loader = load(mixture_of(scored, weights), **options)
    take(loader, 11)
    resumed = load(mixture_of(scored, weights), **options)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert_same(take(resumed, 19), whole[11:])


def test_a_sample_of_a_group_looks_as_in_the_whole_dataset(scored):
    whole = StreamingDataset(scored, seed=5)
    group = group_by(whole, "licence")["cc0"]
    number = int(group._stream.parts[0].data.subset.ids[4])
    mixed = IterableDatasetMixture(list(group_by(whole, "licence").values()), seed=5)
    for dataset in (group, mixed.datasets[1]):
        got, want = dataset.example(number, epoch=2), whole.example(number, epoch=2)
        assert got["input_ids"].tolist() == want["input_ids"].tolist()
        assert got["images"].tolist() == want["images"].tolist()


@pytest.mark.parametrize(
    "column, values, reason",
    [
        ("score", None, "groups_column"),
        ("clip", None, "groups_column"),
        ("licences", None, "groups_column"),
        ("rank", list(range(300)), "groups_column"),
        ("licence", ["cc0", "mit"], "empty_result"),
        ("rank", ["cc0"], "empty_result"),
    ],
)
def test_groups_that_cannot_be_are_refused_by_name(column, values, reason, scored):
    with pytest.raises(ConfigError) as caught:
        group_by(StreamingDataset(scored), column, values)
    assert caught.value.reason == reason


def test_groups_of_a_subset_keep_its_condition_and_its_states_apart(scored):
    dataset = StreamingDataset(scored, seed=3, where="score > 0.3")
    groups = group_by(dataset, "clean")
    assert sum(group.num_samples for group in groups.values()) == dataset.num_samples
    state = load(groups[True]).state_dict()
    load(groups[True]).load_state_dict(state)
    with pytest.raises(StateError):
        load(groups[False]).load_state_dict(state)


# Reading.


def test_a_reader_with_columns_travels_to_a_worker_process(scored):
    reader = StreamingDataset(scored).reader
    ids = np.arange(NUM)[::-1]
    want = reader.columns(["score", "num_tokens"], ids)
    got = pickle.loads(pickle.dumps(reader)).columns(["score", "num_tokens"], ids)
    assert {name: v.tolist() for name, v in got.items()} == {n: v.tolist() for n, v in want.items()}


def test_more_files_than_are_kept_open_are_read_again(scored, monkeypatch):
    from loader.reading import columns

    monkeypatch.setattr(columns, "_MOST_OPEN", 1)
    reader = StreamingDataset(scored).reader
    for i in (0, NUM - 1, 1, NUM - 2, 20):
        want = ROWS[f"sample-{i:04d}"]["score"]
        assert reader.column("score", np.array([i])).tolist() == [want]


def test_large_files_stay_open_and_are_closed_where_descriptors_run_out(scored, monkeypatch):
    from loader.reading import columns

    monkeypatch.setattr(columns, "_MOST_READ_BYTES", 100)
    reader, failed = StreamingDataset(scored).reader, []
    want = [each["score"] for each in ROWS.values()]
    assert reader.column("score", np.arange(NUM)).tolist() == want
    reader.added._open.cache_clear()
    whole = columns.open_column_file

    def open_once_full(*args, **options):
        if not failed:
            failed.append(True)
            raise OSError(errno.EMFILE, "too many open files")
        return whole(*args, **options)

    monkeypatch.setattr(columns, "open_column_file", open_once_full)
    assert reader.column("score", np.arange(NUM)).tolist() == want
    assert failed


def test_files_in_a_store_are_fetched_once_per_node_and_checked(s3_server, scored, plain, tmp_path):
    place, put = s3_server.make_bucket() + "/sets", s3_server.client().put
    for folder in ("set", "scored"):
        put(str(Path(plain).parent / folder), f"{place}/{folder}", recursive=True)
    options = {"cache": str(tmp_path / "cache"), "network": Network(block_bytes=65536)}
    options |= {"where": "score > 0.5"}
    with s3_server.entered():
        want = take(make(scored, where="score > 0.5", loader={"columns": NAMES}), 9)
        for _ in range(2):
            loader = make(f"{place}/scored", loader={"columns": NAMES}, **options)
            assert_same(take(loader, 9), want)
        name = sorted(Path(scored).rglob("*.columns.npy"))[0].relative_to(scored)
        damaged = tmp_path / "damaged"
        damaged.write_bytes((Path(scored) / name).read_bytes()[:-1] + b"\7")
        put(str(damaged), f"{place}/scored/{name}")
        # From the cache the values are right, whatever happens to the store.
        assert_same(
            take(make(f"{place}/scored", loader={"columns": NAMES}, **options), 2), want[:2]
        )
        with pytest.raises(ShardError) as caught:
            make(f"{place}/scored", **{**options, "cache": None})
        assert caught.value.reason == "columns_sha256"
