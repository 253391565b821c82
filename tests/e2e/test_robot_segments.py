"""Samples of several windows of a robot's episode, of which each epoch draws one."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from loader import MolmoPreprocessor, StreamingDataset, View, make_dataloader
from loader.assembly import Augment, TokenIds
from loader.assembly.planner import Planner
from preprocess.datasets import get_dataset
from preprocess.job.job import JobSettings
from preprocess.job.pipeline import run_job
from preprocess.job.verify import verify, windows_fit
from preprocess.media import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.actions import (
    bin_tokens,
    normalize,
    openvla_tokens,
    value_bins,
    value_statistics,
)
from shardspec.errors import SampleError
from shardspec.keyed import SampleRng, dataset_seed, sample_seed
from shardspec.manifest import require_manifest
from shardspec.messages import messages
from shardspec.sample import SpanKind, image_rows, text_rows, window_images
from shardspec.tiling import ImageView
from tests import inline, model_folders, processor_folders
from tests.lerobot_folders import CAMERAS, episodes_of
from tests.robot_files import write_aloha
from tests.unsharded import require_unsharded

LENGTHS = (7, 4)
SEGMENTS = [((0, 0), (0, 1)), ((0, 2), (0, 3)), ((0, 4), (0, 5), (0, 6))]
SEGMENTS += [((1, 0), (1, 1)), ((1, 2), (1, 3))]
"""Episode and step of the windows of each sample: at most 3."""
SEED = 5
SMALL = ImageView(size_px=56, patch_px=14, max_crops=1)
RECIPE = Recipe(
    text=TextPolicy(system_prompt="none", num_variants=1),  # no draw but that of the window
    image=ImagePolicy(views=(SMALL,), codec="png"),
)
ARRAYS = ("actions", "action_mask", "state", "history_mask")
CODE = """
from preprocess.datasets import EpisodeFiles
from preprocess.episodes import EpisodeFields, WindowPolicy


class Arm(EpisodeFiles):
    name = "arm"
    validation_share = {share}
    fields = EpisodeFields(fps=10, task_field="task", action_names=("x", "y", "gripper"))
    window = WindowPolicy(
        history=2, history_hz=5.0, chunk=3, kept=("gripper",), segment={segment}, stride={stride}
    )
"""


def arm(source, folder, *, segment, stride=1, share=0.0):
    """Writes the dataset's class, and opens it."""
    path = folder / "arm.py"
    path.write_text(CODE.format(segment=segment, stride=stride, share=share))
    return f"{path}:Arm", get_dataset(f"{path}:Arm", source=str(source))


def built(source, folder, **options):
    name, dataset = arm(source, folder, **options)
    settings = JobSettings(
        dataset=name,
        source=str(source),
        out=str(folder / "shards"),
        cache=str(folder / "cache"),
        recipe=RECIPE,
        num_shards=2,
    )
    with inline.jobs():
        run_job(settings, inline.Quiet())
    return settings.out, dataset


@pytest.fixture(scope="module")
def episodes():
    return episodes_of(LENGTHS)


@pytest.fixture(scope="module")
def source(tmp_path_factory, episodes):
    return write_aloha(tmp_path_factory.mktemp("aloha"), episodes)


@pytest.fixture(scope="module")
def late(tmp_path_factory, source):
    url, dataset = built(source, tmp_path_factory.mktemp("late"), segment=3)
    return SimpleNamespace(url=url, dataset=dataset)


@pytest.fixture(scope="module")
def prepare():
    return Preparer(recipe=RECIPE, tokenizer=load_tokenizer())


@pytest.fixture(scope="module")
def enumerated(tmp_path_factory, source, prepare):
    """The example of each window as a sample of its own, and its metadata: by episode and step."""
    _, dataset = arm(source, tmp_path_factory.mktemp("enumerated"), segment=1)
    assemble = MolmoPreprocessor(
        lambda sample: sample, special_ids=prepare.tokenizer.special_ids, view=View(image=SMALL)
    )
    found = {}
    for i in range(len(dataset)):
        sample = prepare(dataset[i])
        metadata = sample.record["metadata"]
        example = assemble(sample, np.random.RandomState(0))
        found[metadata["episode"], metadata["step"]] = (example, sample.record)
    return found


EPOCHS = 8


def loader_of(url, *, batch, state=None, purpose="train", **options):
    stream = StreamingDataset(url, seed=SEED, view=View(image=SMALL, purpose=purpose), **options)
    loader = make_dataloader(
        stream,
        global_batch_size=batch,
        sequence_length=192,
        pad_mode="max_len",
        arrays=ARRAYS,
        metadata=True,
        decode_threads=0,
    )
    if state is not None:
        loader.load_state_dict(state)
    return loader


def steps_of(loader, count):
    """Takes batches, and gives of each what its rows are and hold."""
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    for batch in itertools.islice(endless, count):
        yield [
            (
                metadata["key"],
                metadata["record"]["step"],
                *(batch[name][row].numpy().tobytes() for name in ("input_ids", "images", *ARRAYS)),
            )
            for row, metadata in enumerate(batch["metadata"])
        ]


def test_each_epoch_draws_one_window_and_it_is_the_sample_that_enumerating_gives(
    late, enumerated, episodes
):
    met = {}
    loader, tokenizer = loader_of(late.url, batch=len(SEGMENTS)), load_tokenizer()
    statistics = value_statistics(np.concatenate([e.actions for e in episodes]))
    for _ in range(EPOCHS):
        (batch,) = loader
        assert len({metadata["key"] for metadata in batch["metadata"]}) == len(SEGMENTS)
        for row, metadata in enumerate(batch["metadata"]):
            record = metadata["record"]
            e, t = record["episode"], record["step"]
            met.setdefault(metadata["key"], set()).add((e, t))
            want, stored = enumerated[e, t]
            length = len(want["input_ids"])
            assert (batch["input_ids"][row, length:] == tokenizer.special_ids["pad"]).all()
            for name in ("input_ids", "labels"):
                assert np.array_equal(batch[name][row, :length], want[name]), name
            for name in ("images", "image_masks", "image_input_idx"):
                assert np.array_equal(batch[name][row], want[name]), name
            assert metadata["images"] == want["metadata"]["images"]
            told = {**stored["metadata"], "message_list": stored["message_list"]}
            assert {**record, **{name: told[name] for name in ARRAYS}} == told

            # The same from the episode itself.
            length, episode = LENGTHS[e], episodes[e]
            shown = [episode.frames[name][s][0, 0] for s in (max(t - 2, 0), t) for name in CAMERAS]
            assert np.array_equal(batch["images"][row, :, :, 28, 28], shown)
            rows = [min(t + i, length - 1) for i in range(3)]
            assert batch["actions"][row].numpy().tobytes() == episode.actions[rows].tobytes()
            assert batch["action_mask"][row].tolist() == [t + i < length for i in range(3)]
            assert batch["history_mask"][row].tolist() == [t >= 2, True]
            assert batch["state"][row].numpy().tobytes() == episode.state[t].tobytes()
            bins = value_bins(normalize(episode.actions[t : t + 3], statistics, kept=(2,)))
            answer = batch["labels"][row]
            text = tokenizer.decode(answer[answer >= 0][:-1].tolist())
            assert text.strip() == "; ".join(" ".join(map(str, each)) for each in bins.tolist())
    assert sorted(tuple(sorted(windows)) for windows in met.values()) == SEGMENTS


def test_frames_and_values_are_stored_once_and_described(late):
    reader, manifest = StreamingDataset(late.url).reader, require_manifest(late.url)
    assert manifest.recipe["window"]["segment"] == 3
    for i in range(len(SEGMENTS)):
        windows = reader.record(i)["metadata"]["windows"]
        steps = windows["each"]["step"]
        shown = {row for t in steps for row in (max(t - 2, 0), t)}
        assert len(image_rows(reader.read(i).spans)) == 2 * len(shown)
        assert len(windows["runs"]["actions"]) == len(steps) + 2
    assert not verify(late.url, inline.Quiet(), deep=True)


def test_the_segments_of_an_episode_are_in_one_shard(late):
    reader = StreamingDataset(late.url).reader
    episodes = [reader.record(i)["metadata"]["episode"] for i in range(len(SEGMENTS))]
    sizes = [shard.nsamples for shard in require_manifest(late.url).shards]
    assert sorted(sizes) == [2, 3]
    assert len({*episodes[: sizes[0]]}) == len({*episodes[sizes[0] :]}) == 1


def test_lengths_of_the_index_are_those_of_the_longest_window(late, enumerated):
    reader = StreamingDataset(late.url).reader
    longest = reader.column("view_length", np.arange(len(SEGMENTS)))[:, 0]
    crops = reader.column("view_crops", np.arange(len(SEGMENTS)))[:, 0]
    for i in range(len(SEGMENTS)):
        metadata = reader.record(i)["metadata"]
        steps = metadata["windows"]["each"]["step"]
        examples = [enumerated[metadata["episode"], t][0] for t in steps]
        assert longest[i] == max(len(each["input_ids"]) for each in examples)
        assert crops[i] == len(examples[0]["images"])


def test_shards_equal_the_unsharded_path_with_augmentation(late, prepare):
    view = View(image=SMALL, augment=Augment.standard())
    rows = late.dataset
    require_unsharded(late.url, rows, prepare, view=view, seed=SEED, epochs=3, num_images=4)


def test_draws_are_the_same_on_any_number_of_ranks_and_after_a_resume(late):
    options = {"batch": 4, "canonical_ranks": 2}
    want = list(steps_of(loader_of(late.url, **options), 6))
    assert len({(key, t) for step in want for key, t, *_ in step}) > len(SEGMENTS)
    ranks = [loader_of(late.url, rank=rank, world_size=2, **options) for rank in range(2)]
    got = [a + b for a, b in zip(*(steps_of(loader, 3) for loader in ranks), strict=True)]
    state = json.loads(json.dumps(ranks[0].state_dict()))
    got += steps_of(loader_of(late.url, state=state, **options), 3)
    assert [sorted(step) for step in got] == [sorted(step) for step in want]


def test_a_pack_has_each_sample_once_in_an_epoch(late, enumerated):
    stream = StreamingDataset(late.url, seed=SEED, view=View(image=SMALL))
    loader = make_dataloader(
        stream, global_batch_size=1, sequence_length=512, pack=True, metadata=True, decode_threads=0
    )
    for _ in range(2):
        examples = [one for batch in loader for row in batch["metadata"] for one in row["examples"]]
        places = [(one["record"]["episode"], one["record"]["step"]) for one in examples]
        assert len({one["key"] for one in examples}) == len(examples) == len(SEGMENTS)
        assert len({*places} & {*enumerated}) == len(SEGMENTS)


def test_an_evaluation_asks_every_window_once(late, enumerated):
    loader = loader_of(late.url, purpose="evaluation", batch=1, tail="pad")
    found = [batch["metadata"][0]["record"] for batch in loader]
    assert sorted((each["episode"], each["step"]) for each in found) == sorted(enumerated)


def test_the_windows_of_a_sample_are_drawn_equally_often(late, prepare):
    """Chi-square with 2 degrees of freedom: 13.8 is exceeded with a probability of 0.001."""
    stream, number = StreamingDataset(late.url, seed=SEED), len(SEGMENTS)
    ids = TokenIds.from_special_ids(prepare.tokenizer.special_ids)
    planner, rng = Planner(View(image=SMALL), ids), SampleRng()
    for i in range(number):
        sample = stream.reader.read(i)
        drawn = []
        for epoch in range(400):
            seed = sample_seed(dataset_seed(SEED, "arm"), idx=i, length=number, epoch=epoch)
            drawn.append(planner.plan(sample.tokens, sample.spans, rng(seed)).window)
        counts = np.bincount(drawn)
        assert len(counts) == len(window_images(sample.spans))
        expected = len(drawn) / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < 13.8


@pytest.mark.parametrize("form", ["tokens", "openvla"])
def test_each_window_has_the_tokens_of_its_actions(late, episodes, prepare, form):
    recipe = replace(RECIPE, text=replace(RECIPE.text, actions=form))
    prepare, size = replace(prepare, recipe=recipe), prepare.tokenizer.own_size
    statistics = value_statistics(np.concatenate([e.actions for e in episodes]))
    sample = prepare(late.dataset[2])
    for row, (e, t) in zip(text_rows(sample.spans).tolist(), SEGMENTS[2], strict=True):
        scaled = normalize(episodes[e].actions[t : t + 3], statistics, kept=(2,))
        want = {
            "tokens": bin_tokens(value_bins(scaled), vocab_size=size),
            "openvla": openvla_tokens(scaled, vocab_size=size),
        }[form]
        assert sample.tokens[row[5] : row[6]].tolist()[-want.size :] == want.flatten().tolist()


def test_inference_shows_the_first_window(late, enumerated):
    stream = StreamingDataset(late.url, view=View(image=SMALL, purpose="inference"))
    for i in range(len(SEGMENTS)):
        example = stream.example(i, epoch=7)
        metadata = stream.reader.record(i)["metadata"]
        want, _ = enumerated[metadata["episode"], metadata["windows"]["each"]["step"][0]]
        assert np.array_equal(example["images"], want["images"])
        assert np.array_equal(example["input_ids"], want["input_ids"])


def test_an_episode_is_in_one_split(tmp_path):
    source = write_aloha(tmp_path / "many", episodes_of([3] * 8))
    name, _ = arm(source, tmp_path, segment=2, share=0.4)
    found = [
        {row["episode"] for row in get_dataset(name, split, source=str(source)).rows}
        for split in ("train", "validation")
    ]
    assert found[0] | found[1] == set(range(8))
    assert not found[0] & found[1]
    assert all(found)


def test_steps_between_windows_that_no_window_has_may_be_unusable(tmp_path):
    """With a stride above the chunk: JSON has no value for them."""
    episodes = episodes_of([9])
    episodes[0].actions[4] = np.nan
    _, dataset = arm(write_aloha(tmp_path / "x", episodes), tmp_path, segment=2, stride=5)
    windows = dataset[0]["metadata"]["windows"]
    assert (windows["first"], windows["each"]["step"]) == ([0, 5], [0, 5])
    assert windows["runs"]["actions"][4] == [0.0] * 3
    assert windows["runs"]["actions"][5] == episodes[0].actions[5].tolist()


def test_a_segment_with_an_unusable_window_is_refused(tmp_path):
    episodes = episodes_of([6])
    episodes[0].actions[4, 1] = np.nan
    _, dataset = arm(write_aloha(tmp_path / "x", episodes), tmp_path, segment=2)
    assert len(dataset[0]["message_list"]) == 2  # its actions end in front of step 4
    for i in (1, 2):
        with pytest.raises(SampleError) as caught:
            dataset[i]
        assert caught.value.reason == "robot_values"


@pytest.mark.parametrize(
    "windows, change, code",
    [
        ([[0, 1]], {}, "sample_windows.images"),
        ([[0, 1], [0, 9]], {}, "sample_windows.images"),
        ([[0, 1], [0]], {}, "sample_windows.sizes"),
        ([[0, 1], [1, 0]], {}, "sample_windows.sizes"),
        ([[], []], {}, "sample_windows.sizes"),
        ([[0, 1], [2, 3]], {"instruction": "Here: <|image|>"}, "sample_windows.media"),
    ],
)
def test_windows_that_do_not_fit_are_refused(late, prepare, windows, change, code):
    example = late.dataset[0]
    changed = [{**message, **change} for message in example["message_list"]]
    with pytest.raises(SampleError) as caught:
        prepare({**example, "windows": windows, "message_list": changed})
    assert (caught.value.reason, caught.value.what) == ("sample_windows", messages()[code].what)


@pytest.mark.parametrize(
    "row, column, value",
    [(0, 2, 99), (0, 2, -2), (0, 2, 1), (1, 1, 0), (1, 1, 3), (2, 2, -1)],
    ids=["image 99", "image -2", "another size", "no window 1", "window 3", "fewer images"],
)
def test_windows_of_another_writer_are_verified(late, row, column, value):
    reader = StreamingDataset(late.url).reader
    tables = [reader.read(i).spans.copy() for i in range(len(SEGMENTS))]
    assert all(map(windows_fit, tables))
    spans = next(table for table in tables if len(window_images(table)) == 3)
    windows = np.flatnonzero(spans[:, 0] == SpanKind.WINDOW.value)
    spans[windows[row], column] = value
    assert not windows_fit(spans)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "aya_vision"])
def test_windows_of_a_dataset_for_a_model_are_those_that_enumerating_gives(
    source, tmp_path, inline_cli, name
):
    """Twice: pictures whose tokens the loader writes, and those of the model's own processor."""
    if name in model_folders.WRITERS:
        model_folders.WRITERS[name](tmp_path / "model")
    else:
        processor_folders.write(name, tmp_path / "model")
    examples = []
    for segment in (1, 3):
        folder = tmp_path / str(segment)
        folder.mkdir()
        dataset, _ = arm(source, folder, segment=segment)
        epochs = 1 if segment == 1 else 4
        inline_cli.good(
            *("shards", dataset, "--source", source, "--model", tmp_path / "model"),
            *("--out", folder / "x", "--cache", folder / "cache", "--codec", "png"),
            *("--workers", 1, "--system-prompt", "none", "--prompts", "none"),
        )
        stream = StreamingDataset(str(folder / "x"), seed=SEED)
        loader = make_dataloader(
            stream, global_batch_size=1, sequence_length=4096, metadata=True, decode_threads=0
        )
        found = {}
        for batch in itertools.chain.from_iterable(itertools.repeat(loader, epochs)):
            (metadata,) = batch.pop("metadata")
            record = metadata["record"]
            place = record["episode"], record["step"]
            found[place] = (record, metadata["images"], batch)
        examples.append(found)
    enumerated, late = examples
    assert len(enumerated) == sum(LENGTHS)
    assert len(late) > len(SEGMENTS)
    asked = make_dataloader(
        StreamingDataset(str(folder / "x"), view=View(purpose="evaluation"), tail="pad"),
        global_batch_size=1,
        sequence_length=4096,
        metadata=True,
        decode_threads=0,
    )
    records = [batch["metadata"][0]["record"] for batch in asked]
    assert sorted((each["episode"], each["step"]) for each in records) == sorted(enumerated)
    for place, (record, images, batch) in late.items():
        want = enumerated[place]
        assert (record, images) == want[:2]
        assert batch.keys() == want[2].keys()
        for field, value in batch.items():
            assert np.array_equal(value, want[2][field]), field
