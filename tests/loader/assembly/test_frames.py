"""Frames of videos in a sequence: their tokens, their times, and where their patches are."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from loader import View, assemble
from loader.assembly import TokenIds
from preprocess.text import load_tokenizer
from preprocess.text.interleaved import frame_time
from shardspec.errors import ConfigError, SampleError
from shardspec.index import index_row, longest_sequence
from shardspec.sample import PreparedImage, PreparedSample, spans_table, video_rows
from shardspec.tar import TarRange
from shardspec.tiling import FrameView, ImageView, image_token_ids, num_image_tokens

VIEW = ImageView(size_px=126, patch_px=14)  # 9 x 9 patches
SIZE = (126, 126)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
    return TokenIds.from_special_ids(tokenizer.special_ids)


def frame(i):
    return PreparedImage(
        pixels=np.full((126, 126, 3), i, np.uint8), source_width=126, source_height=126
    )


def sample(tokenizer, times_s, *, images=0, said=(), named=0):
    """A sample of some images and then a video with subtitles, with the text "yes"."""
    tokens, leads = [], []

    def span(text):
        start = len(tokens)
        tokens.extend(tokenizer.encode(text))
        return start, len(tokens)

    text = (0, 0, *span(" User: What? Assistant:"), *span(" yes"), 1_000_000)
    leads = [span(f"Image {i + 1}") for i in range(images)]
    for time_s in times_s:
        written = frame_time(time_s)
        leads.append((*span(" " + written), *span(written), round(time_s * 1000)))
    pictures = tuple(frame(i) for i in range(images + len(times_s)))
    subtitles = [(0, *span(f"\n{s:.1f} x\n"), round(s * 1000), round(s * 1000)) for s in said]
    return PreparedSample(
        key="a",
        tokens=np.array(tokens, "<i4"),
        spans=spans_table(
            [text],
            pictures,
            leads=leads,
            videos=[(images, len(times_s), 0)],
            subtitles=subtitles,
            named=named,
        ),
        images=pictures,
    )


def made(tokenizer, ids, times_s, *, images=0, seed=0, said=(), named=0, **frames):
    view = View(
        image=VIEW,
        frames=FrameView(**frames),
        image_map="pooling",
        purpose=frames.pop("purpose", "train"),
    )
    rng = np.random.RandomState(seed)
    made_of = sample(tokenizer, times_s, images=images, said=said, named=named)
    return assemble(made_of, rng, view=view, ids=ids)


@pytest.mark.parametrize("few", [{"max_frames": 1}, {"max_tokens": 9}, {"sampling": "even"}])
def test_frames_that_texts_name_are_all_shown(few, tokenizer, ids):
    times_s = [0.0, 0.5, 2.0]
    got = made(tokenizer, ids, times_s, images=1, named=1, **few)
    assert got["metadata"]["frame_times_s"] == times_s
    assert len(got["images"]) == 4


def encoded(text, tokenizer):
    """Encodes a text with symbols: what is between two symbols is tokenized by itself."""
    ids = []
    for part in re.split(r"(<[a-z_]+>)", text):
        if part in tokenizer.special_ids:
            ids.append(tokenizer.special_ids[part])
        elif part:
            ids += tokenizer.encode(part)
    return ids


def prefix(example):
    """The sequence up to the text, without BOS."""
    segments = example["subsegment_ids"]
    return example["input_ids"][segments == segments[0]][1:].tolist()


@pytest.mark.slow  # to import that model takes seconds; the first case below says the same
def test_frames_are_written_as_the_processor_of_molmo_2_writes_them(tokenizer, ids):
    pytest.importorskip("transformers.models.molmo2.processing_molmo2")
    from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

    times = [0.0, 0.5, 1.0, 12.46, 99.96]
    processor = SimpleNamespace(use_frame_special_tokens=True, video_use_col_tokens=False)
    want = Molmo2Processor.get_video_string(processor, np.array([5, 3, 3]), times)
    example = made(tokenizer, ids, times)
    assert prefix(example) == encoded(want, tokenizer)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("marks", ["frame", "video"])
def test_subtitles_are_between_the_frames_that_are_shown(marks, seed, tokenizer, ids):
    times, said = [1.0, 2.0, 3.0, 4.0, 5.0], [0.2, 1.5, 1.7, 3.0, 4.0, 4.5, 9.0]
    view = {"seed": seed, "said": said, "max_frames": 3, "marks": marks}
    example = made(tokenizer, ids, times, **view)
    shown = example["metadata"]["frame_times_s"]
    order = sorted([*((time, 0) for time in shown), *((begin, 1) for begin in said)])
    begin, end = ("<frame_start>", "<frame_end>") if marks == "frame" else ("", "")
    text = ""
    for time, is_said in order:
        space = " " if time != shown[0] else ""
        frame = f"{space}{time:.1f} {begin}{PATCHES}{end}"
        if marks == "video" and time == shown[0]:
            frame = f"<frame_start>{frame}"
        if marks == "video" and time == shown[-1]:
            frame += "<frame_end>"
        text += f"<cut>\n{time:.1f} x\n<cut>" if is_said else frame
    want = [i for part in text.split("<cut>") for i in encoded(part, tokenizer)]
    assert prefix(example) == want


def test_recorded_length_counts_subtitles(tokenizer, ids):
    lengths = []
    for said in [(), [0.5, 9.0]]:
        made_of = sample(tokenizer, [1.0, 2.0], said=said)
        lengths.append(longest_sequence(made_of.tokens, made_of.spans)[0])
    longest = len(made(tokenizer, ids, [1.0, 2.0], said=said)["input_ids"])
    plain = len(made(tokenizer, ids, [1.0, 2.0])["input_ids"])
    assert lengths[1] - lengths[0] == longest - plain > 0


PATCHES = "<im_patch>" * 9


@pytest.mark.parametrize(
    "frames, want",
    [
        ({}, f"0.0 <frame_start>{PATCHES}<frame_end> 1.5 <frame_start>{PATCHES}<frame_end>"),
        ({"marks": "video"}, f"<frame_start>0.0 {PATCHES} 1.5 {PATCHES}<frame_end>"),
        ({"marks": "none"}, f"0.0 {PATCHES} 1.5 {PATCHES}"),
        (
            {"timestamps": False},
            f"<frame_start>{PATCHES}<frame_end><frame_start>{PATCHES}<frame_end>",
        ),
        ({"timestamps": False, "marks": "video"}, f"<frame_start>{PATCHES * 2}<frame_end>"),
        ({"timestamps": False, "marks": "none"}, PATCHES * 2),
    ],
)
def test_marks_and_times_are_where_the_view_wants_them(frames, want, tokenizer, ids):
    example = made(tokenizer, ids, [0.0, 1.5], **frames)
    assert prefix(example) == encoded(want, tokenizer)


@pytest.mark.parametrize("pool", [(3, 3), (2, 2)])
@pytest.mark.parametrize("marks", ["frame", "video", "none"])
def test_each_patch_token_pools_patches_of_its_own_frame(pool, marks, tokenizer, ids):
    example = made(tokenizer, ids, [0.0, 0.5, 1.0], pool=pool, marks=marks)
    positions = np.flatnonzero(example["input_ids"] == ids.image.im_patch)
    pooling = example["token_pooling"]
    side = -(-9 // pool[0])
    assert len(positions) == len(pooling) == 3 * side**2
    assert pooling.shape[1] == 9 if pool == (3, 3) else 4
    for k in range(3):
        own = pooling[k * side**2 : (k + 1) * side**2]
        patches = own[own >= 0]
        assert sorted(patches) == list(range(81 * k, 81 * (k + 1)))
    assert example["image_input_idx"].tolist() == positions[:: side**2].tolist()


def test_images_in_front_of_a_video_keep_their_own_pooling(tokenizer, ids):
    example = made(tokenizer, ids, [0.0, 0.5], images=1)
    block = encoded("Image 1", tokenizer) + image_token_ids(*SIZE, VIEW, ids.image).tolist()
    video = f"0.0 <frame_start>{PATCHES}<frame_end> 0.5 <frame_start>{PATCHES}<frame_end>"
    assert prefix(example) == block + encoded(video, tokenizer)
    pooling = example["token_pooling"]
    assert pooling.shape == (25 + 2 * 9, 9)
    assert np.all(pooling[:25, 4:] == -1)
    assert sorted(pooling[pooling >= 0]) == list(range(3 * 81))
    assert example["images"][:, 0, 0, 0].tolist() == [0, 1, 2]


def test_drawn_frames_bring_their_own_times(tokenizer, ids):
    times = [i / 2 for i in range(10)]
    seen = set()
    for seed in range(20):
        example = made(tokenizer, ids, times, seed=seed, max_frames=3)
        drawn = example["metadata"]["frame_times_s"]
        numbers = example["images"][:, 0, 0, 0].tolist()
        assert drawn == [number / 2 for number in numbers]
        text = " ".join(f"{t:.1f} <frame_start>{PATCHES}<frame_end>" for t in drawn)
        assert prefix(example) == encoded(text, tokenizer)
        seen.add(tuple(numbers))
    assert len(seen) > 10
    evens = {
        tuple(
            made(tokenizer, ids, times, seed=s, max_frames=3, sampling="even")["images"][:, 0, 0, 0]
        )
        for s in range(5)
    }
    assert evens == {(0, 5, 9)}


@pytest.mark.parametrize("marks", ["frame", "video", "none"])
@pytest.mark.parametrize("timestamps", [True, False])
@pytest.mark.parametrize("budget", [1, 14, 40, 77, 10_000])
def test_frames_keep_to_a_budget_of_tokens(budget, timestamps, marks, tokenizer, ids):
    times = [i / 2 for i in range(30)]
    how = {"marks": marks, "timestamps": timestamps, "sampling": "even"}
    example = made(tokenizer, ids, times, max_tokens=budget, **how)
    number = len(example["images"])
    assert len(prefix(example)) <= budget or number == 1
    if number < 30:
        more = made(tokenizer, ids, times, max_frames=number + 1, **how)
        longest = max(len(tokenizer.encode(f" {t:.1f} ")) for t in times)
        assert len(prefix(more)) > budget - longest
    else:
        assert budget == 10_000


def test_tokens_of_each_crop_are_found_per_token(tokenizer, ids):
    view = View(image=VIEW, frames=FrameView(marks="video"), image_map="per_token")
    example = assemble(
        sample(tokenizer, [0.0, 0.5], images=1), np.random.RandomState(0), view=view, ids=ids
    )
    found = example["image_input_idx"]
    assert found.shape == (3, 25)
    flat = found[found >= 0]
    assert np.array_equal(flat, np.flatnonzero(example["input_ids"] == ids.image.im_patch))
    assert np.all(found[1:, 9:] == -100)


def test_frames_count_among_the_images_of_a_sample(tokenizer, ids):
    view = View(image=VIEW, frames=FrameView(max_frames=4), max_images=3)
    with pytest.raises(SampleError, match="more images than the view allows"):
        assemble(sample(tokenizer, [0.0] * 9), np.random.RandomState(0), view=view, ids=ids)


def test_index_counts_the_tokens_of_frames(tokenizer, ids):
    made_of = sample(tokenizer, [0.0, 0.5], images=1)
    place = TarRange(offset=0, num_bytes=0, crc32=0)
    row = index_row(
        made_of, place=place, json_bytes=0, image_sizes=[1, 1, 1], views=(VIEW,), frames=FrameView()
    )
    view = View(image=VIEW, frames=FrameView())
    example = assemble(made_of, np.random.RandomState(0), view=view, ids=ids)
    assert len(example["input_ids"]) <= row["view_length"][0, 0] <= len(example["input_ids"]) + 2
    assert row["view_crops"][0, 0] == 3
    assert video_rows(made_of.spans).tolist() == [[4, 0, 1, 2, 0, 0, 0, 0]]
    assert num_image_tokens(*SIZE, VIEW) == 27


@pytest.mark.parametrize(
    "wrong", [{"pool": 3}, {"pool": (0, 3)}, {"marks": "all"}, {"max_frames": 0}, {"max_tokens": 0}]
)
def test_views_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="view of frames") as found:
        FrameView(**wrong)
    assert found.value.reason == "frame_view"
