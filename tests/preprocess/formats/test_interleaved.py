"""Documents of texts and images: their order, their budget, and what cannot be read."""

import io
import json
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

from preprocess.datasets import dataset_class, own
from preprocess.formats import Spec, guess_format, parse_row
from preprocess.formats.interleaved import PIECE, Image, document_parts, split_parts
from preprocess.formats.video import RowVideo
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.errors import SampleError
from shardspec.manifest import load_manifest
from tests.chat_shapes import SHAPES, make_tokenizer

SPEC = Spec(name="own", format="interleaved")
VIDEOS = Spec(name="own", format="interleaved", columns={"video": "clip"})
PARTS = st.lists(
    st.one_of(
        st.text("ab \n", min_size=1, max_size=30),
        st.integers(0, 9).map(Image),
        st.integers(0, 9).map(RowVideo),
    ),
    max_size=20,
)


@given(PARTS, st.integers(0, 4), st.integers(0, 2), st.integers(0, 12))
def test_pieces_keep_to_the_budget_and_lose_nothing(parts, max_images, max_videos, max_chars):
    budget = {"max_images": max_images, "max_videos": max_videos, "max_chars": max_chars}
    pieces = split_parts(parts, **budget)

    def flat(parts):
        return [c for part in parts for c in (part if isinstance(part, str) else [part])]

    assert [c for piece in pieces for c in flat(piece)] == flat(parts)
    for piece in pieces:
        assert piece or not parts
        images = [part for part in piece if isinstance(part, Image)]
        videos = [part for part in piece if isinstance(part, RowVideo)]
        assert not max_images or len(images) <= max_images
        assert not max_videos or len(videos) <= max_videos
        assert not max_chars or len(flat(piece)) - len(images) - len(videos) <= max_chars


def test_a_text_beyond_the_budget_is_cut_at_white_space():
    assert split_parts(["one two three"], max_images=0, max_chars=8) == [["one two "], ["three"]]
    assert split_parts(["a" * 5, Image(1)], max_images=0, max_chars=3) == [
        ["aaa"],
        ["aa", Image(1)],
    ]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"texts": ["a"], "images": []}, "document.lengths"),
        ({"texts": ["a"], "images": None}, "document.lengths"),
        ({"texts": ["a"], "images": ["b.png"]}, "document.both"),
        ({"texts": [None, 3], "images": ["b.png", None]}, "document.part"),
        ({"texts": [None, " "], "images": ["b.png", None]}, "document_no_text"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 1}]}, "document.index"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": None}]}, "document.index"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, "row_image"),
        ({"text_list": [3], "image_info": []}, "document.part"),
        ({"document": ["a", 3]}, "document.part"),
        ({"document": ["a", {"type": "image"}]}, "document.part"),
        ({"text": "a <image>", "images": []}, "placeholder_without_image"),
        ({"text": "a <image>", "images": ["a", "b"]}, "image_without_placeholder"),
        ({"title": "a"}, "row_fields"),
        ({"text": "a", "video": "b.mp4"}, "row_media"),
        ({"texts": ["a"], "images": [None], "videos": ["b.mp4"]}, "row_media"),
        ({"document": ["a", {"type": "video", "url": "b.mp4"}]}, "row_media"),
    ],
)
def test_a_document_that_cannot_be_read_says_why(row, reason):
    with pytest.raises(SampleError) as caught:
        parse_row(row, SPEC)
    want = SampleError(reason, **caught.value.facts)
    assert (caught.value.reason, caught.value.what) == (want.reason, want.what)


@pytest.mark.parametrize(
    "row, parts",
    [
        (
            {"text": "a <video> b <image><video>", "images": ["i"], "clip": ["v", "w"]},
            ["a ", RowVideo("v"), " b ", Image("i"), RowVideo("w")],
        ),
        (  # without a place, in front; a kind at a time
            {"text": "a <image>", "images": ["i"], "clip": "v", "start": 1},
            [RowVideo("v", (1, None)), "a ", Image("i")],
        ),
        ({"text": "a", "images": "i", "clip": "v"}, [Image("i"), RowVideo("v"), "a"]),
        (
            {
                "content": [
                    "a",
                    {"type": "video", "video": "v", "start": 2},
                    {"video": "w"},
                    {"type": "image", "path": "i"},
                    {"type": "video_url", "video_url": {"url": "http://x.test/a.mp4"}},
                ]
            },
            [
                *("a", RowVideo("v", (2, None)), RowVideo("w"), Image("i")),
                RowVideo("http://x.test/a.mp4"),
            ],
        ),
    ],
)
def test_videos_are_where_the_document_has_them(row, parts):
    assert document_parts(row, VIDEOS) == parts


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "a <video>", "clip": []}, "placeholder_without_video"),
        ({"text": "a <video>", "clip": ["v", "w"]}, "video_without_placeholder"),
        ({"text": "a <video>", "clip": "v", "video": "w"}, "row_media"),
        ({"content": ["a", {"type": "video"}], "clip": "v"}, "document.part"),
        ({"content": ["a", {"video": "v", "image": "i"}]}, "document.several"),
        ({"content": [{"text": "a", "image": "i"}]}, "document.several"),
        ({"texts": ["a"], "images": [None], "video": "v"}, "row_media"),
    ],
)
def test_a_document_whose_videos_have_no_place_says_why(row, reason):
    with pytest.raises(SampleError) as caught:
        parse_row(row, VIDEOS)
    assert caught.value.reason == reason.split(".")[0]


def test_budget_of_videos_is_in_the_recipe_of_documents_with_videos_alone():
    assert VIDEOS.to_dict()["max_videos"] == 2
    assert "max_videos" not in SPEC.to_dict()


def test_places_without_a_text_and_an_image_are_nothing():
    row = {"texts": [None, "a", "", "b", None], "images": [None, None, "", None, "i.png"]}
    assert document_parts(row, SPEC) == ["a\n\nb", Image("i.png")]


def test_images_of_mmc4_are_urls_unless_the_spec_has_a_folder():
    info = {"image_name": "0.png", "raw_url": "http://x.test/0.png", "matched_text_index": 0}
    row = {"text_list": ["a", "b"], "image_info": [info]}
    assert document_parts(row, SPEC) == [Image("http://x.test/0.png"), "a b"]
    there = Spec(name="own", format="interleaved", images="photos")
    assert document_parts(row, there) == [Image("0.png"), "a b"]


def test_pairs_of_the_cauldron_are_not_a_document():
    row = {"texts": [{"user": "a", "assistant": "b"}], "images": ["a.png"]}
    assert guess_format([row]).format == "messages"
    assert guess_format([{"texts": ["a"], "images": [None]}]).format == "interleaved"


def photo(shade):
    stream = io.BytesIO()
    Picture.new("RGB", (56, 56), (shade, 90, 200)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def documents(tmp_path):
    """Two documents of five and of one image, and one that cannot be read."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(photo(40 * i))
    long = {
        "texts": [t for i in range(5) for t in (None, f"Text {i}. ")],
        "images": [name for i in range(5) for name in (f"{i}.png", None)],
    }
    rows = [long, {"texts": ["x"], "images": []}, {"texts": ["End."], "images": [None]}]
    rows.append({"texts": [None, "Last."], "images": ["5.png", None]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "spec.toml").write_text(
        'format = "interleaved"\nsource = "rows.jsonl"\nmax_images = 2\n'
    )
    return tmp_path


def test_a_long_document_becomes_several_samples(inline_cli, documents):
    job = ("shards", documents / "spec.toml", "--out", documents / "out", "--workers", 1)
    done = inline_cli.good(*job, "--image-size", 56, "--max-lost-rows", 1)
    split = load_manifest(str(documents / "out")).splits["train"]
    assert (split.num_samples, split.num_images) == (5, 6)
    assert dict(split.quarantined) == {"document": 1}
    assert "rows read            6" in done.out
    lost = (documents / "out" / "quarantine" / "spec-train-plan.jsonl").read_text()
    assert json.loads(lost)["row"] == 1  # of the file, whatever was divided before it


def test_what_the_budget_leaves_out_does_not_end_the_job(inline_cli, documents):
    """Images after all text, and samples of too many tokens: counted, and no failures."""
    rows = [{"texts": ["A."] + [None] * 5, "images": [None, *["0.png"] * 5]}]
    rows += [{"texts": [f"{'many words ' * 20 * i}."], "images": [None]} for i in range(3)]
    (documents / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (documents / "spec.toml").open("a") as spec:
        spec.write("max_tokens = 60\n")
    job = ("shards", documents / "spec.toml", "--out", documents / "out", "--workers", 1)
    inline_cli.good(*job, "--image-size", 28, "--max-lost-rows", 0, "--max-bad-samples", 0)
    split = load_manifest(str(documents / "out")).splits["train"]
    assert dict(split.quarantined) == {"document_no_text": 2, "document_tokens": 2}


def test_examples_are_the_same_in_another_process(documents):
    dataset = dataset_class(str(documents / "spec.toml"))()
    assert [dataset[i]["message_list"][0]["text"] for i in range(3)] == [
        "<|image|>Text 0. <|image|>Text 1. ",
        "<|image|>Text 2. <|image|>Text 3. ",
        "<|image|>Text 4. ",
    ]
    assert [dataset.rows.locate(i)[1] for i in range(6)] == [0, 0, 0, 1, 2, 3]
    copy = object.__new__(type(dataset))
    with mock.patch.object(own, "_owners", side_effect=AssertionError("rows were read again")):
        copy.__setstate__(dataset.__getstate__())
    assert [copy[i] for i in (0, 2, 5)] == [dataset[i] for i in (0, 2, 5)]


@pytest.mark.parametrize("message_format", ["role", "none", "template"])
def test_no_markup_is_written_into_a_document(message_format, tmp_path):
    policy = TextPolicy(message_format=message_format, num_variants=3, system_prompt="style")
    templated = message_format == "template"
    name = make_tokenizer(tmp_path / "chat", SHAPES["chatml"]) if templated else "embedded"
    tokenizer = load_tokenizer(name, policy=policy)
    prepare = Preparer(recipe=Recipe(text=policy), tokenizer=tokenizer)
    message = {"style": "interleaved", "text": "One <|image|> two."}
    sample = prepare({"image": photo(0), "message_list": [message]})
    (row,) = sample.spans[sample.spans[:, 0] == 0].tolist()
    assert row[3] == row[4]
    mark = tokenizer.special_ids["<|image|>"]
    ids = sample.tokens[row[5] : row[6]].tolist()
    at = ids.index(mark)
    assert tokenizer.decode(ids[:at]) + "|" + tokenizer.decode(ids[at + 1 :]) == "One | two."


def test_a_document_of_too_many_tokens_is_left_out_with_their_number():
    tokenizer = load_tokenizer()
    prepare = Preparer(recipe=Recipe(), tokenizer=tokenizer)
    spec = Spec(name="own", format="interleaved", max_tokens=10)
    example = parse_row({"document": ["One ", {"image": photo(0)}, " two."], PIECE: 0}, spec)
    with pytest.raises(SampleError) as caught:
        prepare(example)
    assert caught.value.reason == "document_tokens"
    length = caught.value.facts["tokens"]
    kept = prepare({**example, "max_tokens": length})
    assert len(kept.images) == 1
    assert np.count_nonzero(kept.tokens == tokenizer.special_ids["<|image|>"]) == 1
