"""Videos from the file to the batch: shards change speed, never content.

With a lossless codec the invariant of `test_invariant` holds for stored frames too, and for clips,
which are decoded at load on both paths: which frames an example has is drawn from the sample's
generator.
"""

import itertools
import json
import re
import tarfile
import threading
from dataclasses import replace
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from loader import (
    Augment,
    DeterministicDataset,
    IterableDatasetMixture,
    MolmoPreprocessor,
    StreamingDataset,
    View,
    make_dataloader,
)
from loader.assembly import TokenIds, assemble
from preprocess.datasets import get_dataset
from preprocess.fetch import FetchPolicy
from preprocess.formats import Spec, parse_row
from preprocess.job import JobSettings, run_job, verify
from preprocess.job.build import prepare_row
from preprocess.media import ImagePolicy, VideoPolicy, encode_video
from preprocess.recipe import Preparer, Recipe
from preprocess.synthetic import COLORS, SHAPES, plan_clip, render_clip
from preprocess.text import DataFormatter, TextPolicy, load_tokenizer
from shardspec.errors import ConfigError, SampleError
from shardspec.keyed import dataset_seed
from shardspec.sample import text_rows, video_rows
from shardspec.tiling import FrameView, ImageView, image_token_ids
from shardspec.video import read_frames
from tests import inline

pytest.importorskip("av")

SEED = 7
SMALL = ImageView(size_px=84, patch_px=14)
RECIPE = Recipe(
    text=TextPolicy(num_variants=2),
    image=ImagePolicy(views=(SMALL,), codec="png"),
    video=VideoPolicy(max_frames=7),
    seed=3,
)
CLIPS = replace(RECIPE, video=VideoPolicy(max_frames=7, store="clip"))
VIEWS = {
    "all-frames": FrameView(),
    "three-random-frames": FrameView(max_frames=3),
    "pool-2-around-the-video": FrameView(pool=(2, 2), marks="video", max_frames=4),
    "no-times-no-marks": FrameView(timestamps=False, marks="none"),
}


@pytest.fixture(scope="module")
def prepare():
    return Preparer(recipe=RECIPE, tokenizer=load_tokenizer())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The shards of five generated clips."""
    folder = tmp_path_factory.mktemp("videos")
    settings = JobSettings(
        dataset="moving_shapes",
        source="sample",
        limit=5,
        out=str(folder / "shards"),
        cache=str(folder / "cache"),
        recipe=RECIPE,
        num_shards=2,
    )
    with inline.jobs():
        run_job(settings, inline.Quiet())
    return settings.out


class InStoredOrder:
    def __init__(self, prepared):
        self.prepared = prepared

    def __len__(self):
        return len(self.prepared)

    def get(self, item, rng):
        return self.prepared[item]


def in_stored_order(rows, built, prepare):
    """The prepared samples of the rows themselves."""
    samples = {sample.key: sample for sample in (prepare(rows.get(i)) for i in range(len(rows)))}
    reader = StreamingDataset(built).reader
    return InStoredOrder([samples[reader.read(i).key] for i in range(len(samples))])


@pytest.fixture(scope="module")
def unsharded(built, prepare):
    rows = get_dataset("moving_shapes", source="sample", limit=5)
    return in_stored_order(rows, built, prepare)


def assert_equal_examples(built, unsharded, view, ids):
    """Compares two epochs of all samples; returns the frames that each was drawn."""
    stream = StreamingDataset(built, seed=SEED, view=view)
    other = DeterministicDataset(
        unsharded,
        MolmoPreprocessor(lambda s: s, special_ids=ids, view=view),
        seed=dataset_seed(SEED, stream.manifest.dataset),
    )
    times = set()
    for number in range(len(unsharded)):
        for epoch in (0, 1):
            got, want = stream.example(number, epoch=epoch), other.get(number, epoch=epoch)
            assert want["metadata"].pop("valid")
            assert got["metadata"] == want["metadata"]
            assert got.keys() == want.keys()
            for key in got.keys() - {"metadata"}:
                assert got[key].tobytes() == want[key].tobytes(), key
            times.add((number, *got["metadata"]["frame_times_s"]))
    return times


@pytest.mark.parametrize("name", VIEWS)
def test_batches_from_shards_equal_the_unsharded_ones(name, built, unsharded, prepare):
    view = View(image=SMALL, frames=VIEWS[name], augment=Augment.standard(), image_map="pooling")
    times = assert_equal_examples(built, unsharded, view, prepare.tokenizer.special_ids)
    # Frames are drawn anew in each epoch, where there are more of them.
    assert len(times) > 5 if VIEWS[name].max_frames else len(times) == 5


def test_loader_takes_the_view_that_the_shards_were_made_for(built):
    loader = make_dataloader(
        StreamingDataset(built, seed=SEED), global_batch_size=2, sequence_length=1024, workers=0
    )
    batch = next(iter(loader))
    patches = int((batch["input_ids"] == loader.dataset.ids.image.im_patch).sum())
    assert patches == batch["images"].shape[0] * batch["images"].shape[1] * 4 or patches % 4 == 0
    assert loader.dataset.view.frames == FrameView()


def test_recorded_lengths_hold_every_draw_and_pack(built):
    view = View(image=SMALL, frames=FrameView(max_frames=3))
    stream = StreamingDataset(built, seed=SEED, view=view)
    builder = stream._stream.parts[0].builder
    tokens, crops = builder.lengths(np.arange(5))
    for number in range(5):
        example = stream.example(number)
        assert len(example["input_ids"]) <= tokens[number]
        assert len(example["images"]) <= crops[number]
    everything = StreamingDataset(built, seed=SEED)
    tokens, crops = everything._stream.parts[0].builder.lengths(np.arange(5))
    for number in range(5):
        assert len(everything.example(number)["images"]) == crops[number]
    smaller = replace(view, frames=FrameView(pool=(2, 2)))
    with pytest.raises(ConfigError, match="smaller pool"):
        StreamingDataset(built, view=smaller)._stream.parts[0].builder.lengths(np.arange(5))


def test_evaluation_sees_the_same_frames_each_time(built):
    view = View(image=SMALL, frames=FrameView(max_frames=3), purpose="inference")
    stream = StreamingDataset(built, seed=SEED, view=view)
    first = [stream.example(0, epoch=epoch) for epoch in (0, 1)]
    assert np.array_equal(first[0]["images"], first[1]["images"])
    times = first[0]["metadata"]["frame_times_s"]
    assert len(times) == 3
    assert times[0] == 0.0


def test_each_question_of_an_evaluation_is_asked_about_the_same_frames(built):
    view = View(image=SMALL, frames=FrameView(max_frames=3), purpose="evaluation")
    stream = StreamingDataset(built, seed=SEED, view=view, tail="pad")
    loader = make_dataloader(stream, global_batch_size=2, sequence_length=1024, with_metadata=True)
    asked = [one for batch in loader for one in batch["metadata"]]
    times = {one["key"]: one["frame_times_s"] for one in asked}
    assert len(asked) > len(times) > 2
    assert all(one["frame_times_s"] == times[one["key"]] for one in asked)
    assert all(len(each) == 3 for each in times.values())


def test_sample_says_where_its_frames_are_from(built):
    names = []
    for shard in StreamingDataset(built).manifest.shards:
        with tarfile.open(f"{built}/{shard.url}") as tar:
            names += [m for m in tar.getnames() if m.endswith(".json")]
            record = json.load(tar.extractfile(next(n for n in names if n in tar.getnames())))
    video = record["video"]
    assert len(video["frame_times_s"]) == len(video["frame_numbers"]) <= 7
    assert video["frame_times_s"][0] == 0.0
    assert video["codec"] == "h264"
    assert video["fps"] > 9
    assert video["damaged"] == 0
    assert video["decoder"].startswith("PyAV")
    assert video["access"] == "index"
    assert verify(built, inline.Quiet(), deep=True) == []


def test_stored_frames_show_the_scenes_of_the_clip(prepare):
    """A frame before a cut has the first background, one after it the second."""
    seed, idx = next(
        (s, i) for s in range(1) for i in range(50) if len(plan_clip(s, i).scenes) == 2
    )
    plan = plan_clip(seed, idx)
    file = encode_video(render_clip(plan), fps=plan.fps)
    message = {"style": "vqa2", "question": "What is it?", "answer": "a clip"}
    sample = prepare({"video": file, "message_list": [message]})
    frames = list(render_clip(plan))
    for image, number in zip(sample.images, sample.record["video"]["frame_numbers"], strict=True):
        want = np.asarray(Image.fromarray(frames[number]).resize((84, 84), 3), np.int16)
        assert np.abs(image.pixels.astype(np.int16) - want).mean() < 6


def drawn_color(sample, time_s, x, y):
    """The pixel of a stored frame at a place in thousandths."""
    times = sample.record["video"]["frame_times_s"]
    frame = next(i for i, t in enumerate(times) if f"{t:.1f}" == time_s)
    height, width = sample.images[frame].pixels.shape[:2]
    return sample.images[frame].pixels[int(y) * height // 1000, int(x) * width // 1000]


def answers_of(mode, *, limit):
    """The plans of generated clips, and each message with its answer."""
    rows = get_dataset("moving_shapes", source="sample", limit=limit, mode=mode)
    formatter = DataFormatter(policy=TextPolicy(num_variants=1))
    for i in range(limit):
        example = rows.get(i)
        (video,) = example["video"]
        branches = formatter(example, key="k")
        for message, branch in zip(example["message_list"], branches, strict=True):
            yield plan_clip(video.seed, video.idx), message, branch.turns[0][0].response


def test_tracks_of_generated_clips_lead_to_the_shapes(prepare):
    followed = 0
    example = get_dataset("moving_shapes", source="sample", limit=1, mode="tracks").get(0)
    sample = prepare(example)
    texts = {row[1]: row[5:7] for row in text_rows(sample.spans)[::-1].tolist()}
    for branch, message in enumerate(example["message_list"]):
        answer = prepare.tokenizer.decode(sample.tokens[slice(*texts[branch])].tolist())
        match = re.fullmatch(r' <tracks coords="(.*)">(.*)</tracks>', answer)
        assert match[2] == message["label"]
        for time_s, number, x, y in [group.split() for group in match[1].split(";")]:
            assert number == "1"
            seen = drawn_color(sample, time_s, x, y).astype(int)
            assert np.abs(seen - COLORS[message["label"].split()[0]]).max() < 60
            followed += 1
    assert followed > 8


@pytest.mark.slow
@pytest.mark.parametrize("store", ["frames", "clip"])
@pytest.mark.parametrize("mode", ["tracks", "points"])
def test_frames_that_a_text_names_are_in_every_example(mode, store, prepare):
    """Whatever the view: nothing is drawn among them, and a clip gives no others."""
    recipe = replace(RECIPE, video=VideoPolicy(max_frames=4, store=store))
    sample = replace(prepare, recipe=recipe)(
        get_dataset("moving_shapes", source="sample", mode=mode, limit=1).get(0)
    )
    record = [round(time_s, 3) for time_s in sample.record["video"]["frame_times_s"]]
    ids = TokenIds.from_special_ids(prepare.tokenizer.special_ids)
    for most, purpose in ((2, "train"), (None, "train"), (1, "inference")):
        view = View(image=SMALL, frames=FrameView(max_frames=most), purpose=purpose)
        rng = np.random.RandomState(most) if purpose == "train" else None
        example = assemble(sample, rng, view=view, ids=ids)
        assert example["metadata"]["frame_times_s"] == record
        assert len(example["images"]) == len(record) == 4
    if mode == "tracks":
        text = prepare.tokenizer.decode(example["input_ids"].tolist())
        told = {float(each) for each in re.findall(r"(?:\"|;)([0-9.]+) 1 ", text)}
        assert told <= {round(time_s, 1) for time_s in record}


def test_counts_of_generated_clips_are_those_of_their_shapes():
    counts = set()
    for plan, message, answer in answers_of("points", limit=4):
        kind = next(kind for kind in SHAPES if message["label"] in (f"{kind}s", f"{kind}es"))
        count = sum(shape.shape == kind for shape in plan.shapes)
        counts.add(count)
        assert (answer == " There are none.") == (not count)
        if count:
            (coords,) = re.findall('coords="(.*)"', answer)
            assert sum(len(group.split()) // 3 for group in coords.split(";")) == count
            assert answer.endswith(f" {count}.") == (message["style"] == "video_point_count")
    assert {0, 1} <= counts


def test_choices_of_generated_clips_are_the_true_ones():
    for plan, message, answer in answers_of("choices", limit=4):
        name = re.fullmatch("What does the (.*) do\\?", message["question"])[1]
        (told,) = [said for said in message["options"] if said in answer]
        assert f"{name} {told}" in plan.caption


def test_view_without_frames_takes_those_of_the_recipe_or_is_refused_by_name(clips, prepare):
    row = get_dataset(str(clips / "captions.jsonl")).get(0)
    ids = prepare.tokenizer.special_ids
    named = MolmoPreprocessor(prepare, special_ids=ids, view=View(image=SMALL, frames=FrameView()))
    usual = MolmoPreprocessor(prepare, special_ids=ids, view=View(image=SMALL))
    got, want = (each(row, np.random.RandomState(0)) for each in (usual, named))
    assert np.array_equal(got["input_ids"], want["input_ids"])
    assert np.array_equal(got["images"], want["images"])
    preprocessor = MolmoPreprocessor(lambda row: prepare(row), special_ids=ids)
    with pytest.raises(SampleError, match="does not say how its frames are seen") as found:
        preprocessor(row, np.random.RandomState(0))
    assert found.value.reason == "video_view"


def test_file_that_changes_between_plan_and_build_is_named(prepare, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"1")
    row = {
        "key": "a",
        "image": None,
        "video": [{"kind": "path", "path": str(path), "sha256": "0" * 64}],
        "example": {"message_list": [{"style": "vqa2", "question": "What?", "answer": "a"}]},
    }
    with pytest.raises(SampleError) as found:
        prepare_row(prepare, row, cache=None)
    assert found.value.reason == "video_changed"


def test_packs_of_videos_show_every_sample_once(built):
    loader = make_dataloader(
        StreamingDataset(built, seed=SEED),
        global_batch_size=1,
        sequence_length=2048,
        pack=True,
        with_metadata=True,
    )
    rows = [row for batch in loader for row in batch["metadata"]]
    keys = [one["key"] for row in rows for one in row["examples"]]
    assert len(keys) == len(set(keys)) == 5


CODE = """
from preprocess.datasets import DatasetBase

class Clips(DatasetBase):
    videos = {videos}
    several_images = True

    def load(self):
        message = {{"style": "vqa2", "question": "What is it?", "answer": "a clip"}}
        return [{{"video": {video}, "message_list": [message]}}]
"""


@pytest.mark.parametrize(
    "videos, video, reason",
    [("False", "b'0'", "video_dataset"), ("True", "7", "video_type")],
)
def test_classes_that_give_videos_otherwise_are_refused(videos, video, reason, tmp_path):
    (tmp_path / "mine.py").write_text(CODE.format(videos=videos, video=video))
    settings = JobSettings(
        dataset=f"{tmp_path / 'mine.py'}:Clips",
        out=str(tmp_path / "shards"),
        cache=str(tmp_path / "cache"),
        recipe=RECIPE,
    )
    with inline.jobs(), pytest.raises(ConfigError) as found:
        run_job(settings, inline.Quiet())
    assert found.value.reason == reason


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of two clips of a second each, and rows about them."""
    folder = tmp_path_factory.mktemp("own")
    for i in range(2):
        frames = [np.full((48, 64, 3), 20 * t + i, np.uint8) for t in range(10)]
        (folder / f"{i}.mp4").write_bytes(encode_video(frames, fps=Fraction(10)))
    captions = [{"video": f"{i}.mp4", "caption": f"It gets lighter, {i}."} for i in range(2)]
    questions = [
        {"video": "0.mp4", "question": "What happens?", "answer": "fading", "start": 0.5},
        {"video": "0.mp4", "question": "What happens?", "answer": "fading", "end": 0.35},
        {"video": "1.mp4", "question": "What happens?", "answer": "fading"},
    ]
    for name, rows in {"captions": captions, "questions": questions}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_own_rows_with_a_column_of_videos_become_samples(clips, tmp_path):
    settings = JobSettings(
        dataset=str(clips / "captions.jsonl"),
        out=str(tmp_path / "shards"),
        cache=str(tmp_path / "cache"),
        recipe=RECIPE,
    )
    with inline.jobs():
        run_job(settings, inline.Quiet())
    stream = StreamingDataset(settings.out, split="train")
    got = [stream.example(i)["metadata"]["frame_times_s"] for i in range(2)]
    assert got == [[0.0, 0.5, 0.9]] * 2
    assert not verify(settings.out, inline.Quiet(), deep=True)


PLACED = [
    ["First <|video|>, then <|image|> and <|video|>?", "Alike.", "Sure?", "Yes."],
    ["Ready?", "Yes.", "What is <|image|>?", "Grey.", "And <|video|>, <|video|>?", "Lighter."],
]


def placed_example(clips, texts):
    videos = [(clips / f"{i}.mp4").read_bytes() for i in range(2)]
    message = {"style": "demo", "messages": texts}
    image = np.full((84, 84, 3), 200, np.uint8)
    return {"video": videos, "clip": [None, [0.35, 0.8]], "image": image, "message_list": [message]}


def frames_by_hand(times_s, marks, special, encode):
    """The tokens of a video, and where the block of each of its frames begins."""
    begin, end = [special["<frame_start>"]], [special["<frame_end>"]]
    patches = [special["<im_patch>"]] * 4
    block, starts = begin if marks == "video" else [], []
    for time_s in times_s:
        block = block + encode(f"{' ' * bool(starts)}{time_s:.1f} ")
        starts.append(len(block))
        block += [*begin, *patches, *end] if marks == "frame" else patches
    return block + (end if marks == "video" else []), starts


@pytest.mark.parametrize("marks", ["frame", "video"])
@pytest.mark.parametrize("texts", PLACED)
def test_videos_and_images_are_where_the_text_has_them(texts, marks, clips, prepare):
    tokenizer = prepare.tokenizer
    special, ids = tokenizer.special_ids, TokenIds.from_special_ids(tokenizer.special_ids)
    sample = prepare(placed_example(clips, texts))
    image = (image_token_ids(84, 84, SMALL, ids.image).tolist(), [0])
    videos = iter(
        frames_by_hand(record["frame_times_s"], marks, special, tokenizer.encode)
        for record in sample.record["videos"]
    )
    kinds = re.findall(r"<\|(image|video)\|>", "".join(texts))
    units = iter([image if kind == "image" else next(videos) for kind in kinds])
    want, starts = [special["bos"]], []
    variants = {row[2]: row for row in text_rows(sample.spans)[::-1].tolist()}  # the first of each
    for turn, row in sorted(variants.items()):
        prompt, prompt_stop, response, stop = row[3:7]
        tokens = [*sample.tokens[prompt:prompt_stop], *sample.tokens[response:stop]]
        for token in [special["eos"], *tokens] if turn else tokens:
            unit, own = next(units) if token == special["<|image|>"] else ([int(token)], [])
            starts += [len(want) + start for start in own]
            want += unit
    view = View(image=SMALL, frames=FrameView(marks=marks), purpose="inference")
    got = assemble(sample, None, view=view, ids=ids)
    assert got["input_ids"].tolist() == want
    first_patches = [want.index(special["<im_patch>"], start) for start in starts]
    assert got["image_input_idx"].tolist() == first_patches
    assert len(first_patches) == len(sample.images) > 5
    videos = [range(first, first + n) for _, _, first, n, *_ in video_rows(sample.spans).tolist()]
    stored = {"image": [[0]], "video": videos}
    for i, made in zip([i for k in kinds for i in stored[k].pop(0)], got["images"], strict=True):
        assert abs(sample.images[i].pixels.mean() - made.mean()) < 1  # each is of one colour


def test_question_is_asked_about_the_videos_that_have_come_by_then(clips, prepare):
    view = View(image=SMALL, frames=FrameView(), purpose="evaluation")
    ids = TokenIds.from_special_ids(prepare.tokenizer.special_ids)
    sample = prepare(placed_example(clips, PLACED[1]))
    asked = [assemble(sample, None, view=view, ids=ids, question=q) for q in range(3)]
    assert [len(one["images"]) for one in asked] == [0, 1, len(sample.images)]


def test_own_conversations_about_videos_are_the_same_with_and_without_shards(
    clips, prepare, tmp_path
):
    Image.new("RGB", (84, 84), "gray").save(clips / "a.png")
    texts = ["Is <image> in <video> or in <video>?", "<video>\nWhat happens?"]
    media = [{"image": "a.png", "video": ["0.mp4", "1.mp4"]}, {"video": "1.mp4", "start": 0.5}]
    (clips / "said.srt").write_text("1\n00:00:00,200 --> 00:00:00,900\nIt is late.\n")
    media[0]["subtitles"] = [None, "said.srt"]
    media[1]["subtitles"] = [[0.2, 0.7, "It begins."], [0, 0.1, "It is over."]]
    rows = [
        {**each, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]}
        for each, text in zip(media, texts, strict=True)
    ]
    rows.append({**rows[0], "image": None})
    (clips / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = JobSettings(
        dataset=str(clips / "chats.jsonl"),
        out=str(tmp_path / "shards"),
        cache=str(tmp_path / "cache"),
        recipe=RECIPE,
        max_lost_rows=0.5,
    )
    with inline.jobs():
        outcome = run_job(settings, inline.Quiet())
    assert outcome.result.split.quarantined == {"placeholder_without_image": 1}
    view = View(image=SMALL, frames=FrameView(max_frames=2), image_map="pooling")
    stream = StreamingDataset(settings.out, seed=SEED, view=view)
    dataset = get_dataset(str(clips / "chats.jsonl"))
    samples = {sample.key: sample for sample in (prepare(dataset.get(i)) for i in range(2))}
    other = DeterministicDataset(
        InStoredOrder([samples[stream.reader.read(i).key] for i in range(2)]),
        MolmoPreprocessor(lambda s: s, special_ids=prepare.tokenizer.special_ids, view=view),
        seed=dataset_seed(SEED, stream.manifest.dataset),
    )
    for number, epoch in itertools.product(range(2), range(2)):
        got, want = stream.example(number, epoch=epoch), other.get(number, epoch=epoch)
        assert all(got[k].tobytes() == want[k].tobytes() for k in got.keys() - {"metadata"})
        text = prepare.tokenizer.decode(got["input_ids"].tolist())
        assert ("\n0.2 - 0.9 It is late.\n" in text) + ("\n0.0 - 0.2 It begins.\n" in text) == 1
        assert "over" not in text
    assert not verify(settings.out, inline.Quiet(), deep=True)


def test_videos_that_cannot_be_used_are_quarantined_by_name(clips, tmp_path):
    (clips / "text.mp4").write_text("no video")
    rows = [{"video": f"{i}.mp4", "caption": "It gets lighter."} for i in (0, 1, "text", "absent")]
    rows.append({"video": "0.mp4", "caption": "It is too late.", "start": 7})
    (clips / "broken.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = JobSettings(
        dataset=str(clips / "broken.jsonl"),
        out=str(tmp_path / "shards"),
        cache=str(tmp_path / "cache"),
        recipe=RECIPE,
        max_lost_rows=1.0,
        max_bad_samples=1.0,
    )
    with inline.jobs():
        outcome = run_job(settings, inline.Quiet())
    reasons = outcome.result.split.quarantined
    assert reasons == {"video_open": 2, "video_clip": 1}
    assert outcome.result.split.num_samples == 2


@pytest.fixture
def web(clips):
    """A server of the folder of clips, and what it was asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args, **more):
            super().__init__(*args, directory=str(clips), **more)

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def test_videos_are_fetched_once_and_are_the_same_from_anywhere(clips, web, prepare, tmp_path):
    address, asked = web
    (clips / "page.mp4").write_text("<!doctype html><p>It is gone.")
    store = fsspec.filesystem("memory")
    store.pipe("/clips/1.mp4", (clips / "1.mp4").read_bytes())
    names = ["0.mp4", f"{address}/0.mp4", f"{address}/1.mp4", "memory://clips/1.mp4"]
    names += [f"{address}/page.mp4", f"{address}/absent.mp4", "memory://clips/absent.mp4"]
    rows = [{"video": name, "caption": f"It is {i}."} for i, name in enumerate(names)]
    rows.append({"video": names[1], "caption": "It is there twice."})
    (clips / "web.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = JobSettings(
        dataset=str(clips / "web.jsonl"),
        out=str(tmp_path / "shards"),
        cache=str(tmp_path / "cache"),
        recipe=RECIPE,
        fetch=FetchPolicy(allow_hosts=frozenset({"127.0.0.1"})),
        max_lost_rows=1.0,
        max_dead_links=1.0,
    )
    with inline.jobs():
        outcome = run_job(settings, inline.Quiet())
        again = run_job(settings, inline.Quiet())
    split = outcome.result.split
    assert split.quarantined == {"not_image": 1, "http_404": 1, "image_missing": 1}
    assert not again.fresh
    wanted = [path for path in asked if path != "/robots.txt"]
    assert sorted(wanted) == sorted({f"/{n}.mp4" for n in ("0", "1", "page", "absent")})
    local = [("0", 0), ("0", 1), ("1", 2), ("1", 3), ("0", 7)]
    message = {"style": "long_caption", "question": "Describe this video."}
    keys = {
        prepare({"video": clips / f"{n}.mp4", "message_list": [{**message, "text": told}]}).key
        for n, told in ((name, rows[i]["caption"]) for name, i in local)
    }
    reader = StreamingDataset(settings.out).reader
    assert {reader.read(i).key for i in range(split.num_samples)} == keys


def annotated(i, time, *points):
    return {
        "frame": i,
        "time": time,
        "points": [{"id": n, "point": [x, y], "occluded": hidden} for n, x, y, hidden in points],
    }


PUBLISHED = {
    "tracks": (
        {
            **{"id": "a", "fps": 10.0, "width": 640, "height": 480, "mask_id": ["0", "1"]},
            **{"expression": "The light", "sampling_fps": 1},
            "frame_trajectories": [
                annotated(0, 0.0, (0, 320.0, 48.0, False), (1, 64.0, 48.0, True)),
                annotated(5, 0.5, (0, 320.0, 240.0, False), (1, 64.0, 48.0, False)),
                annotated(7, 0.7, (0, 1.0, 1.0, False)),
            ],
        },
        '<tracks coords="0.0 1 500 100">the light</tracks>',
    ),
    "points": (
        {
            "label": "lights",
            "two_fps_timestamps": [0.0, 0.5],
            "points": [[{"x": 90.0, "y": 10.0}, {"x": 50.0, "y": 10.0}], [{"x": 5.0, "y": 5.0}]],
        },
        'Counting the <points coords="0.0 1 500 100 2 900 100;0.5 3 050 050">lights</points>'
        " shows a total of 3.",
    ),
}


@pytest.mark.parametrize("form", PUBLISHED)
def test_specs_of_published_sets_read_their_layout(form, clips, prepare, tmp_path, write_parquet):
    page = (Path(__file__).parents[2] / "docs" / "video.md").read_text()
    specs = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    spec = next(each for each in specs if f'format = "{form}"' in each)
    row, answer = PUBLISHED[form]
    source = Path(re.search('source = "(.*)"', spec)[1])
    write_parquet(tmp_path / source.parent, [{"video": "0.mp4", **row}])
    (tmp_path / source.parent / "videos").mkdir()
    (tmp_path / source.parent / "videos" / "0.mp4").write_bytes((clips / "0.mp4").read_bytes())
    (tmp_path / "set.toml").write_text(spec)
    dataset = get_dataset(str(tmp_path / "set.toml"))
    sample = prepare(dataset.get(0))
    row = text_rows(sample.spans)[0].tolist()
    assert prepare.tokenizer.decode(sample.tokens[row[5] : row[6]].tolist()) == f" {answer}"


def test_question_may_place_its_videos():
    spec = Spec(name="own", format="vqa", columns={"video": "video"})
    row = {
        "video": ["a.mp4", "b.mp4"],
        "question": "Is <video> as fast as <video>?",
        "answer": "No.",
    }
    example = parse_row(row, spec)
    assert example["video"] == ["a.mp4", "b.mp4"]
    assert example["message_list"][0]["question"] == "Is <|video|> as fast as <|video|>?"
    for question in ("Is <video> fast?", "Is <video> <video> <video> fast?"):
        with pytest.raises(SampleError, match="placeholder"):
            parse_row({**row, "question": question}, spec)


@pytest.fixture(scope="module")
def own_built(clips, tmp_path_factory):
    """The rows with questions, as frames and as clips."""
    folder = tmp_path_factory.mktemp("stored")
    made = {}
    for store in ("frames", "clip"):
        video = replace(CLIPS.video, store=store)
        settings = JobSettings(
            dataset=str(clips / "questions.jsonl"),
            out=str(folder / store),
            cache=str(folder / "cache"),
            recipe=replace(CLIPS, video=video),
            num_shards=2,
        )
        with inline.jobs():
            run_job(settings, inline.Quiet())
        made[store] = settings.out
    return made


@pytest.fixture(scope="module")
def own_unsharded(clips, own_built, prepare):
    rows = get_dataset(str(clips / "questions.jsonl"))
    return in_stored_order(rows, own_built["clip"], replace(prepare, recipe=CLIPS))


@pytest.mark.parametrize("name", VIEWS)
def test_batches_of_clips_equal_the_unsharded_ones(name, own_built, own_unsharded, prepare):
    view = View(image=SMALL, frames=VIEWS[name], augment=Augment.standard(), image_map="pooling")
    ids = prepare.tokenizer.special_ids
    times = assert_equal_examples(own_built["clip"], own_unsharded, view, ids)
    assert len(times) > len(own_unsharded)
    # All frames are drawn from, not only those that the recipe chooses.
    assert {time_s for _, *each in times for time_s in each} - {0.0, 0.3, 0.4, 0.5, 0.9}


def test_evaluation_of_clips_sees_the_frames_that_would_be_stored(own_built):
    """Frames, times, tokens and questions are those of the other way to store."""
    for frames in (FrameView(), FrameView(max_frames=2)):
        view = View(image=SMALL, frames=frames, purpose="inference")
        stored, clip = (
            StreamingDataset(own_built[store], seed=SEED, view=view) for store in ("frames", "clip")
        )
        want = {(e := stored.example(i))["metadata"]["key"]: e for i in range(3)}
        times = [each["metadata"]["frame_times_s"] for each in want.values()]
        three = [0.0, 0.9] if frames.max_frames else [0.0, 0.5, 0.9]
        assert sorted(times) == sorted([[0.0, 0.4], [0.0, 0.3], three])
        for number in range(3):
            got = clip.example(number, epoch=number)
            same = want[got["metadata"]["key"]]
            assert got["metadata"] == same["metadata"]
            assert np.array_equal(got["input_ids"], same["input_ids"])
            # Resized by another filter.
            assert np.abs(got["images"].astype(int) - same["images"]).max() <= 2


@pytest.mark.slow
def test_documents_have_videos_among_texts_and_images(clips, prepare, tmp_path):
    """In their order, divided by the budget, and the same with and without shards."""
    image = np.full((60, 80, 3), 200, np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    text = "One <video> two <image> three <video> four <video> five."
    names = [str(clips / name) for name in ("0.mp4", "1.mp4", "0.mp4")]
    row = {"text": text, "images": ["a.png"], "video": names, "end": [0.5, None, None]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    spec = 'format = "interleaved"\nsource = "rows.jsonl"\n[columns]\nvideo = "video"\n'
    (tmp_path / "own.toml").write_text(spec)
    for recipe in (RECIPE, CLIPS):
        settings = JobSettings(
            dataset=str(tmp_path / "own.toml"),
            out=str(tmp_path / recipe.video.store),
            cache=str(tmp_path / "cache"),
            recipe=recipe,
        )
        with inline.jobs():
            run_job(settings, inline.Quiet())
        rows = get_dataset(settings.dataset)
        unsharded = in_stored_order(rows, settings.out, replace(prepare, recipe=recipe))
        view = View(image=SMALL, frames=FrameView(max_frames=3), image_map="pooling")
        ids = prepare.tokenizer.special_ids
        assert_equal_examples(settings.out, unsharded, view, ids)
        stream = StreamingDataset(settings.out, seed=SEED, view=view)
        shown = {}
        for i in range(2):
            example = stream.example(i)
            # Pictures, times between them, and the ends of the text as one mark each.
            decode, marks = prepare.tokenizer.decode, {*ids.values()}
            parts = ["#" if id in marks else decode([id]) for id in example["input_ids"].tolist()]
            text = re.sub(r"[#0-9. ]*#[#0-9. ]*", "#", "".join(parts))
            shown[text.strip()] = len(example["metadata"]["frame_times_s"])
        assert shown == {"#One#two#three#four": 5, "#five.": 3}


def test_clips_pack_by_lengths_that_hold_every_draw(own_built):
    stream = StreamingDataset(own_built["clip"], seed=SEED)
    tokens, crops = stream._stream.parts[0].builder.lengths(np.arange(3))
    for number in range(3):
        for epoch in range(3):
            example = stream.example(number, epoch=epoch)
            assert len(example["input_ids"]) <= tokens[number]
            assert len(example["images"]) <= crops[number] <= 3
    assert not verify(own_built["clip"], inline.Quiet(), deep=True)


MIXED = """
from pathlib import Path

import numpy as np

from preprocess.datasets import DatasetBase

class Mixed(DatasetBase):
    videos = True
    several_images = True

    def load(self):
        def message(text):
            return [{{"style": "vqa2", "question": "What is it?", "answer": text}}]

        picture = np.full((40, 60, 3), 90, np.uint8)
        first, second = (Path({folder!r}, name) for name in ("0.mp4", "1.mp4"))
        return [
            {{"video": first, "message_list": message("a clip")}},
            {{"video": second, "image": picture, "message_list": message("both")}},
            {{"image": picture, "message_list": message("a picture")}},
            {{"message_list": message("text")}},
        ]
"""


@pytest.fixture(scope="module")
def mixed_built(clips, own_built, tmp_path_factory):
    """Clips, a picture, and a text, as one dataset; and the rows with frames."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "mine.py").write_text(MIXED.format(folder=str(clips)))
    settings = JobSettings(
        dataset=f"{folder / 'mine.py'}:Mixed",
        out=str(folder / "shards"),
        cache=str(folder / "cache"),
        recipe=CLIPS,
    )
    with inline.jobs():
        run_job(settings, inline.Quiet())
    return settings.out, own_built["frames"]


def mixed_batches(urls, count, *, world_size, state=None, **options):
    """Takes global batches of packs, joined from all ranks, and the state after them."""
    parts, states = [], []
    for rank in range(world_size):
        view = View(image=SMALL, frames=FrameView(), image_map="pooling")
        datasets = [
            StreamingDataset(url, view=view, rank=rank, world_size=world_size, canonical_ranks=1)
            for url in urls
        ]
        mixture = IterableDatasetMixture(datasets, [0.7, 0.3], seed=SEED, stop=8, canonical_ranks=1)
        loader = make_dataloader(
            mixture,
            global_batch_size=4,
            sequence_length=384,
            pad_mode="max_len",
            pack=True,
            balance=False,
            with_metadata=True,
            **options,
        )
        if state is not None:
            loader.load_state_dict(state)
        endless = itertools.chain.from_iterable(itertools.repeat(loader))
        parts.append(list(itertools.islice(endless, count)))
        states.append(json.loads(json.dumps(loader.state_dict())))
    steps = []
    for step in zip(*parts, strict=True):
        examples = [one for part in step for row in part["metadata"] for one in row["examples"]]
        # Rows are padded to as many pictures as the rank's longest one has.
        crops = torch.cat([part["images"].reshape(-1, 3, 84, 84) for part in step])
        crops = crops[crops.flatten(1).bool().any(1)]
        ids = [part["input_ids"].numpy() for part in step]
        steps.append((examples, np.concatenate(ids).tobytes(), crops.numpy().tobytes()))
    return steps, states[0]


def test_mixtures_with_clips_pack_and_resume_on_any_number_of_ranks(mixed_built):
    want, _ = mixed_batches(mixed_built, 4, world_size=1, decode_threads=3)
    shown = [one for examples, *_ in want for one in examples]
    kinds = {(len(one["images"]) > 0, bool(one.get("frame_times_s"))) for one in shown}
    assert kinds == {(True, True), (True, False), (False, False)}
    first, state = mixed_batches(mixed_built, 2, world_size=2, decode_threads=0)
    second, _ = mixed_batches(mixed_built, 2, world_size=4, state=state, decode_threads=1)
    assert [*first, *second] == want


def test_clip_that_cannot_be_decoded_is_an_error_or_is_substituted_and_counted(own_built):
    url = own_built["clip"]
    good = StreamingDataset(url, seed=SEED)
    key = good.example(1)["metadata"]["key"]

    def dies(table, file, numbers, *, where, **how):
        if where.endswith(key):
            raise SampleError("video_process.load", where=where, problem="process died")
        read_frames(table, file, numbers, where=where, **how)

    def batches(on_bad, threads):
        dataset = StreamingDataset(url, seed=SEED, on_bad=on_bad)
        loader = make_dataloader(
            dataset,
            global_batch_size=3,
            sequence_length=512,
            decode_threads=threads,
            with_metadata=True,
        )
        return next(iter(loader)), dataset

    with mock.patch("loader.assembly.clip.read_frames", dies):
        for threads in (0, 2):
            batch, dataset = batches("substitute", threads)
            assert dataset.bad == {"video_process": 1}
            (told,) = [one for one in batch["metadata"] if "substitutes" in one]
            assert (told["substitutes"]["key"], told["substitutes"]["reason"]) == (
                key,
                "video_process",
            )
            assert told["key"] != key
        with pytest.raises(SampleError, match="process died") as found:
            batches("raise", 2)
    assert key in found.value.where
