"""RawDataset in `make_dataloader` and in mixtures: equal batches for any ranks and resumes."""

import contextlib
import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from loader import IterableDatasetMixture, RawDataset, StreamingDataset, make_dataloader
from preprocess.exchange.foreign import ImportSettings, import_tars
from shardspec.errors import ConfigError, ShardError, StateError, WorkerError
from tests.inline import Quiet

BATCH = 6
SIZES = {"ant": 16, "bee": 40, "cat": 5}
STEPS = 12
"""A dataset of 40 samples passes its first epoch in 7 steps: two passes are 14."""

pytestmark = [
    pytest.mark.usefixtures("in_this_process"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def short_word():
    """A mixture's pattern of 64 batches: built in 2 ms instead of 100."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
        yield


def write_raw(folder, name, count):
    """Imports two tars of samples with a text and some bytes each; gives the dataset's URL."""
    folder.mkdir(parents=True)
    tars = []
    for shard, numbers in enumerate(np.array_split(np.arange(count), 2)):
        tars.append(folder / f"{shard}.tar")
        with tarfile.open(tars[-1], "w") as archive:
            for i in numbers.tolist():
                for suffix, payload in (("txt", f"{name} {i}".encode()), ("bin", bytes([i]) * 4)):
                    entry = tarfile.TarInfo(f"{name}-{i:03d}.{suffix}")
                    entry.size = len(payload)
                    archive.addfile(entry, io.BytesIO(payload))
    out = folder / "out"
    settings = {"name": name, "tars": tuple(map(str, tars)), "out": str(out)}
    import_tars(ImportSettings(**settings), Quiet())
    return str(out)


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    return {name: write_raw(folder / name, name, size) for name, size in SIZES.items()}


def decode(sample, rng):
    """Key, text, bytes and a draw of the sample's own generator."""
    fields = sample.fields
    return sample.key, bytes(fields["txt"]).decode(), fields["bin"][0], int(rng.randint(1 << 30))


def collate(samples):
    keys, texts, numbers, draws = zip(*samples, strict=True)
    return {
        "keys": list(keys),
        "texts": list(texts),
        "numbers": torch.tensor(numbers, dtype=torch.uint8),
        "draws": torch.tensor(draws),
        "pictures": torch.tensor(numbers).float()[:, None].expand(-1, 5000).contiguous(),
    }


def raw(url, **options):
    return RawDataset(url, **{"decode": decode, "seed": 3, **options})


def mixed(urls, **options):
    parts = [
        raw(url, rank=options.get("rank"), world_size=options.get("world_size"))
        for url in urls.values()
    ]
    return IterableDatasetMixture(parts, [1, 2, 1], seed=3, stop=7)


def source(urls, kind, **ranks):
    return mixed(urls, **ranks) if kind == "mixture" else raw(urls["bee"], **ranks)


def make(dataset, **options):
    return make_dataloader(
        dataset, **{"global_batch_size": BATCH, "collate_fn": collate, **options}
    )


def rows(batch):
    assert torch.equal(batch["pictures"][:, 7], batch["numbers"].float())
    columns = batch["keys"], batch["texts"], batch["numbers"].tolist(), batch["draws"].tolist()
    return list(zip(*columns, strict=True))


def take(loader, count):
    batches = []
    while len(batches) < count:
        batches += map(rows, itertools.islice(loader, count - len(batches)))
    return batches


def run(urls, kind, *, world_size=1, count, state=None, **options):
    """Gives global batches, joined from all ranks, and the state of each rank after them."""
    parts, states = [], []
    for rank in range(world_size):
        loader = make(source(urls, kind, rank=rank, world_size=world_size), **options)
        if state is not None:
            loader.load_state_dict(state)
        parts.append(take(loader, count))
        states.append(json.loads(json.dumps(loader.state_dict())))
    return [[row for part in step for row in part] for step in zip(*parts, strict=True)], states


KINDS = ("one", "mixture")


@pytest.fixture(scope="module")
def undisturbed(urls):
    """The global batches of one rank, each made when it is asked for."""
    return {kind: run(urls, kind, count=STEPS + 4, decode_threads=0)[0] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_samples_of_a_plain_loop_over_the_dataset(kind, urls, undisturbed):
    if kind == "one":
        plain = raw(urls["bee"], batch_size=BATCH)
    else:
        parts = [raw(url) for url in urls.values()]
        plain = IterableDatasetMixture(parts, [1, 2, 1], seed=3, stop=7, batch_size=BATCH)
    shown = []
    for epoch in range(2):
        plain.set_epoch(epoch)
        shown += plain
    want = list(itertools.chain(*undisturbed[kind]))
    count = min(len(shown), len(want))
    assert count >= 2 * 6 * BATCH
    assert shown[:count] == want[:count]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"decode_threads": 1}, {"decode_threads": 3}])
def test_every_number_of_threads_gives_the_same_batches(kind, options, urls, undisturbed):
    assert run(urls, kind, count=STEPS, **options)[0] == undisturbed[kind][:STEPS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_every_number_of_ranks_gives_the_same_global_batches(kind, world_size, urls, undisturbed):
    got, states = run(urls, kind, world_size=world_size, count=STEPS)
    assert got == undisturbed[kind][:STEPS]
    assert all(state == states[0] for state in states)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_can_be_resumed_from_on_other_ranks_and_threads(kind, urls, undisturbed):
    worlds, threads = itertools.cycle((1, 2, 3, 6)), itertools.cycle((0, 1, 2))
    state = None
    for step in range(STEPS):
        got, states = run(
            urls,
            kind,
            world_size=next(worlds),
            count=1,
            state=state,
            decode_threads=next(threads),
        )
        assert got == undisturbed[kind][step : step + 1], step
        state = states[0]
        later, _ = run(urls, kind, world_size=next(worlds), count=2, state=state)
        assert later == undisturbed[kind][step + 1 : step + 3], step


@pytest.mark.slow
def test_worker_processes_resume_where_threads_of_other_ranks_stopped(urls, undisturbed):
    _, states = run(urls, "mixture", world_size=2, count=5)
    got, _ = run(urls, "mixture", world_size=1, count=3, state=states[0], workers=2)
    assert got == undisturbed["mixture"][5:8]


def test_each_epoch_has_every_sample_once_and_draws_of_its_own(undisturbed):
    shown = list(itertools.chain(*undisturbed["one"]))
    first, second = shown[:40], shown[40:80]
    assert {row[0] for row in first} == {f"bee-{i:03d}" for i in range(40)}
    assert {row[0] for row in second} == {row[0] for row in first}
    assert not {row[3] for row in first} & {row[3] for row in second}


def test_mixture_keeps_the_weights_of_raw_datasets(urls):
    shown = [row for batch in run(urls, "mixture", count=40)[0] for row in batch]
    counts = {name: sum(row[0].startswith(name) for row in shown) for name in SIZES}
    assert all(
        abs(counts[n] - s * len(shown)) <= 2 for n, s in zip(SIZES, (0.25, 0.5, 0.25), strict=True)
    )


def test_datasets_of_a_mixture_can_be_weighted_by_size_and_nested(urls):
    ant, bee, cat = (raw(url) for url in urls.values())
    inner = IterableDatasetMixture([ant, bee], by="size", seed=9)
    outer = make(IterableDatasetMixture([inner, cat], [3, 1], seed=3))
    members = outer.state_dict()["order"]["members"]
    weights = {member["name"]: round(member["weight"], 6) for member in members}
    assert weights == {"ant": 0.214286, "bee": 0.535714, "cat": 0.25}


def test_changes_of_batch_size_and_weights_are_part_of_the_state(urls):
    loader = make(mixed(urls))
    take(loader, 3)
    loader.change(global_batch_size=12, weights=[0, 1, 0])
    later = take(loader, 2)
    assert [len(batch) for batch in later] == [12, 12]
    assert all(row[0].startswith("bee") for batch in later for row in batch)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make(mixed(urls))
    resumed.load_state_dict(state)
    assert take(resumed, 2) == take(loader, 2)


def test_state_of_other_raw_data_or_another_order_is_refused_by_field(urls):
    state = make(raw(urls["bee"])).state_dict()
    others = [
        (make(raw(urls["ant"])), "state.data.num_samples: 40 here, 16 asked"),
        (make(raw(urls["bee"], seed=4)), "state.seed: 3 here, 4 asked"),
        (make(raw(urls["bee"]), global_batch_size=4), "state.order.global_batch_size: 6 here, 4"),
    ]
    for loader, field in others:
        with pytest.raises(StateError) as caught:
            loader.load_state_dict(state)
        assert caught.value.reason == "state_mismatch"
        assert field in caught.value.facts["differences"]


def test_raw_dataset_that_has_grown_is_named_and_can_be_cut_to_its_old_size(tmp_path):
    def at(count):
        return write_raw(tmp_path / str(count), "bee", count)

    loader = make(raw(at(20)))
    before = [row[0] for batch in take(loader, 2) for row in batch]
    state, want = json.loads(json.dumps(loader.state_dict())), take(loader, 3)
    grown = at(26)
    with pytest.raises(StateError) as caught:
        make(raw(grown)).load_state_dict(state)
    assert caught.value.reason == "state_appended"
    resumed = make(raw(grown, max_samples=20))
    resumed.load_state_dict(state)
    assert take(resumed, 3) == want
    extended = make(raw(grown))
    extended.load_state_dict(state, allow=("appended",))
    shown = [row[0] for batch in take(extended, 6) for row in batch]
    assert {*before, *shown[:8]} == {f"bee-{i:03d}" for i in range(20)}
    assert {*shown[8:34]} == {f"bee-{i:03d}" for i in range(26)}


def test_mixture_of_raw_datasets_streams_under_a_plain_dataloader_with_exact_states(urls):
    def plain():
        parts = [raw(url) for url in urls.values()]
        return IterableDatasetMixture(parts, [1, 2, 1], seed=3, stop=7, batch_size=BATCH)

    dataset = plain()
    batches = list(DataLoader(dataset, batch_size=BATCH, collate_fn=list))
    assert len(batches) == 7
    for step in range(1, 7):
        first = plain()
        iterator = iter(first)
        list(itertools.islice(iterator, step * BATCH + 1))
        resumed = plain()
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert list(resumed) == [row for batch in batches for row in batch][step * BATCH + 1 :]


def test_raw_and_prepared_datasets_do_not_mix(urls, tiny_sample, write_dataset, tmp_path):
    prepared = StreamingDataset(write_dataset(tmp_path / "set", [tiny_sample(0)], name="dog"))
    for parts in ([prepared, raw(urls["ant"])], [raw(urls["ant"]), prepared]):
        with pytest.raises(ConfigError) as caught:
            IterableDatasetMixture(parts, seed=1)
        assert caught.value.reason == "mixture_kinds"
        assert caught.value.facts == {"raw": ["ant"], "prepared": ["dog"]}
        assert "make shards" in caught.value.fix


def test_raw_datasets_by_tokens_of_another_rank_or_twice_are_refused(urls):
    def reason(parts, **options):
        with pytest.raises(ConfigError) as caught:
            IterableDatasetMixture(parts, seed=1, **options)
        return caught.value.reason

    ant, bee = raw(urls["ant"]), raw(urls["bee"])
    assert reason([ant, bee], unit="tokens") == "mixture_mean_tokens"
    assert reason([ant, raw(urls["bee"], rank=1, world_size=2)]) == "mixture_topology"
    assert reason([ant, ant]) == "mixture_twice"
    assert reason([raw(urls["ant"], tail="pad")]) == "mixture_tail"


def test_loader_options_that_are_not_for_raw_samples_are_refused_by_name(urls):
    with pytest.raises(ConfigError) as caught:
        make(raw(urls["ant"]), sequence_length=64, pack=True, pad_mode="max_len")
    assert caught.value.reason == "loader_options"
    assert caught.value.facts["names"] == "pack, pad_mode, sequence_length"
    with pytest.raises(ConfigError) as caught:
        make(raw(urls["ant"]), collate_fn=None)
    assert caught.value.reason == "loader_options"
    assert "collate" in str(caught.value)


def test_prepared_samples_need_a_sequence_length_and_with_collate_no_layout(
    tiny_sample, write_dataset, tmp_path
):
    dataset = StreamingDataset(write_dataset(tmp_path / "set", [tiny_sample(0)]))
    with pytest.raises(ConfigError) as caught:
        make_dataloader(dataset, global_batch_size=1)
    assert caught.value.reason == "loader_options"
    assert "sequence_length" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        make_dataloader(
            dataset, global_batch_size=1, sequence_length=64, collate_fn=list, with_metadata=True
        )
    assert caught.value.reason == "loader_options"
    assert "collate" in str(caught.value)


def test_functions_that_cannot_be_sent_to_workers_are_refused_before_any_starts(urls):
    with pytest.raises(ConfigError) as caught:
        list(make(raw(urls["ant"], decode=lambda sample, rng: sample.key), workers=1))
    assert caught.value.reason == "worker_pickle"
    assert "lambda" in caught.value.facts["error"]


def failing(sample, rng):
    raise ZeroDivisionError(f"no {sample.key}")


def generators(samples):
    return (sample for sample in samples)


@pytest.mark.parametrize("threads", [0, 2])
def test_exceptions_of_decode_reach_the_consumer(threads, urls):
    with pytest.raises(ConfigError, match="ZeroDivisionError: no ant-") as caught:
        list(make(raw(urls["ant"], decode=failing), decode_threads=threads))
    assert caught.value.reason == "user_function"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.slow
def test_exceptions_of_decode_in_workers_name_their_line(urls):
    with pytest.raises(ConfigError, match="ZeroDivisionError: no ant-") as caught:
        list(make(raw(urls["ant"], decode=failing), workers=1))
    assert caught.value.reason == "user_function"
    assert "test_raw.py:" in caught.value.facts["line"]


@pytest.mark.slow
def test_batches_that_cannot_be_sent_are_a_named_error_of_the_worker(urls):
    with pytest.raises(WorkerError, match="generator") as caught:
        list(make(raw(urls["ant"]), collate_fn=generators, workers=1))
    assert caught.value.reason == "worker_crash"


def pair(samples):
    numbers = torch.tensor([sample[2] for sample in samples])
    half = torch.zeros(3, dtype=torch.bfloat16)
    return numbers.double().expand(1000, -1).T, [sample[0] for sample in samples], half


def one_tensor(samples):
    return torch.tensor([sample[2] for sample in samples])


def any_type(samples):
    """Another type for each batch: starting workers for each of them costs seconds."""
    return (pair, one_tensor, list)[samples[0][2] % 3](samples)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_can_be_of_any_type(workers, urls):
    numbers = [[row[2] for row in batch] for batch in run(urls, "one", count=7)[0]]
    found = set()
    for want, batch in zip(
        numbers, make(raw(urls["bee"]), collate_fn=any_type, workers=workers), strict=True
    ):
        found.add(type(batch))
        if isinstance(batch, tuple):
            assert batch[0][:, 999].tolist() == want
            assert batch[2].dtype == torch.bfloat16
        elif isinstance(batch, torch.Tensor):
            assert batch.tolist() == want
        else:
            assert [row[2] for row in batch] == want
    assert found == {tuple, torch.Tensor, list}


def test_timings_name_reading_decoding_and_collating(urls):
    loader = make(raw(urls["bee"]), decode_threads=1)
    batches = list(loader)
    timings = loader.stats().timings
    assert (timings.batches, timings.samples) == (len(batches), BATCH * len(batches))
    assert timings.read_bytes == sum(len(row[1]) + 4 for batch in batches for row in rows(batch))
    assert timings.batch_bytes == sum(
        batch[name].nbytes for batch in batches for name in ("numbers", "draws", "pictures")
    )
    assert min(timings.read_s, timings.decode_s, timings.collate_s) > 0
    assert timings.layout_s == timings.render_s == 0


def test_damaged_tar_is_an_error_under_the_loader_too(tmp_path):
    url = write_raw(tmp_path / "bee", "bee", 8)
    path = tmp_path / "bee" / "0.tar"
    damaged = bytearray(path.read_bytes())
    damaged[512] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ShardError) as caught:
        list(make(raw(url, check="crc")))
    assert caught.value.reason == "sample_crc"


def test_states_say_nothing_of_views_and_padding(urls):
    assert list(make(raw(urls["bee"])).state_dict()) == [
        *("version", "step", "seed", "data", "order", "bucket_steps", "packing")
    ]


def one_rank(urls, *, batch=BATCH, rank=0, world_size=1, **options):
    dataset = raw(urls["bee"], rank=rank, world_size=world_size, **options)
    return make_dataloader(dataset, global_batch_size=batch, collate_fn=collate, decode_threads=0)


def mixed_ranks(urls, *, batch=BATCH, rank=0, world_size=1, **options):
    parts = [raw(url, rank=rank, world_size=world_size) for url in urls.values()]
    dataset = IterableDatasetMixture(parts, seed=3, stop=STEPS, **options)
    return make_dataloader(dataset, global_batch_size=batch, collate_fn=collate, decode_threads=0)


def keys_of(loader, count):
    found = []
    while len(found) < count:
        found += [batch["keys"] for batch in itertools.islice(loader, count - len(found))]
    return found


def changed_state(make):
    """Gives the state of a run whose batch became 12 at step 3, and later ones."""
    loader = make()
    keys_of(loader, 2)
    states = [loader.state_dict()]
    keys_of(loader, 1)
    for batch in (12, 18):
        loader.change(global_batch_size=batch)
        keys_of(loader, 1)
        states.append(loader.state_dict())
    return [json.loads(json.dumps(state)) for state in states]


@pytest.mark.parametrize("kind", [one_rank, mixed_ranks])
def test_loader_takes_states_before_and_after_a_change_in_any_sequence(urls, kind):
    states = changed_state(lambda: kind(urls))
    fresh = []
    for state in states:
        loader = kind(urls)
        loader.load_state_dict(state)
        fresh.append(keys_of(loader, 3))
    loader = kind(urls)
    for i in (0, 1, 2, 1, 0, 2, 2):
        loader.load_state_dict(states[i])
        assert keys_of(loader, 3) == fresh[i]


@pytest.mark.parametrize("kind", [one_rank, mixed_ranks])
def test_order_on_purpose_means_the_batch_of_this_loader(urls, kind):
    state = changed_state(lambda: kind(urls))[-1]
    for batch in (BATCH, 12, 18, 10):
        loader = kind(urls, batch=batch)
        loader.load_state_dict(state, allow=("order",))
        assert len(keys_of(loader, 1)[0]) == batch


@pytest.mark.parametrize("kind", [one_rank, mixed_ranks])
def test_state_is_refused_where_the_ranks_do_not_divide_its_batch(urls, kind):
    whole = kind(urls, batch=12, canonical_ranks=2)
    keys_of(whole, 1)
    whole.change(global_batch_size=8)
    loader = kind(urls, batch=12, rank=1, world_size=3, canonical_ranks=2)
    before = loader.state_dict()
    with pytest.raises(ConfigError) as caught:
        loader.load_state_dict(whole.state_dict())
    assert caught.value.reason == "batch_not_divisible"
    assert loader.state_dict() == before


DAMAGE = ("DEL", None, -1, "x", 1.5, 2**70, [1])


def damaged(state):
    """Gives copies of a state with one field missing or replaced, at any depth."""

    def paths(value, path):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield [*path, key]
            if isinstance(inner, dict | list):
                yield from paths(inner, [*path, key])

    for path in paths(state, []):
        for value in DAMAGE:
            copy = json.loads(json.dumps(state))
            inner = copy
            for key in path[:-1]:
                inner = inner[key]
            if value == "DEL":
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            yield copy


@pytest.mark.parametrize("kind", [one_rank, mixed_ranks])
def test_damaged_states_are_refused_by_name_or_taken(urls, kind):
    for state in changed_state(lambda: kind(urls))[2:]:
        for allow in ((), ("order",)):
            loader = kind(urls)
            for copy in damaged(state):
                with contextlib.suppress(StateError, ConfigError):
                    loader.load_state_dict(copy, allow=allow)
            for name, value in (("step", None), ("step", -1), ("step", 1.5), ("bad", ["x"])):
                with pytest.raises(StateError) as caught:
                    loader.load_state_dict({**state, name: value}, allow=allow)
                assert caught.value.reason == "state_fields"
                assert caught.value.facts.get("field", name) == name
            order = {**state["order"], "ramp" if kind is one_rank else "changes": 7}
            with pytest.raises(StateError) as caught:
                loader.load_state_dict({**state, "order": order}, allow=allow)
            assert caught.value.reason == "order_values"


@pytest.mark.parametrize("kind", [one_rank, mixed_ranks])
def test_batches_and_steps_of_other_types_are_refused(urls, kind):
    for wrong in ("8", None, 2.0, True, {}, [8], torch.tensor(6)):
        with pytest.raises(ConfigError) as caught:
            kind(urls, batch=wrong)
        assert caught.value.reason == "order_count"
    loader = kind(urls)
    for wrong in ("8", None, 2.0, 1e308, float("nan"), True, {}, [8], -1, 2**63):
        with pytest.raises(ConfigError) as caught:
            loader.places(wrong)
        assert caught.value.reason == "order_step"


def test_raw_samples_that_fill_an_evaluation_are_flagged(urls):
    def flagged(sample, _):
        return sample.key, sample.real

    seen = []
    for rank in range(2):
        dataset = RawDataset(urls["cat"], decode=flagged, tail="pad", rank=rank, world_size=2)
        for batch in make_dataloader(dataset, global_batch_size=4, collate_fn=list):
            seen += batch
    real = [key for key, counts in seen if counts]
    assert len(seen) == 8
    assert len(real) == len(set(real)) == SIZES["cat"]
