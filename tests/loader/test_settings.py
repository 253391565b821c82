"""Arguments of the public constructors: no value is ignored in silence or ends in a bare error."""

import inspect
import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch

from loader.assembly import View
from loader.dataloader import make_dataloader
from loader.mixture_stream import IterableDatasetMixture
from loader.raw import RawDataset
from loader.reading import Network
from loader.stream import StreamingDataset
from preprocess.exchange.foreign import ImportSettings, import_tars
from shardspec.errors import ConfigError, ShardsError
from shardspec.tiling import ImageView
from tests import inline
from tests.inline import Quiet


@pytest.fixture(autouse=True, scope="module")
def short_pattern():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
        yield


@pytest.fixture(scope="module")
def urls(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    samples = [tiny_sample(i, num_images=0) for i in range(12)]
    return [write_dataset(folder / name, samples, name=name) for name in ("one", "two", "three")]


@pytest.fixture(scope="module")
def lanes_url(tiny_sample, write_dataset, tmp_path_factory):
    """Large enough for lanes at a batch of 4."""
    samples = [tiny_sample(i, num_images=0) for i in range(1024)]
    return write_dataset(tmp_path_factory.mktemp("lanes") / "set", samples, name="lanes")


@pytest.fixture(scope="module")
def raw_url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    with tarfile.open(folder / "raw.tar", "w") as archive:
        for i in range(12):
            entry = tarfile.TarInfo(f"{i:02d}.txt")
            entry.size = 1
            archive.addfile(entry, io.BytesIO(b"x"))
    settings = {"name": "raw", "tars": (str(folder / "raw.tar"),), "out": str(folder / "out")}
    with inline.jobs():
        import_tars(ImportSettings(**settings), Quiet())
    return settings["out"]


def parameters(kind):
    return set(inspect.signature(kind).parameters) - {"self"}


AROUND = {
    "seed": "documented: that of the run counts, for the order and for every draw",
    "view": "its own",
    "split": "its own",
    "check": "its own",
    "on_bad": "its own",
    "max_bad_rate": "its own",
    "cache": "its own",
    "cache_bytes": "its own",
    "network": "its own",
    "clips": "its own",
    "tokenizer": "its own",
    "max_samples": "its own",
    "where": "its own",
    "keys": "its own",
    "decode": "its own",
    "url": "its own",
    "rank": "of all datasets",
    "world_size": "of all datasets",
    "tail": "refused",
    "shuffle": "refused",
    "active_blocks": "refused",
    "block_size": "refused",
    "batch_size": "of all",
    "canonical_ranks": "of all",
    "locality": "of all",
    "stop": "of all",
    "datasets": "its own",
    "weights": "its own",
    "by": "its own",
    "unit": "its own",
}
"""What a mixture does about an argument of a dataset or mixture in it."""

OTHERS = {
    "tail": "pad",
    "shuffle": False,
    "active_blocks": 9,
    "block_size": 4,
    "batch_size": 3,
    "canonical_ranks": 2,
    "locality": "node",
    "stop": 7,
}


def test_what_a_mixture_does_about_each_argument_is_decided():
    kinds = (StreamingDataset, RawDataset, IterableDatasetMixture)
    assert set.union(*map(parameters, kinds)) == set(AROUND)
    decided = {name for name, what in AROUND.items() if what in ("refused", "of all")}
    assert decided == set(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("inner", ["dataset", "mixture", "dataset in a mixture"])
def test_a_setting_that_a_mixture_would_ignore_is_refused_by_name(name, inner, urls):
    given = {name: OTHERS[name]}
    kind = IterableDatasetMixture if inner == "mixture" else StreamingDataset
    if name not in parameters(kind):
        return
    others = [StreamingDataset(urls[1])]
    same = {n: v for n, v in given.items() if n in parameters(IterableDatasetMixture)}

    def make(options):
        if inner == "dataset":
            first = StreamingDataset(urls[0], **given)
        elif inner == "mixture":
            first = IterableDatasetMixture([StreamingDataset(urls[0])], seed=1, **given)
        else:
            # The same for the inner mixture, so that only the outer one has a say.
            alone = StreamingDataset(urls[0], **given)
            first = IterableDatasetMixture([alone], seed=1, **same)
        return IterableDatasetMixture([first, *others], seed=1, **options)

    with pytest.raises(ConfigError) as caught:
        make({})
    assert caught.value.reason in ("mixture_order", "mixture_tail")
    assert name in str(caught.value)
    if AROUND[name] == "of all":
        make(given)  # the mixture around has it too


def test_an_inner_mixtures_unit_divides_its_share(urls):
    """The inner mixture's share of samples is the outer's affair; inside, tokens are shared."""
    parts = [StreamingDataset(url) for url in urls[:2]]
    subset = StreamingDataset(urls[2], where="num_tokens >= 0")
    means = [part._stream.parts[0].data.mean_tokens for part in (*parts, subset)]
    inner = IterableDatasetMixture(parts, [3, 1], seed=0, unit="tokens")
    outer = IterableDatasetMixture([inner, subset], [1, 1], seed=0)
    weights = [member.weight for member in outer._stream.order.config.members]
    shares = [3 / means[0], 1 / means[1]]
    wanted = [0.5 * share / sum(shares) for share in shares]
    assert weights == pytest.approx([*wanted, 0.5])


JUNK = (
    *(None, True, False, 0, 1, 2, 3, 4, 7, 20, -1, -3),
    *(2**31, 2**62, 2**63, 2**64, 10**400, -(2**63)),
    *(0.0, 0.5, 1.0, 2.0, -1.5, 1e308, float("nan"), float("inf")),
    *("", "8", "x", "../x", "\0", "train", "rate", "tokens", "wrap", "crc", b"", b"ab"),
    *(np.int64(4), np.float32(2.5), np.bool_(True), np.array(3), np.array([1, 2])),
    *(np.array(["a"]), np.array([], np.float64)),
    *(torch.tensor(2), torch.tensor([1.0, 2.0]), torch.tensor(float("nan"))),
    *(math.sqrt, int, complex(1, 2), object(), Ellipsis, range(3)),
    *([], [8], ["8"], [None], [[1]], (1.0, 2.0), (), {}, {"a": 1}, {1, 2}, frozenset("ab")),
)
"""Values of any type, and some that are nearly right."""


def names_of(kind):
    return sorted(parameters(kind))


def refusals(make):
    """Tries each value: it works, or is refused by name. Gives the values that were refused."""
    refused = []
    for value in JUNK:
        try:
            made = make(value)
        except ShardsError as error:
            refused.append((repr(value), error))
        except Exception as error:
            raise AssertionError(f"{value!r} ends in {error!r}") from error
        else:
            json.dumps(made)  # what a state holds of it
    assert all(error.fix and len(str(error)) < 3000 for _, error in refused)
    return refused


def state_and_places(loader):
    batches = loader.places(0), loader.places(5)
    assert all(map(len, batches))
    return loader.state_dict()


@pytest.fixture(autouse=True)
def away(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", names_of(StreamingDataset))
def test_any_value_of_a_dataset_works_or_is_refused(name, urls):
    topology = {"rank": {"world_size": 4}, "world_size": {"rank": 0}}.get(name, {})

    def make(value):
        dataset = StreamingDataset(**{"url": urls[0], **topology, name: value})
        len(dataset)
        return state_and_places(make_dataloader(dataset, global_batch_size=4, sequence_length=64))

    assert refusals(make)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"max_samples": "8"}, "max_samples= must be a whole number of at least 0, not '8'"),
        ({"seed": -1}, "seed= must be a whole number from 0 to 2**64 - 1, not -1"),
        ({"check": "crc32"}, "check= must be one of 'size', 'crc', not 'crc32'"),
        ({"shuffle": "no"}, "shuffle= must be True or False, not 'no'"),
        ({"view": [0] * 99}, "view= must be a View or None, not [0, 0, 0, 0"),
    ],
)
def test_a_refusal_names_the_argument_and_what_it_takes(options, shown, urls):
    with pytest.raises(ConfigError) as caught:
        StreamingDataset(urls[0], **options)
    assert caught.value.reason == "argument"
    assert shown in caught.value.what
    assert len(caught.value.what) < 120


@pytest.mark.parametrize("name", names_of(IterableDatasetMixture))
def test_any_value_of_a_mixture_works_or_is_refused(name, urls):
    parts = [StreamingDataset(url) for url in urls[:2]]

    def make(value):
        mixture = IterableDatasetMixture(**{"datasets": parts, "seed": 1, name: value})
        len(mixture)
        return state_and_places(make_dataloader(mixture, global_batch_size=4, sequence_length=64))

    assert refusals(make)


@pytest.mark.parametrize("name", names_of(make_dataloader))
@pytest.mark.parametrize("pack", [False, True])
def test_any_value_of_a_loader_works_or_is_refused(name, pack, urls):
    dataset = StreamingDataset(urls[0])
    options = {"dataset": dataset, "global_batch_size": 4, "sequence_length": 64, "pack": pack}

    def make(value):
        loader = make_dataloader(**{**options, name: value})
        if name == "global_batch_size" and value > 100:
            return loader.state_dict()  # this machine has no room for its places
        return state_and_places(loader)

    assert refusals(make)


@pytest.mark.parametrize("name", names_of(RawDataset))
def test_any_value_of_a_raw_dataset_works_or_is_refused(name, raw_url):
    def make(value):
        options = {"url": raw_url, "decode": lambda sample, rng: 1}  # noqa: ARG005
        if name in ("rank", "world_size"):
            options |= {"rank": 0, "world_size": 4}
        dataset = RawDataset(**{**options, name: value})
        len(dataset)
        loader = make_dataloader(dataset, global_batch_size=4, collate_fn=list)
        return state_and_places(loader)

    assert refusals(make)


IMAGE = ImageView(size_px=28, patch_px=14, pool=(1, 1))

CONTEXTS = {
    "rows": {},
    "packs": {"pack": True},
    "workers": {"workers": 1},
    "not shuffled": {"shuffle": False},
    "cached": {"cache": "cache"},
    "substitutes": {"on_bad": "substitute"},
    "small": {"shuffle": True},
    "mixture": {},
    "raw": {},
}
"""What an argument may mean nothing beside; "small" and "raw" are too small for lanes; all are
local."""

GIVEN = {
    "batch_size": 3,
    "view": View(image=IMAGE, sequence_length=32),
    "cache": "elsewhere",
    "cache_bytes": 2**35,
    "network": Network(),
    "max_bad_rate": 0.5,
    "active_blocks": 16,
    "block_size": 2,
    "locality": "node",
    "max_crops": 9,
    "balance": False,
    "decode_threads": 3,
}
"""Arguments that mean nothing in some context."""

FREE = {
    "url": "always",
    "split": "always",
    "seed": "of the draws too",
    "shuffle": "always",
    "tail": "refused with packs and in mixtures",
    "rank": "always",
    "world_size": "always",
    "check": "documented: of local tars; samples of remote ones are always verified",
    "on_bad": "always",
    "tokenizer": "always",
    "canonical_ranks": "of resumes, packs and the width of every order",
    "max_samples": "always",
    "where": "always",
    "keys": "always",
    "dataset": "always",
    "global_batch_size": "always",
    "sequence_length": "refused for raw samples",
    "collate_fn": "always",
    "map": "refused for raw samples",
    "pad_mode": "refused for raw samples",
    "workers": "always",
    "extra_keys": "refused for raw samples",
    "with_metadata": "refused for raw samples",
    "columns": "refused for raw samples",
    "pack": "refused for raw samples",
    "min_images": "refused for raw samples",
    "max_images": "refused for raw samples",
    "bucket_steps": "refused with packs and for raw samples",
    "pad_side": "refused for raw samples",
    "metadata": "refused for raw samples",
    "arrays": "refused for raw samples, with packs and with collate_fn=",
    "watchdog_s": "always, but where batches are made in the consumer's thread, as documented",
    "prefetch_bytes": "always: it bounds what is kept to be used again",
    "decode": "always",
    "clips": "always: it bounds what decoding may take, which is nothing without clips",
}
"""All others, and why they are never ignored in silence."""

WARNED = {("cache", "any"), ("network", "any")} | {
    (name, kind)
    for name in ("active_blocks", "block_size", "locality")
    for kind in ("small", "raw")
}
"""What is said in a warning: such settings are often the same for all datasets of a script."""

USED = {
    "cache_bytes": {"cached"},
    "max_bad_rate": {"substitutes"},
    "active_blocks": set(CONTEXTS) - {"not shuffled"},
    "block_size": set(CONTEXTS) - {"not shuffled"},
    "locality": set(CONTEXTS) - {"not shuffled"},
    "max_crops": {"packs"},
    "balance": {"packs"},
    "decode_threads": set(CONTEXTS) - {"workers"},
    "cache": set(CONTEXTS),
    "network": set(CONTEXTS),
}
"""Where an argument has an effect, or is warned of; elsewhere it is refused. Others nowhere here:
the dataset's batch size and the view's sequence length are not the loader's."""


def test_what_each_argument_means_beside_others_is_decided():
    kinds = (StreamingDataset, RawDataset, make_dataloader)
    assert set.union(*map(parameters, kinds)) == set(GIVEN) | set(FREE)
    assert not set(GIVEN) & set(FREE)
    assert set(USED) <= set(GIVEN)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", GIVEN)
def test_an_argument_without_effect_is_refused_by_name_or_warned_of(
    name, context, urls, lanes_url, raw_url, caplog
):
    kind = RawDataset if context == "raw" else StreamingDataset
    first = {"raw": raw_url, "small": urls[0], "mixture": urls[0]}.get(context, lanes_url)
    options = {**CONTEXTS[context], name: GIVEN[name]}
    if name not in parameters(kind) | parameters(make_dataloader):
        return
    own = {n: value for n, value in options.items() if n in parameters(kind)}
    rest = {n: value for n, value in options.items() if n not in own}

    def make():
        if context == "raw":
            dataset = RawDataset(first, decode=lambda sample, rng: 1, **own)  # noqa: ARG005
            return make_dataloader(dataset, global_batch_size=4, collate_fn=list, **rest)
        dataset = StreamingDataset(first, **own)
        if context == "mixture":
            dataset = IterableDatasetMixture([dataset, StreamingDataset(urls[1])], seed=1)
        return make_dataloader(dataset, global_batch_size=4, sequence_length=64, **rest)

    if context in USED.get(name, ()) and not (context == "mixture" and name in OTHERS):
        caplog.clear()
        make().close()
        said = [text for text in caplog.messages if f"{name}=" in text]
        assert bool(said) == ((name, context) in WARNED or (name, "any") in WARNED)
    else:
        with pytest.raises(ConfigError) as caught:
            make()
        reasons = {"argument_unused", "batch_size", "loader_options", "mixture_order"}
        assert caught.value.reason in reasons
        assert name in str(caught.value) or name == "view"
