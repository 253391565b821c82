"""Functions of the user's in a loader: own augmentation, `map=` and `collate_fn=`."""

import functools
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from loader import (
    Augment,
    DeterministicDataset,
    IterableDatasetMixture,
    MolmoPreprocessor,
    StreamingDataset,
    View,
    make_dataloader,
)
from loader.assembly.augment import Draw, draw_own, transform_points
from loader.assembly.own_augment import OwnAugment
from loader.state import view_fingerprint
from loader.stream import stored_view
from loader.user_code import function_name
from shardspec.errors import ConfigError, ShardsError, StateError
from shardspec.keyed import dataset_seed
from shardspec.sample import Geometry


def speckle(image, rng):
    """Adds noise, in place."""
    image[rng.random_sample(image.shape[:2]) < 0.3] = rng.randint(256)
    return image


@dataclass(frozen=True)
class Mirror:
    """Flips half of the pictures, and says where points go."""

    share: float = 0.5

    def __call__(self, image, rng):
        return image[:, ::-1] if rng.random_sample() < self.share else image

    def points(self, points_N2, rng, *, width, height):
        if rng.random_sample() < self.share:
            points_N2[:, 0] = width - points_N2[:, 0]
        return points_N2


class Noise:
    """Moves nothing, so every sample may have it."""

    geometry = Geometry.COLOR

    def __init__(self, most):
        self.most = most

    def __call__(self, image, rng):
        return np.minimum(image, 255 - self.most) + rng.randint(
            self.most + 1, size=image.shape[:2]
        )[..., None].astype(np.uint8)


def outside(image, rng):
    return (np.random.random(image.shape) * 255).astype(np.uint8)  # noqa: NPY002


def smaller(image, rng):
    return image[1:]


def floats(image, rng):
    return image / 255


def nothing(image, rng):
    image[:] = 0


def failing(image, rng):
    raise ZeroDivisionError("no such picture")


@pytest.fixture(scope="module")
def samples(tiny_sample):
    return [
        replace(one, images=tuple(replace(image, geometry=Geometry.ALL) for image in one.images))
        for one in (tiny_sample(i, num_images=i % 3, num_branches=1 + i % 2) for i in range(9))
    ]


@pytest.fixture(scope="module")
def url(samples, write_dataset, tmp_path_factory):
    samples = [_with_geometry(one) for one in samples]
    return write_dataset(tmp_path_factory.mktemp("own") / "set", samples, several=True)


def _with_geometry(sample):
    spans = sample.spans.copy()
    spans[spans[:, 0] == 1, 7] = int(Geometry.ALL)
    return replace(sample, spans=spans)


def stream(url, augment=None, **options):
    view = None
    if augment is not None:
        from shardspec.manifest import load_manifest

        view = View(image=stored_view(load_manifest(str(url))), augment=augment)
    return StreamingDataset(str(url), seed=3, view=view, **options)


def make(url, augment=None, *, batch=3, rank=0, world=1, **options):
    dataset = stream(url, augment, rank=rank, world_size=world)
    return make_dataloader(dataset, global_batch_size=batch, sequence_length=512, **options)


def same(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


# --- augmentation


@pytest.mark.parametrize(
    "augment", [speckle, Mirror(), Noise(9)], ids=["speckle", "mirror", "noise"]
)
def test_own_augmentation_changes_pictures_and_nothing_else(augment, url):
    plain, own = list(make(url, decode_threads=0)), list(make(url, augment, decode_threads=0))
    changed = 0
    for batch, other in zip(own, plain, strict=True):
        assert torch.equal(batch["attention_mask"], other["attention_mask"])
        assert batch["images"].shape == other["images"].shape
        changed += not torch.equal(batch["images"], other["images"])
    assert changed


def test_own_augmentation_gives_the_same_in_threads_and_after_a_resume_and_on_two_ranks(url):
    want = list(make(url, Mirror(), decode_threads=0))
    same(list(make(url, Mirror(), decode_threads=3)), want)
    first = make(url, Mirror(), decode_threads=1)
    next(iter(first))
    again = make(url, Mirror(), decode_threads=2)
    again.load_state_dict(first.state_dict())
    same(list(again), want[1:])
    ranks = [make(url, Mirror(), batch=2, rank=r, world=2, decode_threads=0) for r in range(2)]
    whole = make(url, Mirror(), batch=2, decode_threads=0)
    for one, other, both in zip(*ranks, whole, strict=True):
        pictures = [image for part in (one, other) for row in part["images"] for image in row]
        found = [image for image in pictures if image.any()]
        wanted = [image for row in both["images"] for image in row if image.any()]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_own_functions_give_the_same_in_a_worker_process(url):
    functions = {"augment": Mirror(), "map": lengths}
    same(list(make(url, **functions, workers=1)), list(make(url, **functions, decode_threads=0)))


def test_own_augmentation_is_that_of_the_unsharded_path(url, samples):
    dataset = stream(url, speckle)
    samples = [_with_geometry(one) for one in samples]
    prepare = MolmoPreprocessor(
        lambda example: samples[example["i"]],
        special_ids=dataset.manifest.tokenizer.special_ids,
        view=dataset.view,
    )

    class Rows:
        def __len__(self):
            return len(samples)

        def get(self, item, rng):
            return {"i": item}

    seed = dataset_seed(3, dataset.manifest.dataset, "train")
    direct = DeterministicDataset(Rows(), prepare, seed=seed)
    for epoch in (0, 1):
        for i in range(len(samples)):
            got, want = dataset.example(i, epoch=epoch), direct.get(i, epoch)
            for name in want.keys() - {"metadata"}:
                assert np.array_equal(got[name], want[name]), name


def test_pictures_whose_texts_forbid_it_are_left_alone(caplog):
    own, plain = OwnAugment(Mirror()), np.random.RandomState(1)
    assert draw_own(own, plain, geometry=Geometry.COLOR, where="key-1") == Draw()
    assert draw_own(OwnAugment(Noise(1)), plain, geometry=Geometry.COLOR).own is not None
    # It is said once, with the names of the function and the sample.
    draw_own(own, plain, geometry=Geometry.COLOR, where="key-2")
    (said,) = caplog.messages
    assert ("Mirror" in said, "key-1" in said) == (True, True)
    # The seeds that follow are the same, whatever a picture allows.
    first, second = np.random.RandomState(1), np.random.RandomState(1)
    draw_own(own, first, geometry=Geometry.NONE)
    draw_own(own, second, geometry=Geometry.ALL)
    assert first.randint(2**31) == second.randint(2**31)


def test_points_are_moved_with_the_seed_of_their_picture():
    own = OwnAugment(Mirror())
    marked = np.zeros((8, 16, 3), np.uint8)
    marked[4, 3] = 255
    moved = set()
    for seed in range(20):
        draw = draw_own(own, np.random.RandomState(seed), geometry=Geometry.ALL)
        shown = draw.own.apply(marked)
        ((x, y),), inside = transform_points([[3.5, 4.5]], draw, width=16, height=8)
        assert shown[int(y), int(x)].all()
        assert inside.all()
        moved.add(x)
    assert moved == {3.5, 12.5}


def test_points_of_a_function_that_moves_nothing_stay_and_of_others_are_refused():
    rng = np.random.RandomState(0)
    still = draw_own(OwnAugment(Noise(3)), rng, geometry=Geometry.COLOR)
    points, inside = transform_points([[1, 2], [99, 2]], still, width=10, height=10)
    assert points.tolist() == [[1, 2], [99, 2]]
    assert inside.tolist() == [True, False]
    moving = draw_own(OwnAugment(speckle), rng, geometry=Geometry.ALL)
    with pytest.raises(ConfigError) as caught:
        transform_points([[1, 2]], moving, width=10, height=10)
    assert caught.value.reason == "augment_function"


@pytest.mark.parametrize(
    "augment, reason, want",
    [
        (outside, "augment_function", "one seed"),
        (smaller, "augment_function", "uint8 [27, 28, 3]"),
        (floats, "augment_function", "float64"),
        (nothing, "augment_function", "NoneType"),
        (failing, "user_function", "ZeroDivisionError: no such picture"),
    ],
)
def test_augmentation_that_breaks_its_word_is_named_with_the_sample(augment, reason, want, url):
    with pytest.raises(ConfigError) as caught:
        list(make(url, augment, decode_threads=0))
    assert caught.value.reason == reason
    assert augment.__name__ in str(caught.value)
    assert want in str(caught.value)
    keys = [key.decode() for key in stream(url).reader.column("key", np.arange(9))]
    assert caught.value.where in keys


@pytest.mark.parametrize("augment", ["standard", None, Mirror, 3], ids=str)
def test_augmentation_that_is_not_a_function_is_refused(augment):
    with pytest.raises(ConfigError) as caught:
        View(augment=augment)
    assert caught.value.reason == "augment_function"


def test_augmentation_that_cannot_be_sent_to_workers_is_refused_before_any_starts(url):
    with pytest.raises(ConfigError) as caught:
        list(make(url, lambda image, rng: image, workers=1))
    assert caught.value.reason == "worker_pickle"


def test_inference_does_not_augment(url):
    view = replace(stream(url, failing).view, purpose="inference")
    dataset = StreamingDataset(str(url), view=view)
    assert len(dataset.example(1)["images"]) == 1


# --- names in states


def named(function):
    return function_name(function)


def test_name_of_a_function_follows_its_source_and_what_it_holds():
    def blur(size, more=()):
        return lambda image, rng: image[::size] if more else image

    assert named(blur(1)) == named(blur(1))
    different = [
        *(speckle, smaller, blur(1), blur(2), blur(1, [1]), Mirror(), Mirror(0.25), Noise(1)),
        *(Noise(2), functools.partial(speckle, x=1), functools.partial(speckle, x=2)),
        *(Noise(np.zeros(3)), Noise(np.ones(3)), Noise({"a": 1}), Noise({"a": {2, 1}})),
        *(Mirror().__call__, Mirror(0.1).__call__, torch.flip, np.flip),
    ]
    names = [named(function) for function in different]
    assert len(set(names)) == len(different)
    assert all(re.fullmatch(r"[\w.<>]+ \([0-9a-f]{16}\)", name) for name in names), names
    assert names == [named(function) for function in different]


def test_name_that_the_user_gives_wins():
    noise = Noise(object())
    noise.fingerprint = "v2"
    assert named(noise) == f"{Noise.__module__}.Noise (v2)"


def test_function_without_source_is_named_by_its_code():
    names = []
    for text in ("image", "image + 1", "[x for x in image]"):
        space = {}
        exec(f"def own(image, rng): return {text}", space)
        names.append(named(space["own"]))
        exec(f"class Own:\n  def __call__(self, image, rng): return {text}", space)
        names.append(named(space["Own"]()))
    assert len(set(names)) == 6


def test_function_that_holds_what_cannot_be_seen_is_refused():
    with pytest.raises(ConfigError) as caught:
        OwnAugment(Noise(iter([])))
    assert caught.value.reason == "user_function"
    assert "most" in str(caught.value)


def test_view_with_a_function_is_described_by_its_name():
    told = view_fingerprint(View(augment=Mirror(0.25)))
    assert told["augment.function"] == named(Mirror(0.25))
    assert told["hash"] != view_fingerprint(View(augment=Mirror()))["hash"]
    assert "augment.function" not in view_fingerprint(View(augment=Augment.standard()))


@pytest.mark.parametrize(
    "before, after",
    [
        ({"augment": Mirror()}, {"augment": Mirror(0.1)}),
        ({"augment": Mirror()}, {}),
        ({}, {"augment": Mirror()}),
        ({"map": "lengths"}, {"map": "marked"}),
        ({"map": "lengths"}, {}),
        ({}, {"map": "lengths"}),
        ({"collate_fn": "listed"}, {}),
    ],
    ids=str,
)
def test_state_of_another_function_is_refused_unless_views_may_differ(before, after, url):
    def loader(functions):
        known = {name: globals()[f] if isinstance(f, str) else f for name, f in functions.items()}
        return make(url, decode_threads=0, **known)

    saved, other = loader(before), loader(after)
    next(iter(saved))
    with pytest.raises(StateError) as caught:
        other.load_state_dict(saved.state_dict())
    assert caught.value.reason == "state_view"
    other.load_state_dict(saved.state_dict(), allow=("view",))
    assert other.step == 1
    loader(before).load_state_dict(saved.state_dict())


# --- map and collate


def lengths(example, rng):
    """Marks the last label by what is drawn."""
    example["labels"][-1] = rng.randint(1000)
    return example


def marked(example, rng):
    return {**example, "labels": example["labels"] * 0 + 7}


def listed(examples):
    return [(example["metadata"]["key"], example["input_ids"].sum()) for example in examples]


def whole(example, rng):
    return example


def forgets(example, rng):
    example["labels"][:] = 0


def count(example, rng):
    return len(example["labels"])


def scores(example, rng):
    return {**example, "score": 1}


def breaks(example, rng):
    raise KeyError("boom")


def spoils(examples):
    return {}["boom"]


def summed(examples):
    return {"counts": torch.tensor(examples)}


def test_map_changes_examples_and_the_collator_pads_them(url):
    batches = list(make(url, map=marked, decode_threads=0))
    for batch, plain in zip(batches, make(url, decode_threads=0), strict=True):
        learned = batch["labels"] != -100
        assert (batch["labels"][learned] == 7).all()
        assert torch.equal(learned, plain["attention_mask"].bool())
        assert torch.equal(batch["images"], plain["images"])


def test_map_that_changes_nothing_gives_the_batches_of_none(url):
    options = {"with_metadata": True, "extra_keys": ("position_ids", "loss_weights")}
    got = list(make(url, map=whole, decode_threads=2, **options))
    want = list(make(url, decode_threads=2, **options))
    for one, other in zip(got, want, strict=True):
        assert one.pop("metadata") == other.pop("metadata")
    same(got, want)


def test_map_draws_the_same_in_threads_and_again_in_each_epoch(url):
    loader = make(url, map=lengths, decode_threads=0)
    want, later = list(loader), list(loader)
    same(list(make(url, map=lengths, decode_threads=2)), want)
    last = [
        {int(row[row != -100][-1]) for batch in e for row in batch["labels"]} for e in (want, later)
    ]
    assert len(last[0]) > 5
    assert last[0] != last[1]  # other draws in the next epoch


def test_own_collate_makes_the_batch_of_a_list_of_examples(url):
    want = [key for batch in make(url, with_metadata=True) for key in batch["metadata"]]
    got = [key for batch in make(url, collate_fn=listed) for key, _ in batch]
    assert got == [one["key"] for one in want]
    got = list(make(url, map=count, collate_fn=summed, decode_threads=0))
    assert [batch["counts"].shape for batch in got] == [(3,)] * 3


def test_packed_rows_go_through_functions_too(url):
    plain = list(make(url, pack=True, decode_threads=0, batch=1))
    same(list(make(url, pack=True, map=whole, decode_threads=0, batch=1)), plain)


@pytest.mark.parametrize(
    "functions, want",
    [
        ({"map": breaks}, "KeyError: 'boom'"),
        ({"collate_fn": spoils}, "KeyError: 'boom'"),
        ({"map": forgets}, "NoneType"),
        ({"map": forgets, "collate_fn": listed}, "NoneType"),
        ({"map": count}, "int"),
        ({"map": scores}, "adds score to the example"),
    ],
    ids=["map", "collate", "nothing", "nothing to collate", "no example", "a key of its own"],
)
def test_function_that_fails_is_named_with_its_samples(functions, want, url):
    with pytest.raises(ConfigError) as caught:
        list(make(url, decode_threads=1, **functions))
    assert caught.value.reason == "user_function"
    named = functions.get("map") or functions["collate_fn"]
    assert named.__name__ in str(caught.value)
    assert want in str(caught.value)
    keys = [key.decode() for key in stream(url).reader.column("key", np.arange(9))]
    assert any(key in caught.value.where for key in keys)


@pytest.mark.slow
def test_failure_in_a_worker_process_has_its_name_too(url):
    with pytest.raises(ConfigError) as caught:
        list(make(url, workers=1, map=breaks))
    assert caught.value.reason == "user_function"
    assert "test_user_functions.py:" in caught.value.facts["line"]


@pytest.mark.parametrize("name", ["map", "collate_fn"])
def test_what_is_not_a_function_is_refused(name, url):
    with pytest.raises(ConfigError) as caught:
        make(url, **{name: "list"})
    assert caught.value.reason == "argument"


# --- map-style datasets in mixtures


class Letters:
    """Examples that tell their dataset, their number and what they draw."""

    def __init__(self, name, length, split="train"):
        self.name, self.length, self.split = name, length, split

    def __len__(self):
        return self.length

    def get(self, item, rng):
        if item == 99:
            raise ZeroDivisionError("no letter")
        return {"of": self.name, "item": item, "drawn": rng.randint(2**30)}


class Plain(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, item):
        return {"of": "Plain", "item": item, "drawn": 0}


def again(example, rng):
    return {**example, "again": rng.randint(2**30)}


def mixed(*datasets, seed=5, **options):
    return IterableDatasetMixture(list(datasets), seed=seed, **options)


def test_map_style_datasets_draw_by_the_formula_and_a_preprocessor_draws_the_same():
    mixture = mixed(
        Letters("a", 10), DeterministicDataset(Letters("b", 20), again, seed=77), Plain()
    )
    examples = list(mixture)
    assert {one["of"] for one in examples} == {"a", "b", "Plain"}
    for one in examples:
        if one["of"] != "Plain":
            length = {"a": 10, "b": 20}[one["of"]]
            base = dataset_seed(5, one["of"], "train")
            seed = (base * 195172 + one["item"]) % (2**32 - 1)
            assert one["drawn"] == np.random.RandomState(seed).randint(2**30), length
            assert one.get("again", one["drawn"]) == one["drawn"]


def test_map_style_datasets_show_every_example_once_an_epoch():
    mixture = mixed(Letters("a", 10), Letters("b", 20), by="size", stop="all_exhausted")
    seen = [(one["of"], one["item"]) for one in mixture]
    assert sorted(seen) == [("a", i) for i in range(10)] + [("b", i) for i in range(20)]


@pytest.mark.parametrize(
    "options",
    [{"decode_threads": 2}, pytest.param({"workers": 1}, marks=pytest.mark.slow)],
    ids=str,
)
def test_map_style_datasets_give_the_same_in_a_loader_and_resume(options):
    def make(**options):
        mixture = mixed(Letters("a", 10), Letters("b", 20))
        return make_dataloader(mixture, global_batch_size=4, collate_fn=list, **options)

    want = list(make(decode_threads=0))
    first = make(**options)
    assert next(iter(first)) == want[0]
    later = make(**options)
    later.load_state_dict(first.state_dict())
    assert list(later) == want[1:]
    first.close()
    later.close()
    grown = make_dataloader(
        mixed(Letters("a", 11), Letters("b", 20)), global_batch_size=4, collate_fn=list
    )
    with pytest.raises(StateError):
        grown.load_state_dict(first.state_dict())


def test_map_style_datasets_are_divided_between_ranks_of_a_dataloader():
    whole = [one["item"] for one in mixed(Letters("a", 8), Plain(), batch_size=2)]
    loaded = DataLoader(
        mixed(Letters("a", 8), Plain(), batch_size=2), batch_size=2, collate_fn=list
    )
    assert [one["item"] for batch in loaded for one in batch] == whole


def test_example_of_a_map_style_dataset_that_raises_is_named():
    with pytest.raises(ConfigError) as caught:
        list(mixed(Letters("a", 100), Plain(), stop="all_exhausted"))
    assert caught.value.reason == "user_function"
    assert caught.value.where == "example 99"


def test_mixtures_without_examples_or_of_one_name_are_refused():
    with pytest.raises(ConfigError) as caught:
        mixed(Letters("a", 0), Plain())
    assert caught.value.reason == "map_style_empty"
    with pytest.raises(ShardsError):
        mixed(Letters("a", 1), Letters("a", 2))


def test_map_style_and_prepared_datasets_are_not_mixed(url):
    with pytest.raises(ConfigError) as caught:
        mixed(Letters("a", 3), stream(url))
    assert caught.value.reason == "mixture_kinds"
